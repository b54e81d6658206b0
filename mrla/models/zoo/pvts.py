"""PVT v2 by name in timm's registry, with MRLA after every block."""

from collections.abc import Mapping
from typing import Any

from timm.models.pvt_v2 import PyramidVisionTransformerV2, checkpoint_filter_fn

from ..attachment import attach
from .registration import TITLES, register, weights_of

_SIZES: dict[str, dict[str, Any]] = {
    "pvt_v2_b0": dict(depths=(2, 2, 2, 2), embed_dims=(32, 64, 160, 256), num_heads=(1, 2, 5, 8)),
    "pvt_v2_b1": dict(depths=(2, 2, 2, 2), embed_dims=(64, 128, 320, 512), num_heads=(1, 2, 5, 8)),
    "pvt_v2_b2": dict(depths=(3, 4, 6, 3), embed_dims=(64, 128, 320, 512), num_heads=(1, 2, 5, 8)),
}
_TINY: dict[str, Any] = dict(depths=(2, 2, 2, 2), embed_dims=(16, 16, 32, 32), num_heads=(1, 1, 2, 2))
_FEATURES = dict(flatten_sequential=True, out_indices=(0, 1, 2, 3))


def build_pvt(
    *, method: str, init: str = "released", mixer: Mapping[str, Any] | None = None, **pvt_args: Any
) -> PyramidVisionTransformerV2:
    """A timm PVT v2 with a mixer after every block: LayerNorm after the update, the grid as the network passes it.

    Args:
        method: Method of the mixers.
        init: ``"released"`` or ``"identity"``, as in `mrla.attach`.
        mixer: Further arguments of `mrla.attach`.
        pvt_args: Arguments of timm's `PyramidVisionTransformerV2`.

    Returns:
        The network.

    Raises:
        ValueError: If a mixer's option does not fit.

    Example:
        It is what the named networks are made by::

            model = timm.create_model("pvt_v2_b0_mrla_light")
    """
    return attach(PyramidVisionTransformerV2(**pvt_args), method, init=init, **(mixer or {}))


for _method, _title in TITLES.items():
    for _plain, _numbers in _SIZES.items():
        _name = f"{_plain}_mrla_{_method}"
        register(
            _name,
            build_pvt,
            f"{_plain} with {_title} after every block.",
            weights_of(_plain, _name),
            arguments=dict(_numbers, method=_method),
            pretrained_filter=checkpoint_filter_fn,
            feature_cfg=_FEATURES,
        )
    _name = f"test_pvt_v2_mrla_{_method}"
    register(
        _name,
        build_pvt,
        f"A tiny twin of the PVT v2 with {_title}.",
        {
            _name: dict(
                num_classes=1000,
                input_size=(3, 64, 64),
                fixed_input_size=False,
                first_conv="patch_embed.proj",
                classifier="head",
            )
        },
        arguments=dict(_TINY, method=_method),
        feature_cfg=_FEATURES,
    )
