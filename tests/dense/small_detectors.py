"""Small backbones, detectors, images and targets that the tests of this folder share."""

import functools
from collections.abc import Callable
from typing import Any

import timm
import torch
from conftest import randomise_norms
from torch import Tensor, nn

import mrla
from mrla.dense import detector
from mrla.ops import LayerMixer

_SWIN = {"img_size": 64, "window_size": 4, "embed_dim": 16, "depths": (2, 2, 2, 1), "num_heads": (1, 2, 2, 4)}
# One of each kind of network; all run on images of 64 by 64 pixels, and all but swin on any size.
BACKBONES: dict[str, Callable[..., nn.Module]] = {
    "resnet": functools.partial(timm.create_model, "resnet18", channels=(16, 16, 32, 32)),
    "bottleneck": functools.partial(timm.create_model, "test_resnet"),
    "convnext": functools.partial(timm.create_model, "convnext_atto", depths=(2, 2, 2, 1), dims=(8, 16, 24, 32)),
    "regnet": functools.partial(timm.create_model, "regnetx_002", w0=16, group_size=8, depth=8),
    "efficientnet": functools.partial(timm.create_model, "tinynet_e"),
    "mobilenetv3": functools.partial(timm.create_model, "mobilenetv3_small_050"),
    "pvt": functools.partial(timm.create_model, "pvt_v2_b0", embed_dims=(8, 16, 40, 64)),
    "swin": functools.partial(timm.create_model, "swin_tiny_patch4_window7_224", **_SWIN),
    "named light": functools.partial(timm.create_model, "test_resnet_bottleneck_mrla_light"),
    "named base": functools.partial(timm.create_model, "test_resnet_bottleneck_mrla_base"),
}
SMALL: dict[str, dict[str, Any]] = {
    "faster_rcnn": {"fpn_channels": 16, "box_head_dim": 32},
    "mask_rcnn": {"fpn_channels": 16, "box_head_dim": 32, "mask_head_dim": 16, "mask_head_layers": 2},
    "retinanet": {"fpn_channels": 16},
    "fcos": {"fpn_channels": 64},
}


def backbone(name: str = "resnet") -> nn.Module:
    """The same one every time, with norms of random weights and statistics."""
    torch.manual_seed(1)
    return randomise_norms(BACKBONES[name]())


def small(name: str, body: nn.Module, num_classes: int = 4, **options: Any) -> nn.Module:
    """The same new parts every time; every detection that there is room for is kept."""
    torch.manual_seed(2)
    options = {"min_size": 64, "max_size": 128, "score_thresh": 0.0, "detections_per_image": 10} | options
    return detector(name, body, num_classes, **SMALL[name], **options)


def awake(model: nn.Module) -> nn.Module:
    """Gives every mixer a branch that is not zero, and not so large that its gate is shut, with a gradient of zero."""
    torch.manual_seed(3)
    for module in model.modules():
        if isinstance(module, LayerMixer):
            module.reset_parameters("released")
            randomise_norms(module)
            for name, parameter in module.named_parameters():
                if name.endswith(("query_weight", "key_weight", "decay", "norm.weight")):
                    parameter.data.mul_(0.1)
    return model


def attached(name: str = "resnet", method: str = "light", **options: Any) -> nn.Module:
    return mrla.attach(backbone(name), method, **options)


def images(*sizes: tuple[int, int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [torch.rand(3, *size, generator=generator) for size in sizes or ((64, 96), (80, 64))]


def targets(pictures: list[Tensor], *, masks: bool = False, empty: int | None = None) -> list[dict[str, Tensor]]:
    """Two objects on each image, none on that of index `empty`."""
    found = []
    for position, picture in enumerate(pictures):
        rows, columns = picture.shape[1:]
        boxes = torch.tensor([[4.0, 6.0, 0.5 * columns, 0.6 * rows], [0.3 * columns, 8.0, columns - 3.0, rows - 2.0]])
        if position == empty:
            boxes = boxes[:0]
        target = {"boxes": boxes, "labels": torch.tensor([1, 3])[: len(boxes)]}
        if masks:
            target["masks"] = torch.zeros(len(boxes), rows, columns, dtype=torch.uint8)
            for mask, (left, top, right, bottom) in zip(target["masks"], boxes.int().tolist(), strict=True):
                mask[top:bottom, left:right] = 1
        found.append(target)
    return found


def losses(model: nn.Module, pictures: list[Tensor], **options: Any) -> dict[str, Tensor]:
    """In training mode; which anchors and regions count is drawn the same way every time."""
    torch.manual_seed(5)
    masks = hasattr(model, "roi_heads") and model.roi_heads.has_mask()
    return model.train()(pictures, targets(pictures, masks=masks, **options))


def detections(model: nn.Module, pictures: list[Tensor]) -> list[dict[str, Tensor]]:
    with torch.no_grad():
        return model.eval()(pictures)


def flat(results: Any) -> dict[str, Tensor]:
    """Every tensor of losses or detections by a name of its own."""
    if isinstance(results, dict):
        return results
    return {f"{at}.{key}": value for at, one in enumerate(results) for key, value in one.items()}


def assert_equal(found: Any, expected: Any) -> None:
    """To the last bit."""
    found, expected = flat(found), flat(expected)
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key
