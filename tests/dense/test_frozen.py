"""What is frozen gets no gradient and stays as it was; what is not learns."""

import copy

import pytest
import torch
from small_detectors import BACKBONES, SMALL, attached, awake, backbone, images, losses, small
from timm.layers import DropPath
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mrla.dense import FeatureBackbone
from mrla.ops import LayerMixer


def frozen(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if not parameter.requires_grad}


def stages(model: nn.Module) -> list[int]:
    return [at for at, info in enumerate(model.feature_info) if info["reduction"] >= 4]


@pytest.mark.parametrize("name", BACKBONES)
def test_stages_are_what_their_maps_are_made_of(name):
    """The graph of gradients knows which parameters a map has come through."""
    model = awake(backbone(name))
    parameters = dict(model.named_parameters())
    found = model.forward_intermediates(torch.randn(2, 3, 64, 64), intermediates_only=True)
    before: set[str] = set()
    for stage, level in enumerate(stages(model), start=1):
        made_of = torch.autograd.grad(
            found[level].sum(), list(parameters.values()), retain_graph=True, allow_unused=True
        )
        upstream = {key for key, gradient in zip(parameters, made_of, strict=True) if gradient is not None}
        features = FeatureBackbone(copy.deepcopy(model), ["out"], [len(found) - 1], freeze_stages=stage)
        assert frozen(features.body) == upstream
        assert before < upstream
        before = upstream
    first = model.feature_info[stages(model)[0]]["module"]
    features = FeatureBackbone(copy.deepcopy(model), ["out"], [len(found) - 1], freeze_stages=0)
    stem = frozen(features.body)
    assert stem
    assert not [key for key in stem if key.startswith(f"{first}.")]
    whole = FeatureBackbone(copy.deepcopy(model), ["out"], [len(found) - 1], freeze_stages=1)
    assert {key for key in frozen(whole.body) if not key.startswith(f"{first}.")} == stem
    assert not frozen(FeatureBackbone(copy.deepcopy(model), ["out"], [len(found) - 1]).body)


def test_a_resnets_stages_as_mmdetection_counts_them():
    def parts(freeze_stages: int) -> set[str]:
        features = FeatureBackbone(attached(), ["out"], [4], freeze_stages=freeze_stages)
        return {key.partition(".")[0] for key in frozen(features.body)}

    assert parts(-1) == set()
    assert parts(0) == {"conv1", "bn1"}
    assert parts(1) == {"conv1", "bn1", "layer1"}
    assert parts(4) == {"conv1", "bn1", "layer1", "layer2", "layer3", "layer4"}


@pytest.mark.parametrize("norm_eval", [True, False])
@pytest.mark.parametrize("name", SMALL)
def test_a_training_step_leaves_what_is_held_and_moves_the_rest(name, norm_eval):
    model = small(name, awake(attached()), freeze_stages=1, norm_eval=norm_eval)
    optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=1e-3)
    before = {key: one.clone() for key, one in model.state_dict().items()}
    sum(losses(model, images()).values()).backward()
    optimizer.step()
    body = "backbone.body."
    held = tuple(f"{body}{part}." for part in ("conv1", "bn1", "layer1"))
    for key, parameter in model.named_parameters():
        assert parameter.requires_grad == (not key.startswith(held))
        assert (parameter.grad is not None) == parameter.requires_grad, key
        if parameter.requires_grad:
            assert parameter.grad.isfinite().all(), key
    after = model.state_dict()
    for key, tensor in after.items():
        if key.startswith(held):
            assert torch.equal(tensor, before[key]), key
        elif "running" in key and key.startswith(body):
            assert torch.equal(tensor, before[key]) == norm_eval, key
    mixers = {key: one.grad for key, one in model.named_parameters() if ".mrla." in key and not key.startswith(held)}
    assert mixers
    assert not [key for key, gradient in mixers.items() if not gradient.any()]


def test_modes_stay_through_train_and_eval():
    body = attached("resnet", "light", drop_path=0.3)
    model = small("faster_rcnn", body, freeze_stages=1)
    for mode in (True, False, True):
        model.train(mode)
        norms = [module for module in body.modules() if isinstance(module, _BatchNorm)]
        assert len(norms) > sum(isinstance(module, LayerMixer) for module in body.modules()) > 0
        assert not any(norm.training for norm in norms)
        assert not any(module.training for part in (body.bn1, body.layer1) for module in part.modules())
        drops = [module for module in body.layer2.modules() if isinstance(module, DropPath)]
        assert drops
        assert all(drop.training == mode for drop in drops)
        assert model.roi_heads.training == mode
    loose = small("faster_rcnn", attached(), freeze_stages=0, norm_eval=False).train()
    norms = {key: one.training for key, one in loose.backbone.body.named_modules() if isinstance(one, _BatchNorm)}
    assert [key for key, training in norms.items() if not training] == ["bn1"]


def test_what_is_held_is_held_in_a_copy_and_from_the_beginning():
    model = small("retinanet", attached(), freeze_stages=2)
    for one in (model, copy.deepcopy(model).train()):
        assert one.training
        assert not one.backbone.body.layer2.training
        assert one.backbone.body.layer3.training
        assert not one.backbone.body.layer3.get_submodule("0").mrla.norm.training
        assert frozen(one) == frozen(model) != set()
