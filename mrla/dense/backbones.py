"""A classification network as the backbone of a detector or segmenter: its feature maps, and what of it is frozen."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import timm
import torch
from jaxtyping import Float
from timm.models import FeatureInfo
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.ops import FeaturePyramidNetwork

from mrla.models import TimmModel, resolve

STAGE_STRIDE = 4
"""The stride of the first stage; what comes before it is the stem."""


class FeatureBackbone(nn.Module):
    """A network that gives some of its feature maps by name, through a feature pyramid where it has one.

    The network itself is the child `body`, so its keys are those it has by itself behind ``body.``; mixers and all run
    as in its own forward. What is held stays held: `train` puts frozen stages, and with `norm_eval` every BatchNorm of
    the network, back in eval mode.

    Args:
        body: A timm network, as `network` gives it.
        names: The name of each feature map, finest first.
        levels: Which they are, as indices into the network's `feature_info`, in ascending order.
        fpn: What the maps go through, if anything does.
        out_channels: Width of its maps, for torchvision's detectors to read.
        freeze_stages: How many stages are frozen beside the stem; 0 for the stem alone, -1 for nothing.
        norm_eval: Whether every BatchNorm in `body`, those of mixers included, goes by its running statistics.
    """

    def __init__(
        self,
        body: nn.Module,
        names: Sequence[str],
        levels: Sequence[int],
        *,
        fpn: FeaturePyramidNetwork | None = None,
        out_channels: int | None = None,
        freeze_stages: int = -1,
        norm_eval: bool = True,
    ):
        super().__init__()
        frozen_modules, frozen_parameters = _frozen(body, freeze_stages)
        self.body = _without_what_follows(body, levels)
        self.fpn = fpn
        self.out_channels = out_channels
        self.names = tuple(names)
        self.levels = tuple(levels)
        self.norm_eval = norm_eval
        self.frozen = tuple(frozen_modules)
        for path in self.frozen:
            body.get_submodule(path).requires_grad_(False)
        for path in frozen_parameters:
            body.get_parameter(path).requires_grad_(False)
        self.train(self.training)

    def forward(self, images: Float[Tensor, "b c h w"]) -> OrderedDict[str, Tensor]:
        """The feature maps of normalised images.

        Args:
            images: A batch of shape ``(b, c, h, w)``.

        Returns:
            Maps of shape ``(b, channels, h / stride, w / stride)`` by name, finest first.
        """
        body: Any = self.body
        maps = body.forward_intermediates(images, indices=list(self.levels), intermediates_only=True)
        named = OrderedDict(zip(self.names, maps, strict=True))
        return named if self.fpn is None else self.fpn(named)

    def train(self, mode: bool = True) -> "FeatureBackbone":
        """Sets the mode of everything but what is held in eval mode.

        Args:
            mode: True for training.

        Returns:
            The backbone itself.
        """
        super().train(mode)
        for path in self.frozen:
            self.body.get_submodule(path).eval()
        if self.norm_eval:
            for module in self.body.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self


def network(backbone: nn.Module | str) -> nn.Module:
    """The network that is to be a backbone, checked.

    Args:
        backbone: A network, or the name of one in timm's registry, which is then made with new weights.

    Returns:
        The network itself.

    Raises:
        ValueError: If timm knows no such name, or the network does not tell of its feature maps.
        TypeError: If `backbone` is neither a module nor a name.
    """
    if isinstance(backbone, str):
        backbone = timm.create_model(resolve(backbone, (TimmModel,), what="a backbone given by name").name)
    if not isinstance(backbone, nn.Module):
        raise TypeError(f"backbone must be a torch.nn.Module or a name that timm knows: got {type(backbone).__name__}")
    kind = type(backbone).__name__
    info = getattr(backbone, "feature_info", None)
    if isinstance(info, FeatureInfo):
        raise ValueError(f"backbone must be the network itself: got timm's {kind}; build it without features_only=True")
    if not (isinstance(info, list) and info and hasattr(backbone, "forward_intermediates")):
        remedy = "; timm has torchvision's networks and weights, such as timm.create_model('resnet50.tv_in1k')"
        raise ValueError(
            f"a backbone must tell of its feature maps, as timm's networks do in feature_info and "
            f"forward_intermediates: got {kind}, which does not"
            f"{remedy if type(backbone).__module__.startswith('torchvision.') else '; take a network of timm'}"
        )
    return backbone


def strides(body: nn.Module) -> list[int]:
    """The stride of each feature map that `feature_info` has.

    Args:
        body: A timm network.

    Returns:
        Pixels from one place of the map to the next, finest first.
    """
    return [info["reduction"] for info in _feature_info(body)]


def widths(body: nn.Module, levels: Sequence[int]) -> list[int]:
    """How many channels feature maps have.

    Args:
        body: A timm network.
        levels: The maps, as indices into its `feature_info`.

    Returns:
        Channels of each.
    """
    return [_feature_info(body)[level]["num_chs"] for level in levels]


def normalisation(body: nn.Module) -> dict[str, list[float]]:
    """How the network's images are normalised.

    Args:
        body: A timm network.

    Returns:
        `image_mean` and `image_std`, one number a channel, as far as its `pretrained_cfg` has them.
    """
    config = getattr(body, "pretrained_cfg", None) or {}
    return {f"image_{key}": list(config[key]) for key in ("mean", "std") if config.get(key) is not None}


def checked_classes(num_classes: int) -> int:
    """`num_classes` if there is one beside the background, a ValueError if not."""
    if not isinstance(num_classes, int) or num_classes < 2:
        raise ValueError(
            f"num_classes counts the background, so it must be a whole number of at least 2: got {num_classes!r}"
        )
    return num_classes


def noted(model: nn.Module, made_by: str, name: str, arguments: Mapping[str, Any]) -> nn.Module:
    """The model, which from now on tells by `built_as` how it was made: `mrla.dense.tasks` reads it."""
    model.__dict__["built_as"] = {"made_by": made_by, "name": name, "arguments": dict(arguments)}
    return model


def _feature_info(body: nn.Module) -> list[dict[str, Any]]:
    return body.feature_info  # type: ignore[return-value]


def _without_what_follows(body: nn.Module, levels: Sequence[int]) -> nn.Module:
    """Takes off what nobody would run, in place: it would have parameters without a gradient, which DDP refuses."""
    any_body: Any = body
    any_body.prune_intermediate_layers(list(levels), prune_norm=True, prune_head=True)
    return body


def _frozen(body: nn.Module, freeze_stages: int) -> tuple[list[str], list[str]]:
    """Paths of modules and of single parameters up to the end of a stage, in the order in which they are registered."""
    stages = [info["module"] for info in _feature_info(body) if info["reduction"] >= STAGE_STRIDE]
    if not isinstance(freeze_stages, int) or not -1 <= freeze_stages <= len(stages):
        raise ValueError(
            f"freeze_stages must be -1 for nothing, 0 for the stem or a number of stages up to {len(stages)}, which "
            f"this {type(body).__name__} has: got {freeze_stages!r}"
        )
    if freeze_stages == -1:
        return [], []
    last = stages[max(freeze_stages - 1, 0)]
    modules: list[str] = []
    parameters: list[str] = []
    parent, path = body, ""
    for part in last.split("."):
        if part not in parent._modules:
            raise ValueError(
                f"freeze_stages goes by the modules that feature_info names: {type(body).__name__} has no module "
                f"{last!r}; set requires_grad of its parameters yourself"
            )
        parameters += [path + name for name in parent._parameters]  # such as embeddings of positions
        before = list(parent._modules)[: list(parent._modules).index(part)]
        modules += [path + name for name in before]
        parent, path = parent.get_submodule(part), f"{path}{part}."
    if freeze_stages > 0:
        modules.append(last)
    return modules, parameters


def device_of(body: nn.Module) -> torch.device:
    """Where the network's parameters are, for the new ones to be there too."""
    return next(body.parameters()).device
