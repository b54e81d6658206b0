"""EfficientNet by name in timm's registry, with MRLA on its blocks with a residual."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from timm.models._efficientnet_builder import decode_arch_def, resolve_act_layer, resolve_bn_args, round_channels
from timm.models.efficientnet import EfficientNet
from torch import nn

from ..attachment import attach
from .registration import TITLES, register, weights_of

# EfficientNet-B0 (arXiv:1905.11946, table 1) in timm's notation, and a twin of two residual blocks a stage.
_B0 = (
    "ds_r1_k3_s1_e1_c16_se0.25",
    "ir_r2_k3_s2_e6_c24_se0.25",
    "ir_r2_k5_s2_e6_c40_se0.25",
    "ir_r3_k3_s2_e6_c80_se0.25",
    "ir_r3_k5_s1_e6_c112_se0.25",
    "ir_r4_k5_s2_e6_c192_se0.25",
    "ir_r1_k3_s1_e6_c320_se0.25",
)
_TINY = (
    "ds_r1_k3_s1_e1_c8",
    "ir_r3_k3_s2_e2_c16_se0.25",
    "ir_r3_k5_s2_e2_c24_se0.25",
    "ir_r2_k3_s2_e2_c24",
    "ir_r1_k3_s2_e2_c32",
)


def build_efficientnet(
    *,
    method: str,
    stages: Sequence[str],
    init: str = "released",
    mixer: Mapping[str, Any] | None = None,
    **efficientnet_args: Any,
) -> EfficientNet:
    """A timm EfficientNet with a mixer on every block that has a residual, 8 heads each, as released.

    Args:
        method: Method of the mixers.
        stages: The stages in timm's notation, such as ``"ir_r2_k3_s2_e6_c24_se0.25"``.
        init: ``"released"`` or ``"identity"``, as in `mrla.attach`.
        mixer: Further arguments of `mrla.attach`.
        efficientnet_args: Arguments of timm's `EfficientNet`.

    Returns:
        The network.

    Raises:
        ValueError: If a mixer's option does not fit.

    Example:
        It is what the named networks are made by::

            model = timm.create_model("efficientnet_b0_mrla_light")
    """
    act_layer = resolve_act_layer(efficientnet_args, "swish")
    batch_norm = partial(nn.BatchNorm2d, **resolve_bn_args(efficientnet_args))
    model = EfficientNet(
        block_args=decode_arch_def([[stage] for stage in stages]),
        round_chs_fn=partial(round_channels, multiplier=1.0, divisor=8),
        act_layer=act_layer,
        norm_layer=efficientnet_args.pop("norm_layer", None) or batch_norm,
        **efficientnet_args,
    )
    chosen = dict(mixer or {})
    if "head_dim" not in chosen and method != "dw":
        chosen.setdefault("heads", 8)
    return attach(model, method, init=init, **chosen)


for _method, _title in TITLES.items():
    _name = f"efficientnet_b0_mrla_{_method}"
    register(
        _name,
        build_efficientnet,
        f"EfficientNet-B0 with {_title} on its blocks with a residual.",
        weights_of("efficientnet_b0", _name),
        arguments=dict(method=_method, stages=_B0, num_features=1280, stem_size=32),
        feature_cfg=dict(feature_cls="getter"),
    )
    _name = f"test_efficientnet_mrla_{_method}"
    register(
        _name,
        build_efficientnet,
        f"A tiny twin of the EfficientNet with {_title}.",
        {
            _name: dict(
                num_classes=1000,
                input_size=(3, 64, 64),
                pool_size=(2, 2),
                first_conv="conv_stem",
                classifier="classifier",
            )
        },
        arguments=dict(method=_method, stages=_TINY, num_features=64, stem_size=8),
        feature_cfg=dict(feature_cls="getter"),
    )
