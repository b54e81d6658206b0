"""torchvision's segmenters on backbones of every kind."""

import pytest
import timm
import torch
from small_detectors import BACKBONES, assert_equal, attached, awake, backbone
from torch import Tensor, nn
from torchvision.models import segmentation

import mrla
from mrla.dense import SEGMENTERS, segmenter


def built(name: str, body: nn.Module, **options) -> nn.Module:
    torch.manual_seed(2)
    return segmenter(name, body, 4, **options)


def logits(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        return model.eval()(x)


@pytest.mark.parametrize("name", SEGMENTERS)
def test_on_a_dilated_resnet_50_they_are_torchvisions_own(name):
    make = {"fcn": segmentation.fcn_resnet50, "deeplabv3": segmentation.deeplabv3_resnet50}[name]
    theirs = make(weights=None, weights_backbone=None, num_classes=4, aux_loss=True)
    ours = segmenter(name, timm.create_model("resnet50", output_stride=8), 4, aux=True)
    weights = {key.replace("backbone.", "backbone.body."): one for key, one in theirs.state_dict().items()}
    assert ours.state_dict().keys() == weights.keys()
    ours.load_state_dict(weights)
    x = torch.randn(1, 3, 64, 96)
    assert_equal(logits(ours, x), logits(theirs, x))


@pytest.mark.parametrize("aux", [False, True])
@pytest.mark.parametrize("name", SEGMENTERS)
def test_logits_have_the_size_of_the_image_at_any_stride(name, aux):
    for stride in (8, 16, 32):
        body = timm.create_model("resnet18", channels=(16, 16, 32, 32), output_stride=stride)
        model = built(name, mrla.attach(body, "light"), aux=aux)
        seen: list[Tensor] = []
        model.classifier.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0]))
        found = logits(model, torch.randn(2, 3, 64, 96))
        assert set(found) == ({"out", "aux"} if aux else {"out"})
        assert {tuple(one.shape) for one in found.values()} == {(2, 4, 64, 96)}
        assert seen[0].shape == (2, 32, 64 // stride, 96 // stride)


@pytest.mark.parametrize("method", ["light", "base", "exact", "dw"])
@pytest.mark.parametrize("name", SEGMENTERS)
def test_mixers_start_as_the_identity_and_then_count(name, method):
    plain, model = built(name, backbone(), aux=True), built(name, attached("resnet", method), aux=True)
    x = torch.randn(2, 3, 64, 96)
    assert_equal(logits(model, x), logits(plain, x))
    trained = []
    for one in (model.train(), plain.train()):
        torch.manual_seed(5)  # of the heads' dropout
        trained.append(one(x))
    assert_equal(*trained)
    awake(model)
    assert not torch.allclose(logits(model, x)["out"], logits(plain, x)["out"])


@pytest.mark.parametrize("body", BACKBONES)
def test_every_parameter_learns_on_every_backbone(body):
    model = built("fcn", awake(backbone(body)), aux=True).train()
    sum(one.square().mean() for one in model(torch.randn(2, 3, 64, 64)).values()).backward()
    assert not [key for key, parameter in model.named_parameters() if parameter.grad is None]


def test_frozen_stages_and_norms():
    model = built("deeplabv3", awake(attached()), freeze_stages=1)
    assert model.backbone.body.layer2.get_submodule("0").bn1.training
    held = {key: one.clone() for key, one in model.state_dict().items()}
    model.train()(torch.randn(2, 3, 64, 64))["out"].square().mean().backward()
    for key, parameter in model.named_parameters():
        frozen = key.startswith(("backbone.body.conv1", "backbone.body.bn1", "backbone.body.layer1"))
        assert (parameter.grad is None) == (not parameter.requires_grad) == frozen
    for key, tensor in model.state_dict().items():
        if "running" in key:
            moved = not key.startswith(("backbone.body.bn1", "backbone.body.layer1"))
            assert torch.equal(tensor, held[key]) != moved, key
    still = built("fcn", attached(), norm_eval=True).train()
    assert not any(one.training for one in still.backbone.modules() if isinstance(one, nn.BatchNorm2d))


def test_a_transformer_and_a_name():
    vit = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=3, embed_dim=48, dynamic_img_size=True)
    model = built("fcn", mrla.attach(vit, "light"), aux=True)
    assert logits(model, torch.randn(1, 3, 64, 96))["aux"].shape == (1, 4, 64, 96)
    assert logits(built("fcn", "test_resnet"), torch.randn(1, 3, 40, 56))["out"].shape == (1, 4, 40, 56)


WRONG = {
    "name": ({"name": "fcm"}, ValueError, r"must be one of 'fcn', 'deeplabv3': got 'fcm'; did you mean 'fcn'\?"),
    "one class": ({"num_classes": 1}, ValueError, "num_classes counts the background, .* at least 2: got 1"),
    "backbone": ({"backbone": nn.Conv2d(3, 8, 3)}, ValueError, "got Conv2d, which does not; take a network of timm"),
    "freeze": ({"freeze_stages": 5}, ValueError, "a number of stages up to 4, which this ResNet has: got 5"),
}


@pytest.mark.parametrize(("given", "error", "message"), WRONG.values(), ids=WRONG)
def test_what_does_not_fit_is_refused(given, error, message):
    with pytest.raises(error, match=message):
        segmenter(**{"name": "fcn", "backbone": "test_resnet", "num_classes": 3, **given})


def test_no_level_before_the_last():
    body = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=1, embed_dim=48)
    with pytest.raises(
        ValueError, match="aux reads the level before the last: this VisionTransformer has a single one"
    ):
        segmenter("fcn", body, 3, aux=True)
