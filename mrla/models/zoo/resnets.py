"""ResNets by name in timm's registry: with MRLA, and the notebook's for 32x32 images with their plain twins."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from timm.layers import EcaModule, SEModule
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import nn

from ..attachment import attach
from .initialisation import initialise_as_notebook
from .registration import TITLES, register, weights_of

_BACKBONES: dict[str, dict[str, Any]] = {
    "resnet18": dict(block=BasicBlock, layers=(2, 2, 2, 2)),
    "resnet34": dict(block=BasicBlock, layers=(3, 4, 6, 3)),
    "resnet50": dict(block=Bottleneck, layers=(3, 4, 6, 3)),
    "resnet101": dict(block=Bottleneck, layers=(3, 4, 23, 3)),
    "resnet152": dict(block=Bottleneck, layers=(3, 8, 36, 3)),
    "resnext50_32x4d": dict(block=Bottleneck, layers=(3, 4, 6, 3), cardinality=32, base_width=4),
    "wide_resnet50_2": dict(block=Bottleneck, layers=(3, 4, 6, 3), base_width=128),
}
# The released base networks have three 3x3 convolutions in place of the 7x7 one, as timm's resnet50c.
_DEEP_STEM: dict[str, dict[str, Any]] = {
    "resnet50c": dict(_BACKBONES["resnet50"], stem_width=32, stem_type="deep"),
    "resnet101c": dict(_BACKBONES["resnet101"], stem_width=32, stem_type="deep"),
}
# Twins small enough to test every promise on: one per kind of block, two blocks a stage so that memory is handed on.
_TINY: dict[str, dict[str, Any]] = {
    "test_resnet_basic": dict(block=BasicBlock, layers=(2, 2, 2, 2), channels=(16, 24, 32, 48)),
    "test_resnet_bottleneck": dict(block=Bottleneck, layers=(2, 2, 2, 2), channels=(8, 8, 16, 16)),
    "test_resnext": dict(block=Bottleneck, layers=(2, 2, 2, 2), channels=(8, 8, 16, 16), cardinality=4, base_width=32),
}
_NO_WEIGHTS: dict[str, Any] = dict(
    num_classes=1000, input_size=(3, 224, 224), pool_size=(7, 7), first_conv="conv1", classifier="fc"
)
_CIFAR: dict[str, Any] = dict(
    num_classes=10,
    input_size=(3, 32, 32),
    pool_size=(4, 4),
    crop_pct=1.0,
    interpolation="bilinear",
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    first_conv="conv1",
    classifier="fc",
)


def build_resnet(
    *,
    method: str | None = None,
    small_images: bool = False,
    se: bool = False,
    eca: Sequence[int] = (),
    init: str = "released",
    mixer: Mapping[str, Any] | None = None,
    **resnet_args: Any,
) -> ResNet:
    """A timm ResNet, with the notebook's stem if asked, and a mixer on every block if asked.

    Args:
        method: Method of the mixers, or None for the plain network.
        small_images: Whether the stem is one 3x3 convolution of stride 1 with no max-pool, for 32x32 images.
        se: Whether every block's branch ends in squeeze-and-excitation as released: reduction 16, no biases. (timm's
            own, with biases, is ``block_args={"attn_layer": "se"}``.)
        eca: Kernel sizes of efficient channel attention at the end of every block's branch, one for each stage, such
            as (5, 5, 5, 7); empty for none.
        init: ``"released"``, ``"notebook"`` (the whole network) or ``"identity"``, as in `mrla.attach`.
        mixer: Further arguments of `mrla.attach`, such as ``{"head_dim": 16, "drop_path": 0.2}``.
        resnet_args: Arguments of timm's `ResNet`.

    Returns:
        The network, with `feature_info` true for its stem.

    Raises:
        ValueError: If `init`, `eca` or a mixer's option does not fit, both `se` and `eca` are given, or `mixer` without
            a method.

    Example:
        >>> import torch
        >>> from timm.models.resnet import BasicBlock
        >>> small = {"block": BasicBlock, "layers": (1, 1, 1, 1), "channels": (8, 8, 8, 8)}
        >>> model = build_resnet(method="light", small_images=True, num_classes=3, **small)
        >>> tuple(model(torch.randn(1, 3, 32, 32)).shape)
        (1, 3)
    """
    if init not in ("released", "notebook", "identity"):
        raise ValueError(f"init must be 'released', 'notebook' or 'identity': got {init!r}")
    if mixer and method is None:
        raise ValueError(f"mixer needs a network with mixers, this one is plain: got mixer={dict(mixer)}; leave it out")
    if se and eca:
        raise ValueError(f"a block's branch has one channel attention: got se={se} and eca={tuple(eca)}; give one")
    if se:
        # One hidden channel at least, and the released reduction exactly: timm's default rounds to eights.
        released = partial(SEModule, rd_ratio=1 / 16, rd_divisor=1, bias=False)
        resnet_args["block_args"] = {**(resnet_args.get("block_args") or {}), "attn_layer": released}
    model = ResNet(**resnet_args)
    if eca:
        _add_eca(model, eca)
    if small_images:
        _use_small_stem(model)
    if method is not None:
        attach(model, method, init=init, **(mixer or {}))
    if init == "notebook":
        initialise_as_notebook(model)
    return model


def _add_eca(model: ResNet, kernel_sizes: Sequence[int]) -> None:
    stages = [stage for name, stage in model.named_children() if name.startswith("layer")]
    if len(kernel_sizes) != len(stages) or any(size < 1 or size % 2 == 0 for size in kernel_sizes):
        raise ValueError(
            f"eca gives one odd kernel size for each of the {len(stages)} stages, such as (5, 5, 5, 7): "
            f"got {tuple(kernel_sizes)}"
        )
    for stage, kernel_size in zip(stages, kernel_sizes, strict=True):
        for block in stage.children():
            reference = next(block.parameters())
            block.se = EcaModule(kernel_size=kernel_size, device=reference.device, dtype=reference.dtype)


def _use_small_stem(model: ResNet) -> None:
    assert isinstance(model.conv1, nn.Conv2d)
    model.conv1 = nn.Conv2d(
        model.conv1.in_channels,
        model.conv1.out_channels,
        kernel_size=3,
        padding=1,
        bias=False,
        device=model.conv1.weight.device,
        dtype=model.conv1.weight.dtype,
    )
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()
    for info in model.feature_info:
        info["reduction"] = int(info["reduction"]) // (2 if info["module"] == "act1" else 4)


for _name, _numbers in {**_BACKBONES, **_DEEP_STEM, **_TINY}.items():
    if _name in _BACKBONES:
        register(
            f"{_name}_cifar",
            build_resnet,
            f"{_name} with a stem for 32x32 images.",
            {f"{_name}_cifar": _CIFAR},
            arguments=dict(_numbers, small_images=True),
        )
    for _method, _title in TITLES.items():
        _attached = f"{_name}_mrla_{_method}"
        register(
            _attached,
            build_resnet,
            f"{_name} with {_title} after every block (arXiv:2302.03985).",
            weights_of(_name, _attached) or {_attached: _NO_WEIGHTS},
            arguments=dict(_numbers, method=_method),
        )
        if _name not in _DEEP_STEM:
            _small = f"{_name}_cifar_mrla_{_method}"
            register(
                _small,
                build_resnet,
                f"{_name} with a stem for 32x32 images and {_title} after every block.",
                {_small: _CIFAR},
                arguments=dict(_numbers, small_images=True, method=_method),
            )
