"""How a benchmark's arm is read from its name, and how its network is built."""

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers.norm import LayerNorm2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mrla.data.randomness import derive_seed, seeded
from mrla.deploy import FORMATS
from mrla.messages.suggestions import nearest
from mrla.models import (
    NETWORKS,
    SavedNetwork,
    TimmModel,
    TorchvisionModel,
    attach,
    build,
    is_attached,
    load,
    resolve,
)
from mrla.models.checkpoints.descriptions import create_empty
from mrla.models.dry_run import input_sizes
from mrla.ops import METHODS, LayerMixer, MRLABase, MRLALight, is_method
from mrla.train.arm_names import parse_arm

STATES = ("fused", "reference", "compiled")
"""What may be done with a network in torch; the name of a format of export is a state, too."""
NO_NUMBA = "numba is not installed: light and base run on the reference path; pip install 'mrla[fast]'"


@dataclass(frozen=True)
class Arm:
    """One arm of a benchmark.

    Attributes:
        name: What the caller wrote.
        network: ``plain``, a method with its options, or the network's name.
        states: What is done with the network before it is timed.
    """

    name: str
    network: str
    states: tuple[str, ...] = ()

    @property
    def trains(self) -> bool:
        """Whether there is a training step to time."""
        return "fused" not in self.states and self.engine is None

    @property
    def engine(self) -> str | None:
        """The format of export whose engine runs the network; None where torch does."""
        return next((state for state in self.states if state in FORMATS), None)

    @property
    def of_model(self) -> bool:
        """Whether its network is made of the benchmark's model."""
        return _is_of_model(self.network)


def read_arm(text: str) -> Arm:
    """Reads ``NAME[+STATE...]``, and refuses what cannot be run here before anything is built.

    Args:
        text: Such as ``"light"``, ``"light+fused"`` or ``"resnet50_mrla_base+compiled"``.

    Returns:
        The arm.

    Raises:
        ValueError: If there is no such network or state, two states exclude each other, or a package is missing.

    Example:
        >>> read_arm("light+reference")
        Arm(name='light+reference', network='light', states=('reference',))
    """
    network, *states = text.split("+")
    if Path(text).is_dir() and not set(states) <= set(known_states()):  # a folder may have a plus in its name
        network, states = text, []
    for state in states:
        if state not in known_states():
            known = known_states()
            raise ValueError(
                f"an arm's states must be of {', '.join(known)}: got {state!r} in {text!r}{nearest(state, known)}"
            )
    if len(set(states)) != len(states):
        raise ValueError(f"the states of an arm must differ: got {text!r}; name each once")
    engines = [state for state in states if state == "compiled" or state in FORMATS]
    if len(engines) > 1:
        raise ValueError(f"an arm runs in one engine: got {text!r}; make {' and '.join(engines)} arms of their own")
    if _is_of_model(network):
        parse_arm(network)
    else:
        check_network(network)
    for state in states:
        if state in FORMATS and (missing := FORMATS[state].missing_packages()):
            raise ValueError(
                f"an arm with the state {state!r} needs {', '.join(missing)}, not installed here; "
                f"pip install 'mrla[{FORMATS[state].extra}]'"
            )
    return Arm(text, network, tuple(states))


def _is_of_model(network: str) -> bool:
    """Whether a network is the benchmark's model, plain or with a method's mixers: ``plain``, ``base:last=3``."""
    name = network.partition(":")[0]
    return name == "plain" or is_method(name)


def known_states() -> tuple[str, ...]:
    """Every state that an arm may have: those of torch, and the formats of export."""
    return (*STATES, *FORMATS)


def check_network(name: str) -> None:
    """Refuses the name of a network that nobody knows.

    Args:
        name: See `mrla.models.resolve`.

    Raises:
        ValueError: If there is none, with the nearest name.
    """
    if isinstance(_source(name), TorchvisionModel):
        create_empty(name, {})


def build_network(network: str, model: str | nn.Module, *, in_chans: int | None = None, seed: int = 0) -> nn.Module:
    """An arm's network, with norms and mixers that do their full work.

    A last norm or scale that starts at zero would multiply zeros, as no trained network does, so every norm's and
    mixer's own weights are drawn. The seed decides: all methods stand on equal weights of the plain network.

    Args:
        network: As `Arm` holds it.
        model: The benchmark's model; one of the caller's is copied.
        in_chans: Channels of the images; the network's own if not given.
        seed: Seed of what is drawn.

    Returns:
        The network; `calibrate_bn` is still to be called.

    Raises:
        ValueError: If it cannot be built, has other channels, or a method is to be attached to one with mixers.
    """
    if not _is_of_model(network):
        with seeded(derive_seed(seed, "bench", network)):
            return _draw_mixers(_draw_norms(_named(network, in_chans)))
    with seeded(derive_seed(seed, "bench", "plain")):
        plain = copy.deepcopy(model) if isinstance(model, nn.Module) else _named(model, in_chans)
        _check_channels(plain, in_chans)
        if is_attached(plain):
            name = type(model).__name__ if isinstance(model, nn.Module) else model
            raise ValueError(
                f"model must be a plain network, from which the arms are made: got {name}, which has mixers; detach "
                f"it, or give its name as an arm of its own"
            )
        _draw_norms(plain)
    if network == "plain":
        return plain
    with seeded(derive_seed(seed, "bench", network)):
        method, options = parse_arm(network)
        return _draw_mixers(attach(plain, method, **options))


@torch.no_grad()
def calibrate_bn(network: nn.Module, images: Tensor) -> nn.Module:
    """Gives every BatchNorm statistics of some images, so that no map of a deep network runs off to infinity.

    Its mean is a tenth of theirs: taken off whole, nothing would be left but what tells images apart, and a deep
    network at random weights amplifies its rounding errors as it amplifies that difference.

    Args:
        network: The network, changed in place; it is in eval mode afterwards.
        images: A batch.

    Returns:
        `network` itself.
    """

    def settle(norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(norm, _BatchNorm)
        if norm.running_mean is None or norm.running_var is None:
            return
        axes = [axis for axis in range(args[0].ndim) if axis != 1]
        variance, mean = torch.var_mean(args[0].float(), axes, correction=0)
        norm.running_mean.copy_(0.1 * mean)
        norm.running_var.copy_(variance + (0.9 * mean).square())  # around the mean that is taken off

    handles = [
        module.register_forward_pre_hook(settle) for module in network.modules() if isinstance(module, _BatchNorm)
    ]
    try:
        network.eval()(images)
    finally:
        for handle in handles:
            handle.remove()
    return network


def image_shape(network: nn.Module) -> tuple[int, ...]:
    """Shape (c, h, w) of the images that a network was made for."""
    return input_sizes(network)[0]


def wants_numba(arms: Sequence[Arm], networks: Sequence[nn.Module]) -> bool:
    """Whether an arm would run compiled kernels, and numba, which compiles them, is missing."""
    if find_spec("numba") is not None:
        return False
    return any(
        "reference" not in arm.states
        and arm.engine is None
        and any(isinstance(module, (MRLALight, MRLABase)) for module in network.modules())
        for arm, network in zip(arms, networks, strict=True)
    )


def at_depth(network: str, depth: int) -> str:
    """The ResNet of another depth in a network's family.

    Args:
        network: Such as ``resnet18_cifar_mrla_light`` or ``torchvision/resnet50``.
        depth: 18, 34, 50, 101 or 152.

    Returns:
        Its name.

    Raises:
        ValueError: If the name is not a ResNet's with a depth, or its family has none of this depth.

    Example:
        >>> at_depth("resnet18_cifar_mrla_light", 50)
        'resnet50_cifar_mrla_light'
    """
    name, found = re.subn(r"resnet(18|34|50|101|152)(?!\d)", f"resnet{depth}", network)
    if found != 1:
        raise ValueError(
            f"a sweep over depth needs a ResNet by name, such as resnet18 or resnet50_cifar: got {network!r}; choose "
            f"another model or sweep"
        )
    check_network(name)
    return name


def draw_mixer(mixer: LayerMixer) -> LayerMixer:
    """Draws norms, scales and lambdas of a mixer, which start at zero or one."""
    for name, parameter in mixer.named_parameters():
        if parameter.ndim == 1:
            with torch.no_grad():
                parameter.normal_(std=0.1) if name.endswith("bias") else parameter.uniform_(0.5, 1.5)
    return mixer


def _draw_mixers(network: nn.Module) -> nn.Module:
    for module in network.modules():
        if isinstance(module, LayerMixer):
            draw_mixer(module)
    return network


@torch.no_grad()
def _draw_norms(network: nn.Module) -> nn.Module:
    for module in network.modules():
        if isinstance(module, (_BatchNorm, nn.LayerNorm, nn.GroupNorm, LayerNorm2d)) and module.weight is not None:
            module.weight.uniform_(0.5, 1.5)
            if module.bias is not None:
                module.bias.normal_(std=0.1)
    return network


def _source(name: str) -> TimmModel | TorchvisionModel | SavedNetwork:
    return resolve(name, NETWORKS, what="a network", known=("plain", *METHODS))


def _named(name: str, in_chans: int | None) -> nn.Module:
    source = _source(name)
    if isinstance(source, SavedNetwork):
        network = load(source.place)
    elif isinstance(source, TorchvisionModel):
        network = build(name, {}, None)
    else:
        arguments: dict[str, Any] = {} if in_chans is None else {"in_chans": in_chans}
        try:
            network = timm.create_model(source.name, **arguments)  # with the mixers that its name stands for
        except (TypeError, RuntimeError, ValueError) as error:
            raise ValueError(f"{name} cannot be built with {arguments}: {error}") from error
    _check_channels(network, in_chans)
    return network


def _check_channels(network: nn.Module, in_chans: int | None) -> None:
    own = image_shape(network)[0]
    if in_chans not in (None, own):
        raise ValueError(
            f"in_chans must be the {own} channels that this {type(network).__name__} takes: got {in_chans}"
        )
