"""ResNets by name in timm's registry: with MRLA-light, and the notebook's for 32x32 images with their plain twins."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, get_arch_pretrained_cfgs, register_model
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn

from .attachment import attach
from .initialisation import initialise_as_notebook
from .stage import MIXER

_BACKBONES: dict[str, dict[str, Any]] = {
    "resnet18": dict(block=BasicBlock, layers=(2, 2, 2, 2)),
    "resnet34": dict(block=BasicBlock, layers=(3, 4, 6, 3)),
    "resnet50": dict(block=Bottleneck, layers=(3, 4, 6, 3)),
    "resnet101": dict(block=Bottleneck, layers=(3, 4, 23, 3)),
    "resnet152": dict(block=Bottleneck, layers=(3, 8, 36, 3)),
    "resnext50_32x4d": dict(block=Bottleneck, layers=(3, 4, 6, 3), cardinality=32, base_width=4),
    "wide_resnet50_2": dict(block=Bottleneck, layers=(3, 4, 6, 3), base_width=128),
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
    init: str = "released",
    mixer: Mapping[str, Any] | None = None,
    **resnet_args: Any,
) -> ResNet:
    """A timm ResNet, with the notebook's stem if asked, and a mixer on every block if asked.

    Args:
        method: Method of the mixers, or None for the plain network.
        small_images: Whether the stem is one 3x3 convolution of stride 1 with no max-pool, for 32x32 images.
        init: ``"released"``, ``"notebook"`` (the whole network) or ``"identity"``, as in `mrla.attach`.
        mixer: Further arguments of `mrla.attach`, such as ``{"head_dim": 16, "drop_path": 0.2}``.
        resnet_args: Arguments of timm's `ResNet`.

    Returns:
        The network, with `feature_info` true for its stem.

    Raises:
        ValueError: If `init` or a mixer's option is not one of those named, or `mixer` is given without a method.
    """
    if init not in ("released", "notebook", "identity"):
        raise ValueError(f"init must be 'released', 'notebook' or 'identity': got {init!r}")
    if mixer and method is None:
        raise ValueError(f"mixer needs a network with mixers, this one is plain: got mixer={dict(mixer)}; leave it out")
    model = ResNet(**resnet_args)
    if small_images:
        _use_small_stem(model)
    if method is not None:
        attach(model, method, init=init, **(mixer or {}))
    if init == "notebook":
        initialise_as_notebook(model)
    return model


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


def _keep_new_parameters(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A plain network's weights, filled up with the mixers' own, so that loading may stay strict."""
    own = {name: tensor for name, tensor in model.state_dict().items() if MIXER in name.split(".")}
    return {**own, **state_dict}


def _build(name: str, pretrained: bool, arguments: dict[str, Any], overrides: dict[str, Any]) -> Any:
    if pretrained:
        overrides.setdefault("init", "identity")
    return build_model_with_cfg(
        build_resnet,  # type: ignore[arg-type]
        name,
        pretrained,
        pretrained_filter_fn=_keep_new_parameters,
        **{**arguments, **overrides},
    )


def _register(name: str, description: str, **arguments: Any) -> None:
    def entrypoint(pretrained: bool = False, **overrides: Any) -> nn.Module:  # timm's wrapper with features_only
        return _build(name, pretrained, arguments, overrides)

    entrypoint.__name__ = entrypoint.__qualname__ = name
    entrypoint.__doc__ = f"{description} Arguments: timm's `ResNet`, `init` and `mixer` of `build_resnet`."
    globals()[name] = register_model(entrypoint)


def _plain_weights(backbone: str) -> dict[str, Any]:
    """Every set of plain weights that timm has for `backbone`, under the name of the attached network."""
    configs = {}
    for tagged, config in get_arch_pretrained_cfgs(backbone).items():
        # timm has completed "timm/" to the plain network's repository, which is where the weights are.
        configs[tagged.replace(backbone, f"{backbone}_mrla_light", 1)] = replace(config, architecture=None, tag=None)
    return configs


default_cfgs = generate_default_cfgs(
    {
        **{tagged: config for backbone in _BACKBONES for tagged, config in _plain_weights(backbone).items()},
        **{f"{backbone}_cifar": dict(_CIFAR) for backbone in _BACKBONES},
        **{f"{backbone}_cifar_mrla_light": dict(_CIFAR) for backbone in _BACKBONES},
        **{f"{twin}_mrla_light": dict(_NO_WEIGHTS) for twin in _TINY},
        **{f"{twin}_cifar_mrla_light": dict(_CIFAR) for twin in _TINY},
    }
)

for _name, _numbers in {**_BACKBONES, **_TINY}.items():
    if _name in _BACKBONES:
        _register(f"{_name}_cifar", f"{_name} with a stem for 32x32 images.", **_numbers, small_images=True)
    _register(
        f"{_name}_mrla_light",
        f"{_name} with MRLA-light after every block (arXiv:2302.03985).",
        **_numbers,
        method="light",
    )
    _register(
        f"{_name}_cifar_mrla_light",
        f"{_name} with a stem for 32x32 images and MRLA-light after every block.",
        **_numbers,
        small_images=True,
        method="light",
    )
