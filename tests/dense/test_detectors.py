"""torchvision's detectors on backbones of every kind: what they give, how they start, what they refuse."""

import copy
from typing import Any

import pytest
import timm
import torch
import torchvision
from conftest import randomise_norms, sweep_but
from small_detectors import (
    BACKBONES,
    SMALL,
    assert_equal,
    attached,
    awake,
    backbone,
    detections,
    images,
    losses,
    small,
    targets,
)
from torch import nn
from torchvision.models import detection

import mrla
from mrla.dense import DETECTORS, detector

TORCHVISIONS = {
    "faster_rcnn": detection.fasterrcnn_resnet50_fpn,
    "mask_rcnn": detection.maskrcnn_resnet50_fpn,
    "retinanet": detection.retinanet_resnet50_fpn,
    "fcos": detection.fcos_resnet50_fpn,
}
LOSSES = {
    "faster_rcnn": {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"},
    "mask_rcnn": {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg", "loss_mask"},
    "retinanet": {"classification", "bbox_regression"},
    "fcos": {"classification", "bbox_regression", "bbox_ctrness"},
}
ONE_METHOD = list(zip(SMALL, ["light", "base", "exact", "dw"], strict=True))
ALL_METHODS = [("faster_rcnn", method) for method in ("base", "exact", "dw")]


# --- they are torchvision's


@pytest.mark.parametrize("name", sweep_but(("faster_rcnn",), TORCHVISIONS))
def test_on_a_resnet_50_they_are_torchvisions_own(name):
    theirs = TORCHVISIONS[name](weights=None, weights_backbone=None, num_classes=5, min_size=64, max_size=128)
    for part in theirs.backbone.body.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_var.fill_(4.0)  # a new network of 50 layers grows its maps without bound
    ours = detector(name, "resnet50", 5, min_size=64, max_size=128)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    pictures = images((64, 96))
    assert_equal(detections(ours, pictures), detections(theirs, pictures))
    theirs.train().backbone.body.apply(lambda one: one.eval() if isinstance(one, nn.BatchNorm2d) else one)
    goals, found = targets(pictures, masks=name == "mask_rcnn"), []
    for model in (ours.train(), theirs):
        torch.manual_seed(5)
        found.append(model(pictures, goals))
    assert_equal(*found)
    numbers = {"transform.min_size", "transform.max_size", "transform.size_divisible", "transform.image_mean"}
    numbers |= {"score_thresh", "nms_thresh", "detections_per_img"} if not hasattr(ours, "rpn") else set()
    for path in numbers:
        first, second = ours, theirs
        for part in path.split("."):
            first, second = getattr(first, part), getattr(second, part)
        assert first == second or list(first) == list(second), path
    anchors = [
        model.rpn.anchor_generator if hasattr(ours, "rpn") else model.anchor_generator for model in (ours, theirs)
    ]
    assert anchors[0].sizes == anchors[1].sizes
    assert anchors[0].aspect_ratios == anchors[1].aspect_ratios


# --- what they give


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("name", DETECTORS)
def test_what_they_take_and_give(name, batch):
    model, pictures = small(name, awake(attached())), images(*((64, 96), (80, 64), (50, 110))[:batch])
    found = losses(model, pictures)
    assert set(found) == LOSSES[name]
    assert all(loss.isfinite() and loss.ndim == 0 for loss in found.values())
    seen = detections(model, pictures)
    assert len(seen) == batch
    for one, picture in zip(seen, pictures, strict=True):
        assert set(one) == {"boxes", "labels", "scores"} | ({"masks"} if name == "mask_rcnn" else set())
        count, (rows, columns) = len(one["scores"]), picture.shape[1:]
        assert 0 < count <= 10
        assert one["boxes"].shape == (count, 4)
        assert (one["boxes"] >= 0).all()
        assert (one["boxes"] <= torch.tensor([columns, rows, columns, rows])).all()
        # torchvision's two one-stage detectors have an output for the background too, and may give its label, 0.
        assert one["labels"].min() >= (0 if name in ("retinanet", "fcos") else 1)
        assert one["labels"].max() <= 3
        if name == "mask_rcnn":
            assert one["masks"].shape == (count, 1, rows, columns)


@pytest.mark.parametrize("name", DETECTORS)
def test_images_with_nothing_on_them(name):
    model, pictures = small(name, attached()), images()
    for pictures_with_nothing in (pictures, pictures[:1]):
        found = losses(model, pictures_with_nothing, empty=0)
        assert set(found) == LOSSES[name]
        assert all(loss.isfinite() for loss in found.values())
        model.zero_grad()
        sum(found.values()).backward()
        assert not [key for key, one in model.named_parameters() if one.grad is None]


@pytest.mark.parametrize(
    ("name", "body"),
    [*(("faster_rcnn", body) for body in BACKBONES if body != "swin"), ("retinanet", "swin"), ("fcos", "efficientnet")],
)
def test_every_parameter_learns_on_every_backbone(name, body):
    model = small(name, awake(backbone(body)))
    pictures = images((64, 64)) if body == "swin" else images()
    sum(losses(model, pictures).values()).backward()
    gradients = {key: parameter.grad for key, parameter in model.named_parameters()}
    assert not [key for key, gradient in gradients.items() if gradient is None]
    dead = [key for key, one in gradients.items() if not one.any() and ".mrla." in key and not key.endswith("bias")]
    assert all(key.endswith(("query_weight", "key_weight")) for key in dead), (
        dead
    )  # the first of base's, as the maths has it
    assert_equal(*[detections(model, pictures) for _ in range(2)])


def test_a_step_makes_the_loss_smaller():
    model = small("mask_rcnn", attached(), freeze_stages=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    totals = []
    for _ in range(12):
        optimizer.zero_grad()
        total = sum(losses(model, images()).values())
        total.backward()
        optimizer.step()
        totals.append(total.item())
    assert totals[-1] < 0.7 * totals[0]


def test_regions_are_pooled_at_the_strides_whatever_came_first():
    """torchvision guesses strides from the first images and keeps the guess; 65 rows, padded to 96, mislead it."""
    found = []
    for first in (images((65, 65)), images((64, 64))):
        model = small("mask_rcnn", backbone(), min_size=8, max_size=128)
        detections(model, first)
        assert (
            model.roi_heads.box_roi_pool.scales
            == model.roi_heads.mask_roi_pool.scales
            == [1 / 4, 1 / 8, 1 / 16, 1 / 32]
        )
        found.append(detections(model, images((64, 96))))
    assert_equal(*found)


# --- how they start


@pytest.mark.parametrize(("name", "method"), ONE_METHOD + ALL_METHODS)
def test_mixers_start_as_the_identity(name, method):
    plain, model = small(name, backbone()), small(name, attached("resnet", method))
    assert set(model.state_dict()) - set(plain.state_dict()) == {key for key in model.state_dict() if ".mrla." in key}
    for key, tensor in plain.state_dict().items():
        assert torch.equal(model.state_dict()[key], tensor), key
    pictures = images()
    expected = detections(plain, pictures)
    assert all(len(one["scores"]) for one in expected)
    assert_equal(detections(model, pictures), expected)
    for norm_eval in (True, False):
        model.backbone.norm_eval = plain.backbone.norm_eval = norm_eval
        assert_equal(losses(model, pictures), losses(plain, pictures))
    awake(model)
    assert not torch.equal(detections(model, pictures)[0]["scores"], expected[0]["scores"])
    mrla.detach(model)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert_equal(detections(model, pictures), detections(plain, pictures))


def test_weights_of_new_parts_are_drawn_from_the_global_generator():
    first, second = (small("retinanet", backbone()) for _ in range(2))
    assert all(map(torch.equal, first.state_dict().values(), second.state_dict().values()))
    torch.manual_seed(7)
    third = detector("retinanet", backbone(), 4, fpn_channels=16)
    assert not torch.equal(
        third.state_dict()["head.classification_head.conv.0.0.weight"],
        first.state_dict()["head.classification_head.conv.0.0.weight"],
    )


def test_weights_are_saved_and_loaded(tmp_path):
    model, pictures = awake(small("mask_rcnn", attached())), images()
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    again = small("mask_rcnn", attached())
    again.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert_equal(detections(again, pictures), detections(model, pictures))
    assert_equal(detections(copy.deepcopy(model), pictures), detections(model, pictures))
    keys = {key.partition(".")[0] for key in model.state_dict()}
    assert keys == {"backbone", "rpn", "roi_heads"}
    assert {key.split(".")[1] for key in model.state_dict() if key.startswith("backbone")} == {"body", "fpn"}
    assert "backbone.body.layer1.0.mrla.value_weight" in model.state_dict()


# --- what can be chosen


def test_numbers_are_handed_to_torchvision():
    options: dict[str, Any] = {
        "min_size": (48, 64),
        "max_size": 96,
        "image_mean": (0.1, 0.2, 0.3),
        "image_std": (1, 2, 3),
    }
    thresholds: dict[str, Any] = {"score_thresh": 0.3, "nms_thresh": 0.4, "detections_per_image": 7}
    model = detector(
        "mask_rcnn", backbone(), 6, **options, **thresholds, **SMALL["mask_rcnn"], rpn_batch_size_per_image=9
    )
    assert model.transform.min_size == (48, 64)
    assert model.transform.max_size == 96
    assert model.transform.image_mean == [0.1, 0.2, 0.3]
    assert model.transform.image_std == [1, 2, 3]
    heads = model.roi_heads
    assert (heads.score_thresh, heads.nms_thresh, heads.detections_per_img) == (0.3, 0.4, 7)
    assert model.rpn.fg_bg_sampler.batch_size_per_image == 9
    assert model.backbone.out_channels == 16
    assert model.backbone.fpn.layer_blocks[0][0].weight.shape == (16, 16, 3, 3)
    assert heads.box_head.fc6.weight.shape == (32, 16 * 49)
    assert heads.box_predictor.cls_score.weight.shape == (6, 32)
    assert len(heads.mask_head) == 2
    assert heads.mask_predictor.mask_fcn_logits.weight.shape == (6, 16, 1, 1)
    one = detector(
        "fcos", backbone(), 6, **thresholds, fpn_channels=32, center_sampling_radius=2.5, fixed_size=(64, 64)
    )
    assert (one.score_thresh, one.nms_thresh, one.detections_per_img) == (0.3, 0.4, 7)
    assert one.center_sampling_radius == 2.5
    assert one.transform.fixed_size == (64, 64)
    assert one.head.classification_head.cls_logits.weight.shape == (6, 32, 3, 3)


def test_normalisation_is_the_backbones():
    body = timm.create_model("test_resnet")
    assert detector("fcos", body, 2, fpn_channels=32).transform.image_mean == list(body.pretrained_cfg["mean"])
    body = timm.create_model("test_resnet", pretrained_cfg_overlay={"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.1)})
    transform = detector("fcos", body, 2, fpn_channels=32).transform
    assert (transform.image_mean, transform.image_std) == ([0.5, 0.4, 0.3], [0.2, 0.2, 0.1])


def test_levels_can_be_chosen_and_anchors_follow():
    model = small("faster_rcnn", backbone(), levels=[2, 3])
    assert model.rpn.anchor_generator.sizes == ((64,), (128,), (256,))
    assert model.transform.size_divisible == 16
    assert not hasattr(model.backbone.body, "layer4") or not list(model.backbone.body.layer4.parameters())
    assert set(losses(model, images())) == LOSSES["faster_rcnn"]
    assert len(detections(model, images())) == 2
    vit = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=3, embed_dim=48, dynamic_img_size=True)
    model = small("retinanet", mrla.attach(vit, "light"), levels=[2])
    assert model.anchor_generator.sizes == ((64, 80, 101), (128, 161, 203), (256, 322, 406))
    assert set(losses(model, images())) == LOSSES["retinanet"]


def test_a_backbone_by_its_name():
    model = small("retinanet", "test_resnet_bottleneck_mrla_light")
    assert mrla.models.is_attached(model.backbone.body)
    assert len(detections(model, images())) == 2


def test_new_parts_are_where_the_backbone_is():
    with torch.device("meta"):
        body = timm.create_model("test_resnet")
    assert {one.device.type for one in small("mask_rcnn", body).parameters()} == {"meta"}


# --- what is refused


class Uninformed(nn.Module):
    feature_info = None


RIGHT = {"name": "mask_rcnn", "backbone": "test_resnet", "num_classes": 3}
WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "name": (
        {"name": "faster_rcn"},
        ValueError,
        r"one of 'faster_rcnn', .*: got 'faster_rcn'; did you mean 'faster_rcnn'\?",
    ),
    "no name": ({"name": None}, ValueError, "a detector's name must be one of"),
    "backbone's name": ({"backbone": "test_resnett"}, ValueError, r"got 'test_resnett'; did you mean 'test_resnet'\?"),
    "no backbone": (
        {"backbone": 3},
        TypeError,
        "backbone must be a torch.nn.Module or a name that timm knows: got int",
    ),
    "torchvision's": (
        {"backbone": lambda: torchvision.models.resnet18()},
        ValueError,
        "tell of its feature maps, .* got ResNet, which does not; timm has torchvision's networks",
    ),
    "uninformed": ({"backbone": Uninformed}, ValueError, "got Uninformed, which does not; take a network of timm"),
    "features only": (
        {"backbone": lambda: timm.create_model("test_resnet", features_only=True)},
        ValueError,
        "the network itself: got timm's FeatureListNet; build it without features_only=True",
    ),
    "one stride": (
        {"backbone": "test_vit"},
        ValueError,
        "mask_rcnn takes feature maps of stride 4, 8, 16, 32: this VisionTransformer has them of 16; take another",
    ),
    "dilated": (
        {"backbone": lambda: timm.create_model("test_resnet", output_stride=8)},
        ValueError,
        "this ResNet has them of 2, 4, 8;",
    ),
    "one class": ({"num_classes": 1}, ValueError, "num_classes counts the background, .* at least 2: got 1"),
    "half a class": ({"num_classes": 2.5}, ValueError, "a whole number of at least 2: got 2.5"),
    "freeze too many": ({"freeze_stages": 5}, ValueError, "a number of stages up to 4, which this ResNet has: got 5"),
    "freeze less than nothing": ({"freeze_stages": -2}, ValueError, "freeze_stages must be -1 for nothing, .*: got -2"),
    "freeze half": ({"freeze_stages": 0.5}, ValueError, "freeze_stages must be -1 for nothing, .*: got 0.5"),
    "freeze without names": (
        {"backbone": "hrnet_w18_small", "freeze_stages": 1},
        ValueError,
        "HighResolutionNet has no module 'stage1'; set requires_grad of its parameters yourself",
    ),
    "sizes": ({"min_size": 200, "max_size": 100}, ValueError, "got min_size=200, max_size=100"),
    "one of the sizes": (
        {"min_size": (64, 200), "max_size": 100},
        ValueError,
        r"got min_size=\(64, 200\), max_size=100",
    ),
    "no size": ({"min_size": 0}, ValueError, "min_size must be at least 1 pixel, or several such numbers: got 0"),
    "empty sizes": ({"min_size": ()}, ValueError, "min_size must be at least 1 pixel"),
    "score": ({"score_thresh": 1.5}, ValueError, "score_thresh must be from 0 to 1: got 1.5"),
    "overlap": ({"nms_thresh": -1}, ValueError, "nms_thresh must be from 0 to 1: got -1"),
    "count": ({"detections_per_image": 0}, ValueError, "detections_per_image must be at least 1: got 0"),
    "no levels": ({"levels": []}, ValueError, r"indices into feature_info, 0 to 4 for this ResNet: got \[\]"),
    "level": ({"levels": [1, 5]}, ValueError, r"indices into feature_info, 0 to 4 for this ResNet: got \[1, 5\]"),
    "last level": ({"levels": [-1]}, ValueError, r"indices into feature_info, 0 to 4 for this ResNet: got \[-1\]"),
    "levels apart": (
        {"levels": [1, 3]},
        ValueError,
        r"twice the stride of the one before: got \[1, 3\] of stride 4, 16",
    ),
    "levels of one stride": (
        {"backbone": "test_vit", "levels": [2, 5]},
        ValueError,
        r"twice the stride of the one before: got \[2, 5\] of stride 16, 16",
    ),
    "no pyramid": ({"fpn_channels": 0}, ValueError, "fpn_channels must be at least 1: got 0"),
    "groups": ({"name": "fcos", "fpn_channels": 48}, ValueError, "a multiple of 32 for FCOS, .*: got 48"),
    "no box head": (
        {"name": "fcos", "box_head_dim": 8},
        ValueError,
        "box_head_dim is for faster_rcnn and mask_rcnn: fcos has",
    ),
    "no mask head": (
        {"name": "faster_rcnn", "mask_head_dim": 8},
        ValueError,
        "mask_head_dim is for mask_rcnn: faster_rcnn has",
    ),
    "no mask layers": ({"mask_head_layers": 0}, ValueError, "mask_head_layers must be at least 1: got 0"),
    "option": ({"rpn_nms_tresh": 0.5}, TypeError, r"no option 'rpn_nms_tresh'; did you mean 'rpn_nms_thresh'\?"),
    "option of ours": ({"box_score_thresh": 0.5}, TypeError, "mask_rcnn has no option 'box_score_thresh'"),
    "option of another": (
        {"name": "retinanet", "rpn_nms_thresh": 0.5},
        TypeError,
        "retinanet has no option 'rpn_nms_thresh'",
    ),
}


@pytest.mark.parametrize(("given", "error", "message"), WRONG.values(), ids=WRONG)
def test_what_does_not_fit_is_refused(given, error, message):
    arguments = {**RIGHT, **given}
    if callable(arguments["backbone"]):
        arguments["backbone"] = arguments["backbone"]()
    with pytest.raises(error, match=message):
        detector(**arguments)


def test_strides_that_are_no_powers_of_two():
    body = timm.create_model(
        "vit_tiny_patch16_224", img_size=56, patch_size=14, depth=2, embed_dim=48, dynamic_img_size=True
    )
    with pytest.raises(ValueError, match="powers of two: got 14; take 'retinanet' or 'fcos', or another backbone"):
        small("faster_rcnn", body, levels=[1])
    model = small("retinanet", body, levels=[1])
    assert model.transform.size_divisible == 14
    assert set(losses(model, images())) == LOSSES["retinanet"]


def test_a_backbone_that_is_refused_stays_as_it_was():
    body = randomise_norms(timm.create_model("test_resnet"))
    keys = list(body.state_dict())
    for wrong in ({"freeze_stages": 9}, {"levels": [9]}, {"min_size": 0}, {"nonsense": 1}):
        with pytest.raises((ValueError, TypeError)):
            detector("fcos", body, 3, **wrong)
    assert list(body.state_dict()) == keys
