"""DeiT by name in timm's registry, with MRLA as it was released for it."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

from ..attachment import attach
from .registration import TITLES, register, weights_of

_SIZES: dict[str, dict[str, Any]] = {
    "tiny": dict(embed_dim=192, num_heads=3),
    "small": dict(embed_dim=384, num_heads=6),
    "base": dict(embed_dim=768, num_heads=12),
}
_TINY: dict[str, Any] = dict(patch_size=8, embed_dim=32, depth=6, num_heads=2)
_RELEASED: dict[str, dict[str, Any]] = {
    "light": dict(norm="pre_layer", value_act="gelu", head_dim=16),
    "base": dict(norm="pre_layer", out_act=None, head_dim=16, chain_length=4),
}
"""What `mrla.attach` is called with to get the released form (facts.md, section 2)."""


def build_deit(
    *,
    method: str,
    distilled: bool = False,
    init: str = "released",
    mixer: Mapping[str, Any] | None = None,
    **vit_args: Any,
) -> VisionTransformer:
    """A timm vision transformer with the released form of MRLA after every block.

    light: LayerNorm on the block's output and on its input, GELU on the value, heads of width 16; base: LayerNorm on
    the output, memory begun anew every 4 blocks. No norm and no DropPath after; a prefix token gets + LN(token). The
    released code fails for distilled networks and grids that are not square; this does not.

    Args:
        method: ``"light"``, ``"base"`` or another method of `mrla.attach`.
        distilled: Whether there is a distillation token and its head.
        init: ``"released"`` or ``"identity"``, as in `mrla.attach`.
        mixer: Further arguments of `mrla.attach`, over the released ones.
        vit_args: Arguments of timm's `VisionTransformer`; `img_size` and `dynamic_img_size` among them.

    Returns:
        The network.

    Raises:
        ValueError: If a mixer's option does not fit.

    Example:
        >>> import torch
        >>> small = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
        >>> model = build_deit(method="light", num_classes=3, **small)
        >>> tuple(model(torch.randn(1, 3, 32, 32)).shape)
        (1, 3)
    """
    model = (VisionTransformerDistilled if distilled else VisionTransformer)(**vit_args)
    return attach(model, method, init=init, **{**_RELEASED.get(method, {}), **(mixer or {})})


for _method, _title in TITLES.items():
    for _middle, _distilled in (("", False), ("_distilled", True)):
        for _size, _numbers in _SIZES.items():
            _plain = f"deit_{_size}{_middle}_patch16_224"
            _name = f"{_plain}_mrla_{_method}"
            register(
                _name,
                build_deit,
                f"{_plain} with {_title} after every block, in the released form.",
                weights_of(_plain, _name),
                arguments=dict(patch_size=16, depth=12, **_numbers, method=_method, distilled=_distilled),
                pretrained_filter=partial(checkpoint_filter_fn, adapt_layer_scale=True),
                feature_cfg=dict(out_indices=3, feature_cls="getter"),
            )
        _name = f"test_deit{_middle}_mrla_{_method}"
        register(
            _name,
            build_deit,
            f"A tiny twin of the DeiT with {_title}.",
            {
                _name: dict(
                    num_classes=1000,
                    input_size=(3, 64, 64),
                    fixed_input_size=True,
                    first_conv="patch_embed.proj",
                    classifier=("head", "head_dist") if _distilled else "head",
                )
            },
            arguments=dict(_TINY, img_size=64, method=_method, distilled=_distilled),
            feature_cfg=dict(out_indices=3, feature_cls="getter"),
        )
