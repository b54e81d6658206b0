"""One setting of a benchmark, measured; and the settings that a sweep makes of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mrla.data.randomness import derive_seed, seeded
from mrla.messages.one_line import one_line
from mrla.messages.suggestions import nearest

from .arms import Arm, at_depth, build_network, calibrate_bn, image_shape, read_arm, wants_numba
from .blocks import block_at, longest_chain
from .candidates import DTYPES, MemoryFormat, Objective, Work, classify, compiling, prepare, pull
from .rounds import Quantity, measure_memory, summarise, time_rounds

SWEEPS = {"batch": (1, 8, 32, 128), "depth": (18, 34, 50, 101, 152), "resolution": (), "blocks": (1, 2, 4, 8, 16)}
"""What may be varied, and the values if none are given; image sizes are multiples of the network's own."""
_SETTLING = 8
"""Images that BatchNorms take their statistics from; however many are timed, the network is the same."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is measured, and how; the arguments of `benchmark`, checked."""

    model: str | nn.Module
    arms: tuple[Arm, ...]
    quantities: tuple[Quantity, ...]
    image_size: int | None
    in_chans: int | None
    batch_size: int
    rounds: int
    warmup: int
    dtype: str
    memory_format: MemoryFormat
    device: torch.device
    threads: int
    seed: int = 0
    position: int | None = None

    @property
    def model_name(self) -> str:
        """The model's name, or the class of one that the caller made."""
        return self.model if isinstance(self.model, str) else type(self.model).__name__


def sweep_settings(
    setting: Setting, sweep: str | None, values: Sequence[int] | None
) -> list[tuple[int | None, Setting]]:
    """The settings of a sweep, each with the value that makes it.

    Args:
        setting: What all have in common.
        sweep: What is varied; None for the one setting.
        values: What it is given; the sweep's own if None.

    Returns:
        Values and settings in the order of the values; one setting with the value None without a sweep.

    Raises:
        ValueError: If there is no such sweep, or the model or an arm has no such value.
    """
    if sweep is None:
        if values is not None:
            raise ValueError(
                f"values are those of a sweep: got {list(values)} and no sweep; give --sweep, or no values"
            )
        return [(None, setting)]
    if sweep not in SWEEPS:
        raise ValueError(f"sweep must be one of {', '.join(SWEEPS)}: got {sweep!r}{nearest(sweep, SWEEPS)}")
    chosen = tuple(SWEEPS[sweep] or _sizes(setting)) if values is None else tuple(values)
    if not chosen or len(set(chosen)) != len(chosen) or min(chosen) < 1:
        given = ", ".join(map(str, chosen)) or "none"
        raise ValueError(f"values must be different positive numbers: got {given}; such as --values 1,8,64")
    return [(value, _varied(setting, sweep, value)) for value in chosen]


def measure_point(setting: Setting, on_round: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Builds every arm of a setting and measures it.

    Args:
        setting: The setting.
        on_round: Called after each round, those that warm up included.

    Returns:
        ``input_shape``, ``needs_numba``, ``results`` by arm and the seconds of all ``rounds``; for a block also its
        name.

    Raises:
        ValueError: If an arm does not run.
    """
    block = None
    if setting.position is None:
        networks, images, objective = _networks(setting)
    else:
        networks, images, objective, block = _blocks(setting)
    work = Work(images=images, objective=objective, threads=setting.threads)
    training = bool({"training", "memory"} & set(setting.quantities))
    with compiling(setting.arms):
        candidates = {arm.name: prepare(arm, networks[arm.network], work, training=training) for arm in setting.arms}
        memory = {}
        if "memory" in setting.quantities:
            memory = {name: measure_memory(candidate, setting.device) for name, candidate in candidates.items()}
        rounds = time_rounds(
            candidates,
            setting.quantities,
            setting.device,
            rounds=setting.rounds,
            warmup=setting.warmup,
            on_round=on_round,
        )
    return {
        "input_shape": list(images.shape),
        **({} if block is None else {"block": block}),
        "needs_numba": setting.device.type == "cpu"
        and wants_numba(setting.arms, [networks[arm.network] for arm in setting.arms]),
        "results": summarise(candidates, rounds, memory, len(images)),
        "rounds": rounds,
    }


def _varied(setting: Setting, sweep: str, value: int) -> Setting:
    if sweep == "batch":
        return replace(setting, batch_size=value)
    if sweep == "resolution":
        return replace(setting, image_size=value)
    if sweep == "blocks":
        for arm in setting.arms:
            if not arm.of_model or set(arm.states) - {"reference"}:
                raise ValueError(
                    f"a sweep over blocks times plain or a method, as it is or with the state reference: got "
                    f"{arm.name!r}; leave it out"
                )
        return replace(setting, position=value)
    if not isinstance(setting.model, str):
        raise ValueError(f"a sweep over depth needs a ResNet by name: got a {setting.model_name} of your own")
    arms = [arm if arm.of_model else _arm_at_depth(arm, value) for arm in setting.arms]
    of_model = any(arm.of_model for arm in arms)
    return replace(setting, model=at_depth(setting.model, value) if of_model else setting.model, arms=tuple(arms))


def _arm_at_depth(arm: Arm, depth: int) -> Arm:
    name = at_depth(arm.network, depth)
    label = name.replace(f"resnet{depth}", "resnet*")  # one name over the sweep, though the network changes
    return replace(read_arm("+".join((name, *arm.states))), name="+".join((label, *arm.states)))


def _sizes(setting: Setting) -> list[int]:
    own = image_shape(_built(setting, setting.arms[0]))[1]
    return [own // 2, own, 3 * own // 2, 2 * own]


def _built(setting: Setting, arm: Arm) -> nn.Module:
    return build_network(arm.network, setting.model, in_chans=setting.in_chans, seed=setting.seed)


def _image_shape(setting: Setting, network: nn.Module) -> tuple[int, ...]:
    channels, *own = image_shape(network)
    return (channels, *((setting.image_size,) * 2 if setting.image_size is not None else own))


def _random(setting: Setting, *shape: int) -> Tensor:
    with seeded(derive_seed(setting.seed, "bench", "images")):
        return torch.randn(shape).to(setting.device)


def _placed(setting: Setting, tensor: Tensor) -> Tensor:
    tensor = tensor.to(DTYPES[setting.dtype])
    channels_last = setting.memory_format == "channels_last" and tensor.ndim == 4
    return tensor.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def _ready(setting: Setting, network: nn.Module, images: Tensor) -> nn.Module:
    """The network where and as it is to be timed, with statistics that some images give."""
    calibrate_bn(network.to(device=setting.device, dtype=torch.float32), images)
    network.to(dtype=DTYPES[setting.dtype])
    if setting.memory_format == "channels_last":
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network


def _networks(setting: Setting) -> tuple[dict[str, nn.Module], Tensor, Objective]:
    networks: dict[str, nn.Module] = {}
    shape: tuple[int, ...] = ()
    for arm in setting.arms:
        if arm.network in networks:
            continue
        network = _built(setting, arm)
        shape = shape or _image_shape(setting, network)
        settling = _random(setting, _SETTLING, *shape)
        try:
            networks[arm.network] = _ready(setting, network, settling)
        except (RuntimeError, ValueError, TypeError, AssertionError) as error:
            size = "x".join(map(str, shape))
            raise ValueError(
                f"the arm {arm.name} does not run on {size} images ({type(error).__name__}: "
                f"{one_line(error, 200)}); choose another image size"
            ) from error
    images = _placed(setting, _random(setting, setting.batch_size, *shape))
    with seeded(derive_seed(setting.seed, "bench", "labels")):
        labels = torch.randint(2**31, (setting.batch_size,)).to(setting.device)
    return networks, images, classify(labels)


def _blocks(setting: Setting) -> tuple[dict[str, nn.Module], Tensor, Objective, str]:
    assert setting.position is not None
    networks: dict[str, nn.Module] = {}
    plain = build_network("plain", setting.model, in_chans=setting.in_chans, seed=setting.seed)
    chain, name = longest_chain(plain, (setting.batch_size, *_image_shape(setting, plain)))
    x = _random(setting, setting.batch_size, *chain.shape[1:])
    for arm in setting.arms:
        if arm.network not in networks:
            plain = build_network("plain", setting.model, in_chans=setting.in_chans, seed=setting.seed)
            block = block_at(plain, chain, name, arm.network, setting.position, x, seed=setting.seed)
            networks[arm.network] = _ready(setting, block, x)
    x = _placed(setting, x)
    # It comes from the blocks that follow, and is laid out as the output is.
    return networks, x, pull(x.roll(1, 0)), f"{chain.name}.{name}"
