"""A recipe: everything that decides a training run, as frozen data, checked when it is made."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mrla.data.sources import DataSource, kinds_for, source_class
from mrla.messages.suggestions import nearest

from .arm_names import parse_arm

MOST_PROCESSES = 1024
"""Of devices, machines, threads or runs at once: a slip of the pen would start them all."""


@dataclass(frozen=True, kw_only=True)
class MixerOptions:
    """How the mixers of an arm are built; see `mrla.attach`.

    Attributes:
        head_dim: Channels per head; the method's own where neither this nor `heads` is given.
        heads: Number of heads, in place of `head_dim`.
        carry: What light's lambda multiplies: ``shortcut`` (released code, notebook) or ``output`` (the paper's text).
        norm: Norm of the mixer's branch: ``batch`` or ``layer``; None for the kind of network, ``batch`` for a ResNet.
        drop_path: Probability of leaving a mixer's branch out for an image, in training.
    """

    head_dim: int | None = None
    heads: int | None = None
    carry: Literal["shortcut", "output"] = "shortcut"
    norm: Literal["batch", "layer"] | None = None
    drop_path: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Optim:
    """Optimizer and learning rate.

    Attributes:
        name: ``sgd`` or ``adamw``.
        lr: Learning rate after the warm-up.
        momentum: SGD's momentum.
        betas: AdamW's decay rates of its two moments.
        weight_decay: Weight decay.
        decay_vectors: Whether norms, biases and lambda are decayed too, as in the released code and the notebook.
        schedule: ``multistep``, ``cosine`` (to `min_lr`) or ``constant``.
        milestones: Epochs after which ``multistep`` multiplies by `gamma`.
        gamma: Factor at each milestone.
        min_lr: Learning rate at the end of ``cosine``.
        warmup_epochs: Epochs in which the learning rate grows linearly from a hundredth.
        clip_grad_norm: Largest norm of the gradient, or None for no clipping.
        frozen_epochs: First epochs in which only mixers and classifier are trained and the rest stays as it is.
        old_lr_scale: Learning rate of all but mixers and classifier, as a multiple of `lr`.
    """

    name: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 1e-4
    decay_vectors: bool = True
    schedule: Literal["multistep", "cosine", "constant"] = "cosine"
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1
    min_lr: float = 0.0
    warmup_epochs: int = 0
    clip_grad_norm: float | None = None
    frozen_epochs: int = 0
    old_lr_scale: float = 1.0

    def __post_init__(self):
        _check_choice("optim.name", self.name, ("sgd", "adamw"))
        _check_choice("optim.schedule", self.schedule, ("multistep", "cosine", "constant"))
        _check("optim.lr", self.lr, self.lr > 0, "positive")
        _check("optim.weight_decay", self.weight_decay, self.weight_decay >= 0, "zero or more")
        _check("optim.momentum", self.momentum, 0 <= self.momentum < 1, "in [0, 1)")
        _check("optim.warmup_epochs", self.warmup_epochs, self.warmup_epochs >= 0, "zero or more")
        _check("optim.milestones", self.milestones, all(m > 0 for m in self.milestones), "positive epochs")
        _check("optim.min_lr", self.min_lr, 0 <= self.min_lr <= self.lr, f"between 0 and optim.lr={self.lr}")
        clip = self.clip_grad_norm
        _check("optim.clip_grad_norm", clip, clip is None or clip > 0, "positive")
        _check("optim.frozen_epochs", self.frozen_epochs, self.frozen_epochs >= 0, "zero or more")
        _check("optim.old_lr_scale", self.old_lr_scale, self.old_lr_scale > 0, "positive")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where and how a run is computed; handed to Lightning's Trainer.

    Attributes:
        accelerator: ``auto``, ``cpu``, ``gpu``, ``mps``, ...
        devices: Number of devices on each node, or ``auto``.
        nodes: Number of nodes.
        strategy: ``auto``, ``ddp``, ``fsdp``, ...
        precision: ``32-true``, ``bf16-mixed``, ``16-mixed``, ...
        sync_batchnorm: Whether BatchNorm's statistics are taken over all devices (not on a CPU).
        threads: Threads of the CPU for each process, or None for torch's own choice. Results are equal bit for bit only
            for an equal number.
    """

    accelerator: str = "auto"
    devices: int | Literal["auto"] = 1
    nodes: int = 1
    strategy: str = "auto"
    precision: str = "32-true"
    sync_batchnorm: bool = False
    threads: int | None = None

    def __post_init__(self):
        few, rule = range(1, MOST_PROCESSES + 1), f"from 1 to {MOST_PROCESSES}"
        _check(
            "machine.devices", self.devices, self.devices == "auto" or int(self.devices) in few, f"{rule}, or 'auto'"
        )
        _check("machine.nodes", self.nodes, self.nodes in few, rule)
        _check("machine.threads", self.threads, self.threads is None or self.threads in few, rule)


@dataclass(frozen=True, kw_only=True)
class DetectorOptions:
    """What is built on the network to find objects; see `mrla.dense.detector`.

    Attributes:
        name: ``faster_rcnn``, ``mask_rcnn``, ``retinanet`` or ``fcos``.
        min_size: What an image's shorter side is brought to, in pixels.
        max_size: What its longer side must not exceed.
        freeze_stages: Stages of the network that stay as they are: 0 the stem, 1 one stage too, -1 none.
        norm_eval: Whether its BatchNorms stay in eval mode.
        fpn_channels: Width of the feature pyramid.
        options: Further arguments of `mrla.dense.detector`, such as ``{"box_head_dim": 256}``.
    """

    name: Literal["faster_rcnn", "mask_rcnn", "retinanet", "fcos"] = "faster_rcnn"
    min_size: int = 800
    max_size: int = 1333
    freeze_stages: int = 1
    norm_eval: bool = True
    fpn_channels: int = 256
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        _check_choice("detector.name", self.name, ("faster_rcnn", "mask_rcnn", "retinanet", "fcos"))

    @property
    def has_masks(self) -> bool:
        """Whether it predicts masks."""
        return self.name == "mask_rcnn"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides a training run.

    Attributes:
        recipe: Name of the recipe that it started from.
        model: Name of the plain network in timm's registry, torchvision's after ``torchvision/``, or a folder that
            `mrla.save` or a run has written, or ``hf-hub:owner/name``: it then starts from the weights there.
        model_args: Further arguments of the network, such as ``{"channels": [16, 32, 64, 128]}``.
        pretrained: Whether a network given by name starts from the weights that timm or torchvision publish.
        arm: What is trained: ``plain``; ``light``, ``base``, ``exact``, ``dw`` or a method of your own attached to it,
            with options as in ``base:last=3``; or with timm's ``eca`` or ``se`` in it.
        init: How the weights start: ``released``, ``notebook`` (the whole network), or ``identity`` (mixers that change
            nothing at first).
        mixer: How the mixers are built.
        data: The images.
        detector: What finds objects on the network; None for classification.
        optim: Optimizer and learning rate.
        epochs: Passes over the training part.
        batch_size: Images in one step, over all devices.
        label_smoothing: Smoothing of the labels in training.
        smooth_validation: Whether the validation loss is smoothed too, as the notebook does.
        ema_decay: Decay of the moving average of the weights that is validated and saved, or None for none.
        seed: Decides the starting weights, the order of the data and every augmentation.
        machine: Where and how it is computed.
    """

    recipe: str
    model: str
    model_args: dict[str, Any] = field(default_factory=dict)
    pretrained: bool = False
    arm: str = "light"
    init: Literal["released", "notebook", "identity"] = "released"
    mixer: MixerOptions = field(default_factory=MixerOptions)
    data: DataSource
    detector: DetectorOptions | None = None
    optim: Optim = field(default_factory=Optim)
    epochs: int
    batch_size: int
    label_smoothing: float = 0.0
    smooth_validation: bool = False
    ema_decay: float | None = None
    seed: int = 0
    machine: Machine = field(default_factory=Machine)

    def __post_init__(self):
        check_numbers(
            epochs=self.epochs,
            optim=self.optim,
            label_smoothing=self.label_smoothing,
            ema_decay=self.ema_decay,
            seed=self.seed,
        )
        _check("batch_size", self.batch_size, self.batch_size > 0, "positive")
        parse_arm(self.arm)
        _check_choice("init", self.init, ("released", "notebook", "identity"))
        what = "for classification" if self.detector is None else "for a detector"
        kinds = ", ".join(kinds_for(self.task))
        _check("data.kind", self.data.kind, self.data.task == self.task, f"one of {kinds} {what}")
        if self.detector is not None and self.detector.has_masks:
            _check("data", self.data.kind, self.data.has_masks, "images whose objects have masks, for mask_rcnn")

    @property
    def task(self) -> str:
        """What is trained for: ``classification``, or ``detection`` where there is a detector."""
        return "classification" if self.detector is None else "detection"


def as_dict(recipe: Recipe) -> dict[str, Any]:
    """A recipe as plain containers, for JSON and for comparing two of them."""
    return _plain(dataclasses.asdict(recipe))


def from_dict(settings: Mapping[str, Any]) -> Recipe:
    """The recipe that `as_dict` made plain containers of.

    Args:
        settings: Every field of a `Recipe`.

    Returns:
        The recipe; its fields are checked anew.

    Raises:
        ValueError: If a field is missing, unknown or out of range.

    Example:
        >>> from mrla.train.recipes import digits_resnet18
        >>> from_dict(as_dict(digits_resnet18())) == digits_resnet18()
        True
    """
    parts: dict[str, Any] = {"mixer": MixerOptions, "optim": Optim, "machine": Machine, "detector": DetectorOptions}
    try:
        parts["data"] = source_class(settings["data"]["kind"])
        fields: dict[str, Any] = {
            name: _rebuild(parts[name], value) if name in parts and value is not None else value
            for name, value in settings.items()
        }
        return Recipe(**fields)
    except (KeyError, TypeError) as error:
        raise ValueError(f"the settings must be those of a recipe of this version: {error}") from error


def _rebuild(kind: Any, fields: Mapping[str, Any]) -> Any:
    # JSON has lists where the dataclasses have tuples.
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()})


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def check_numbers(*, epochs: int, optim: Optim, label_smoothing: float, ema_decay: float | None, seed: int) -> None:
    """Refuses a run's numbers that are out of range, whether they come from a recipe or from Python.

    Raises:
        ValueError: With the number's name, its rule and what was given.
    """
    _check("epochs", epochs, epochs > 0, "positive")
    _check("label_smoothing", label_smoothing, 0 <= label_smoothing < 1, "in [0, 1)")
    _check("ema_decay", ema_decay, ema_decay is None or 0 < ema_decay < 1, "in (0, 1)")
    _check("seed", seed, seed >= 0, "zero or more")
    warmup = optim.warmup_epochs
    _check("optim.warmup_epochs", warmup, warmup < epochs, f"fewer than epochs={epochs}, such as 0")
    frozen = optim.frozen_epochs
    _check("optim.frozen_epochs", frozen, frozen < epochs, f"fewer than epochs={epochs}, such as 0")


def _check(name: str, given: Any, holds: bool, rule: str) -> None:
    if not holds:
        raise ValueError(f"{name} must be {rule}: got {given}")


def _check_choice(name: str, given: str, choices: tuple[str, ...]) -> None:
    _check(name, given, given in choices, f"one of {', '.join(choices)}{nearest(given, choices)}")
