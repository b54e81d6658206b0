"""Networks with mixers under a name in timm's registry."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, get_arch_pretrained_cfgs, register_model
from timm.models._pretrained import DefaultCfg
from torch import nn

from ..mixed_blocks import MIXER

NAMED: dict[str, DefaultCfg] = {}
"""Every name that this room adds to timm's registry, with its configurations."""


TITLES = {"light": "MRLA-light", "base": "MRLA-base"}
"""The methods that every family is named with."""


def register(
    name: str,
    builder: Callable[..., nn.Module],
    description: str,
    configs: Mapping[str, Any],
    *,
    arguments: Mapping[str, Any],
    pretrained_filter: Callable[..., dict[str, Any]] | None = None,
    feature_cfg: Mapping[str, Any] | None = None,
) -> None:
    """Enters a network into timm's registry, as if it had been written out in the module of its builder.

    Args:
        name: The name for `timm.create_model`.
        builder: Makes the network from `arguments` and what the caller overrides.
        description: One sentence for its documentation.
        configs: timm's configurations by tagged name; of the plain network's weights, from `weights_of`, or one
            without weights.
        arguments: What the builder gets.
        pretrained_filter: Turns a plain checkpoint into the plain network's state, as timm's families do.
        feature_cfg: How timm takes features out of it.
    """

    def fill_up(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Any]:
        """A plain network's weights, filled up with the mixers' own, so that loading may stay strict."""
        plain = pretrained_filter(state_dict, model) if pretrained_filter is not None else state_dict
        if any(MIXER in key.split(".") for key in plain):
            return plain  # a saved network's, which must have all of them
        return {**{key: value for key, value in model.state_dict().items() if MIXER in key.split(".")}, **plain}

    def entrypoint(pretrained: bool = False, **overrides: Any) -> nn.Module:  # timm's wrapper with features_only
        if pretrained:
            overrides.setdefault("init", "identity")
        features = dict(feature_cfg or {})
        if "out_indices" in overrides:
            features["out_indices"] = overrides.pop("out_indices")
        return build_model_with_cfg(
            builder,  # type: ignore[arg-type]
            name,
            pretrained,
            pretrained_filter_fn=fill_up,
            feature_cfg=features,
            **{**arguments, **overrides},
        )

    entrypoint.__name__ = entrypoint.__qualname__ = name
    entrypoint.__module__ = builder.__module__
    entrypoint.__doc__ = f"{description} Arguments: those of `{builder.__name__}`."
    module = sys.modules[builder.__module__]
    generated = generate_default_cfgs(dict(configs))
    vars(module).setdefault("default_cfgs", {}).update(generated)
    NAMED.update(generated)
    setattr(module, name, register_model(entrypoint))


def weights_of(backbone: str, name: str) -> dict[str, Any]:
    """Every set of plain weights that timm has for `backbone`, under the name of the network with mixers.

    Args:
        backbone: A name of timm's registry, without a tag.
        name: The name of the network with mixers.

    Returns:
        timm's configurations by tagged name.

    Example:
        >>> list(weights_of("deit_tiny_patch16_224", "mine"))
        ['mine.fb_in1k']
    """
    # timm has completed "timm/" to the plain network's repository, which is where the weights are.
    return {
        tagged.replace(backbone, name, 1): replace(config, architecture=None, tag=None)
        for tagged, config in get_arch_pretrained_cfgs(backbone).items()
    }
