"""Feature maps in a detector's backbone are those of the network's own forward, with and without mixers."""

import copy

import pytest
import timm
import torch
from small_detectors import BACKBONES, attached, awake, backbone
from timm.models import FeatureListNet
from timm.models._features import FeatureGetterNet
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn

import mrla
from mrla.dense import FeatureBackbone
from mrla.models import is_attached

LEVELS = {name: [0, 1, 2, 3] if name in ("convnext", "pvt", "swin") else [1, 2, 3, 4] for name in BACKBONES}
WITH_STAGES = ("resnet", "bottleneck", "named light", "named base")  # lost when they are flattened, without mixers too


def hooked(model: nn.Module, x: Tensor, levels: list[int]) -> list[Tensor]:
    """What the modules that `feature_info` names give in the network's plain forward, as (b, c, h, w)."""
    seen: dict[int, Tensor] = {}
    handles = [
        model.get_submodule(model.feature_info[level]["module"]).register_forward_hook(
            lambda _, __, out, level=level: seen.update({level: out})
        )
        for level in levels
    ]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    found = [seen[level] for level in levels]
    return [one.permute(0, 3, 1, 2) for one in found] if isinstance(model, SwinTransformer) else found


def maps(model: nn.Module, x: Tensor, levels: list[int]) -> list[Tensor]:
    features = FeatureBackbone(model, list("abcd"[: len(levels)]), levels).eval()
    with torch.no_grad():
        found = features(x)
    assert list(found) == list(features.names)
    return list(found.values())


@pytest.mark.parametrize("size", [(64, 64), (64, 128)])
@pytest.mark.parametrize("name", BACKBONES)
def test_maps_are_those_of_the_networks_own_forward(name, size):
    if name == "swin" and size != (64, 64):
        pytest.skip("built for one size")
    model, x, levels = awake(backbone(name)).eval(), torch.randn(2, 3, *size), LEVELS[name]
    expected = hooked(model, x, levels)
    found = maps(model, x, levels)
    assert [one.shape[1] for one in found] == [model.feature_info[level]["num_chs"] for level in levels]
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", BACKBONES)
def test_maps_are_those_of_timms_features_only(name):
    model, x, levels = awake(backbone(name)).eval(), torch.randn(2, 3, 64, 64), LEVELS[name]
    if name in ("pvt", "swin"):
        timms = FeatureGetterNet(copy.deepcopy(model), levels)
    else:
        timms = FeatureListNet(copy.deepcopy(model), levels, flatten_sequential=name not in WITH_STAGES)
    with torch.no_grad():
        expected = timms(x)
    for one, other in zip(maps(model, x, levels), expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("method", ["light", "base", "exact", "dw"])
@pytest.mark.parametrize("name", [name for name in BACKBONES if not name.startswith("named")])
def test_mixers_start_as_the_identity_and_then_count(name, method):
    x, levels = torch.randn(2, 3, 64, 64), LEVELS[name]
    plain = maps(backbone(name), x, levels)
    model = attached(name, method)
    for one, other in zip(maps(model, x, levels), plain, strict=True):
        assert torch.equal(one, other)
    awake(model)
    expected = hooked(model, x, levels)
    found = maps(model, x, levels)
    mixed = {"efficientnet": 2, "mobilenetv3": 3}.get(name, 4)  # their first stages have no residual
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    for one, without in zip(found[-mixed:], plain[-mixed:], strict=True):
        assert not torch.allclose(one, without)


@pytest.mark.parametrize("name", BACKBONES)
def test_every_parameter_that_is_left_has_a_gradient(name):
    model = awake(backbone(name))
    features = FeatureBackbone(model, list("abcd"), LEVELS[name]).train()
    sum(one.square().mean() for one in features(torch.randn(2, 3, 64, 64)).values()).backward()
    assert not [key for key, parameter in features.named_parameters() if parameter.grad is None]


def test_the_network_is_the_one_that_was_given():
    model = attached("resnet", "base")
    before = {key: one for key, one in model.state_dict().items() if not key.startswith("fc.")}
    features = FeatureBackbone(model, ["out"], [4])
    assert features.body is model
    assert is_attached(model)
    assert list(features.state_dict()) == [f"body.{key}" for key in before]
    for key, tensor in features.state_dict().items():
        assert tensor.data_ptr() == before[key.removeprefix("body.")].data_ptr()
    assert not is_attached(mrla.detach(features.body))


def test_mixers_can_come_after_the_backbone():
    x = torch.randn(2, 3, 64, 64)
    features = FeatureBackbone(backbone(), list("abcd"), [1, 2, 3, 4]).eval()
    with torch.no_grad():
        expected = features(x)
        mrla.attach(features.body, "light", example=(1, 3, 64, 64))
        found = features(x)
        assert all(torch.equal(found[key], expected[key]) for key in expected)
        awake(features)
        assert not torch.allclose(features(x)["a"], expected["a"])


def test_activation_checkpoints_change_nothing():
    gradients = []
    for checkpoints in (False, True):
        features = FeatureBackbone(awake(attached("resnet", "base")), ["out"], [4]).train()
        features.body.set_grad_checkpointing(checkpoints)
        torch.manual_seed(0)
        features(torch.randn(2, 3, 64, 64))["out"].square().mean().backward()
        gradients.append({key: one.grad for key, one in features.named_parameters()})
    for key, expected in gradients[0].items():
        assert torch.equal(gradients[1][key], expected), key


def test_a_transformer_gives_its_one_stride():
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=3, embed_dim=48, dynamic_img_size=True)
    found = maps(mrla.attach(model, "light"), torch.randn(2, 3, 64, 96), [2])
    assert found[0].shape == (2, 48, 4, 6)
