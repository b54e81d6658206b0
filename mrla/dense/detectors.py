"""torchvision's detectors on any backbone."""

import inspect
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torchvision.models.detection import FCOS, FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7
from torchvision.ops.poolers import LevelMapper

from mrla.messages.suggestions import nearest

from .backbones import FeatureBackbone, checked_classes, device_of, network, normalisation, noted, strides, widths

_OCTAVES = (1.0, 2 ** (1 / 3), 2 ** (2 / 3))


@dataclass(frozen=True)
class _Form:
    """What sets one published detector apart from another."""

    model: Callable[..., nn.Module]
    strides: tuple[int, ...]
    """Of the backbone's levels."""
    extra_levels: int
    """How many more the pyramid makes, each of twice the stride of the one before."""
    anchors: Callable[[int], tuple[int, ...]]
    """Sides of the anchors, in pixels, at a level of a stride in pixels."""
    aspect_ratios: tuple[float, ...]
    prefix: str
    """What torchvision puts before the names of the thresholds."""
    pools_regions: bool = False


_RATIOS = (0.5, 1.0, 2.0)
_TWO_STAGES: Any = {
    "strides": (4, 8, 16, 32),
    "extra_levels": 1,
    "anchors": lambda stride: (8 * stride,),
    "aspect_ratios": _RATIOS,
    "prefix": "box_",
    "pools_regions": True,
}
_FORMS = {
    "faster_rcnn": _Form(FasterRCNN, **_TWO_STAGES),
    "mask_rcnn": _Form(MaskRCNN, **_TWO_STAGES),
    "retinanet": _Form(
        RetinaNet, (8, 16, 32), 2, lambda stride: tuple(int(4 * stride * octave) for octave in _OCTAVES), _RATIOS, ""
    ),
    "fcos": _Form(FCOS, (8, 16, 32), 2, lambda stride: (stride,), (1.0,), ""),
}
DETECTORS = tuple(_FORMS)
"""The names that `detector` takes."""

# Ours to give; what else torchvision's own constructors take can be passed by its name there.
_OURS = {"self", "backbone", "num_classes", "kwargs", "rpn_anchor_generator", "anchor_generator", "box_roi_pool"}
_OURS |= {"box_head", "box_predictor", "mask_roi_pool", "mask_head", "mask_predictor", "head", "min_size", "max_size"}
_OURS |= {"image_mean", "image_std", "rpn_head", "proposal_matcher"}
_OURS |= {f"{prefix}{name}" for prefix in ("", "box_") for name in ("score_thresh", "nms_thresh", "detections_per_img")}


def detector(
    name: str,
    backbone: nn.Module | str,
    num_classes: int,
    *,
    min_size: int | Sequence[int] = 800,
    max_size: int = 1333,
    image_mean: Sequence[float] | None = None,
    image_std: Sequence[float] | None = None,
    levels: Sequence[int] | None = None,
    freeze_stages: int = -1,
    norm_eval: bool = True,
    score_thresh: float | None = None,
    nms_thresh: float | None = None,
    detections_per_image: int | None = None,
    fpn_channels: int = 256,
    box_head_dim: int | None = None,
    mask_head_dim: int | None = None,
    mask_head_layers: int | None = None,
    **options: Any,
) -> nn.Module:
    """One of torchvision's detectors, with a feature pyramid on a backbone's levels.

    It is called as torchvision's are. In training it takes a list of images, ``(3, h, w)`` with values of 0 to 1, and a
    list of targets (`boxes` as ``x1, y1, x2, y2`` in pixels, `labels` from 1 on, and `masks` for Mask R-CNN) and
    returns a dict of losses; in eval mode it takes the images and returns a dict of `boxes`, `labels`, `scores` (and
    `masks`) for each.

    The backbone becomes part of the detector, in place: what lies behind its last level, its classifier included, is
    taken off it. Give it its mixers before. The new parts are torchvision's, drawn as torchvision draws them.

    Args:
        name: ``"faster_rcnn"``, ``"mask_rcnn"`` (C2 to C5 and a pooled level), ``"retinanet"`` or ``"fcos"`` (C3 to C5
            and two convolved levels).
        backbone: A timm network with `feature_info`, plain, named or attached; or the name of one, which is then made
            with new weights.
        num_classes: Classes, the background (label 0) included.
        min_size: What the images' shorter side is brought to, in pixels; of several, one is drawn in training.
        max_size: What the longer side must not exceed, in pixels.
        image_mean: What is subtracted from each channel; the backbone's own where it is not given.
        image_std: What it is divided by after that; the backbone's own where it is not given.
        levels: Which feature maps are taken, as indices into `feature_info`; each of twice the stride of the one
            before. Where not given, those of stride 4 (two-stage detectors only), 8, 16 and 32. Anchors follow the
            strides.
        freeze_stages: How many of the backbone's stages get no gradient and stay in eval mode, mixers included: 0 for
            the stem alone, 1 for the stem and the stage of stride 4 (as released), -1 for nothing.
        norm_eval: Whether every BatchNorm of the backbone stays in eval mode in training (as released); its weight and
            bias still learn. The norms of mixers too: those of new mixers then keep mean 0 and variance 1.
        score_thresh: Below what score a detection is left out; torchvision's own where it is not given, as for the
            next two.
        nms_thresh: Above what overlap (IoU) the lower of two detections of one class is left out.
        detections_per_image: How many are kept at most.
        fpn_channels: Width of the pyramid, and of the heads on it; FCOS needs a multiple of 32, and
            more than 32 to train on a single image whose coarsest map is one pixel.
        box_head_dim: Width of the two-stage detectors' box head; 1024 where it is not given.
        mask_head_dim: Width of Mask R-CNN's mask head; 256 where it is not given.
        mask_head_layers: Its convolutions; 4 where not given.
        options: Whatever else torchvision's `FasterRCNN`, `MaskRCNN`, `RetinaNet` or `FCOS` takes, by its name there,
            such as ``rpn_post_nms_top_n_train``, ``topk_candidates`` or ``fixed_size``.

    Returns:
        The detector, in training mode, where the backbone's parameters are.

    Raises:
        ValueError: If the name is unknown, the backbone has no `feature_info` or no such levels, or a number does not
            fit.
        TypeError: If the detector has no such option, or `backbone` is not a module.

    Example:
        >>> import mrla, timm, torch
        >>> from mrla.dense import detector
        >>> backbone = mrla.attach(timm.create_model("test_resnet"), "light")
        >>> model = detector("retinanet", backbone, num_classes=3, min_size=64, fpn_channels=16).eval()
        >>> sorted(model([torch.rand(3, 64, 96)])[0])
        ['boxes', 'labels', 'scores']
    """
    given = {key: value for key, value in locals().items() if key not in ("name", "backbone", "options")} | options
    if name not in _FORMS:
        raise ValueError(
            f"a detector's name must be one of {', '.join(map(repr, _FORMS))}: got {name!r}{nearest(name, _FORMS)}"
        )
    form = _FORMS[name]
    _check_sizes(min_size, max_size)
    _check_heads(name, fpn_channels, box_head_dim, mask_head_dim, mask_head_layers)
    arguments = _checked_options(name, options)
    for key, value in {"score_thresh": score_thresh, "nms_thresh": nms_thresh}.items():
        if value is not None:
            if not 0 <= value <= 1:
                raise ValueError(f"{key} must be from 0 to 1: got {value}")
            arguments[form.prefix + key] = value
    if detections_per_image is not None:
        if detections_per_image < 1:
            raise ValueError(f"detections_per_image must be at least 1: got {detections_per_image}")
        arguments[f"{form.prefix}detections_per_img"] = detections_per_image
    checked_classes(num_classes)
    body = network(backbone)
    chosen = _levels(name, body, levels)
    of_levels = [strides(body)[level] for level in chosen]

    arguments |= normalisation(body)
    arguments |= {} if image_mean is None else {"image_mean": list(image_mean)}
    arguments |= {} if image_std is None else {"image_std": list(image_std)}
    arguments |= {"min_size": min_size, "max_size": max_size, "size_divisible": of_levels[-1]}
    in_channels = widths(body, chosen)
    # P6 comes from P5, as in torchvision's own RetinaNet and FCOS.
    extra = LastLevelMaxPool() if form.pools_regions else LastLevelP6P7(fpn_channels, fpn_channels)
    with_pyramid = FeatureBackbone(
        body,
        _names(of_levels),
        chosen,
        fpn=FeaturePyramidNetwork(in_channels, fpn_channels, extra),
        out_channels=fpn_channels,
        freeze_stages=freeze_stages,
        norm_eval=norm_eval,
    )
    every_stride = [*of_levels, *(of_levels[-1] * 2**step for step in range(1, form.extra_levels + 1))]
    anchors = AnchorGenerator(
        tuple(form.anchors(stride) for stride in every_stride), (form.aspect_ratios,) * len(every_stride)
    )
    if not form.pools_regions:
        model = form.model(with_pyramid, num_classes, anchor_generator=anchors, **arguments)
        return noted(model.to(device_of(body)), "detector", name, given)

    box_head_dim = 1024 if box_head_dim is None else box_head_dim
    arguments |= {
        "rpn_anchor_generator": anchors,
        "box_roi_pool": _region_pool(of_levels, 7),
        "box_head": TwoMLPHead(fpn_channels * 7**2, box_head_dim),
        "box_predictor": FastRCNNPredictor(box_head_dim, num_classes),
    }
    if name == "mask_rcnn":
        mask_head_dim = 256 if mask_head_dim is None else mask_head_dim
        mask_layers = (mask_head_dim,) * (4 if mask_head_layers is None else mask_head_layers)
        arguments |= {
            "mask_roi_pool": _region_pool(of_levels, 14),
            "mask_head": MaskRCNNHeads(fpn_channels, mask_layers, 1),
            "mask_predictor": MaskRCNNPredictor(mask_head_dim, mask_head_dim, num_classes),
        }
    return noted(form.model(with_pyramid, **arguments).to(device_of(body)), "detector", name, given)


def _levels(name: str, body: nn.Module, levels: Sequence[int] | None) -> list[int]:
    """Indices into `feature_info`, finest first."""
    form, available, kind = _FORMS[name], strides(body), type(body).__name__
    if levels is None:
        missing = [stride for stride in form.strides if stride not in available]
        if missing:
            raise ValueError(
                f"{name} takes feature maps of stride {_listed(form.strides)}: this {kind} has them of "
                f"{_listed(sorted(set(available)))}; take another backbone, or choose levels by index into it"
            )
        # Of several of one stride the last, which has seen most.
        return [len(available) - 1 - available[::-1].index(stride) for stride in form.strides]
    chosen = list(levels)
    if not chosen or not all(isinstance(level, int) and 0 <= level < len(available) for level in chosen):
        raise ValueError(
            f"levels must be indices into feature_info, 0 to {len(available) - 1} for this {kind}: got {chosen}"
        )
    of_levels = [available[level] for level in chosen]
    if any(after != 2 * before for before, after in itertools.pairwise(of_levels)):
        raise ValueError(
            f"each of levels must have twice the stride of the one before: got {chosen} of stride "
            f"{_listed(of_levels)}; all are {_listed(available)}"
        )
    if form.pools_regions and of_levels[0] & (of_levels[0] - 1):
        raise ValueError(
            f"{name} pools regions, for which torchvision needs strides that are powers of two: got "
            f"{_listed(of_levels)}; take 'retinanet' or 'fcos', or another backbone"
        )
    return chosen


def _names(of_levels: Sequence[int]) -> list[str]:
    return [str(position) for position in range(len(of_levels))]  # as torchvision counts its levels


def _region_pool(of_levels: Sequence[int], output_size: int) -> MultiScaleRoIAlign:
    """Pooling of regions that knows the strides.

    By itself torchvision's guesses them from the first images it ever sees, without their padding, and keeps the guess:
    65 rows, padded to 96, give a stride of 2 in place of 4 for good.
    """
    pool = MultiScaleRoIAlign(_names(of_levels), output_size, sampling_ratio=2)
    pool.scales = [1 / stride for stride in of_levels]
    first, last = (round(math.log2(stride)) for stride in (of_levels[0], of_levels[-1]))
    pool.map_levels = LevelMapper(first, last, pool.canonical_scale, pool.canonical_level)
    return pool


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def _check_sizes(min_size: int | Sequence[int], max_size: int) -> None:
    sides = [min_size] if isinstance(min_size, int) else list(min_size)
    if not sides or min(sides) < 1:
        raise ValueError(f"min_size must be at least 1 pixel, or several such numbers: got {min_size}")
    if max(sides) > max_size:
        raise ValueError(f"max_size must be at least min_size: got min_size={min_size}, max_size={max_size}")


def _check_heads(
    name: str, fpn_channels: int, box_head_dim: int | None, mask_head_dim: int | None, mask_head_layers: int | None
) -> None:
    if name == "fcos" and fpn_channels % 32:
        raise ValueError(
            f"fpn_channels must be a multiple of 32 for FCOS, whose heads have 32 groups: got {fpn_channels}"
        )
    given = {
        "fpn_channels": (fpn_channels, tuple(_FORMS)),
        "box_head_dim": (box_head_dim, ("faster_rcnn", "mask_rcnn")),
    }
    given |= {"mask_head_dim": (mask_head_dim, ("mask_rcnn",)), "mask_head_layers": (mask_head_layers, ("mask_rcnn",))}
    for key, (value, of) in given.items():
        if value is not None and name not in of:
            raise ValueError(f"{key} is for {' and '.join(of)}: {name} has no such head; leave it out")
        if value is not None and value < 1:
            raise ValueError(f"{key} must be at least 1: got {value}")


def _checked_options(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """`options` if torchvision knows every one: what it does not know, it passes over in silence."""
    known = set(inspect.signature(_FORMS[name].model.__init__).parameters)  # type: ignore[misc]
    known = (known | {"fixed_size"}) - _OURS
    for option in options:
        if option not in known:
            raise TypeError(
                f"{name} has no option {option!r}{nearest(option, known)}; beside detector's own arguments it takes "
                f"{', '.join(sorted(known))}"
            )
    return dict(options)
