"""Parameter groups: every trainable parameter once, with the rate and the decay that it should have."""

import pytest
import timm
import torch
import torchvision
from torch import nn

import mrla
from mrla.models.parameter_groups import classifiers, new_parameters

SMALL = {"channels": (8, 8, 8, 8), "num_classes": 3}


def resnet() -> nn.Module:
    return mrla.attach(timm.create_model("resnet18", **SMALL), "base")


def vit() -> nn.Module:
    return mrla.attach(timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=3))


def by_name(model: nn.Module, groups: list[dict]) -> dict[str, tuple[float, float]]:
    numbers = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert len(numbers) == sum(len(group["params"]) for group in groups), "a parameter is in two groups"
    named = dict(model.named_parameters())
    assert set(numbers) == {id(p) for p in named.values() if p.requires_grad}
    return {name: numbers[id(p)] for name, p in named.items() if p.requires_grad}


@pytest.mark.parametrize("build", [resnet, vit])
def test_new_parameters_at_full_pace_and_vectors_without_decay(build):
    model = build()
    groups = mrla.param_groups(model, lr=0.5, weight_decay=0.25, old_lr_scale=0.125)
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [
        *((0.5, 0.25), (0.5, 0.0)),
        *((0.0625, 0.25), (0.0625, 0.0)),
    ]
    never = model.no_weight_decay() if hasattr(model, "no_weight_decay") else set()
    for name, (lr, decay) in by_name(model, groups).items():
        new = ".mrla." in name or name.startswith(("fc.", "head."))
        assert lr == (0.5 if new else 0.0625), name
        assert decay == (0.0 if model.get_parameter(name).ndim == 1 or name in never else 0.25), name


def test_what_a_vit_does_not_decay():
    numbers = by_name(model := vit(), mrla.param_groups(model, lr=1.0, weight_decay=1.0))
    assert numbers["pos_embed"][1] == numbers["cls_token"][1] == 0
    assert numbers["blocks.0.attn.qkv.weight"][1] == 1


def test_lambda_and_scales_are_not_decayed_and_kernels_are():
    for method in ("light", "base", "exact"):
        model = mrla.attach(timm.create_model("resnet18", **SMALL), method)
        numbers = by_name(model, mrla.param_groups(model, lr=1.0, weight_decay=1.0))
        mixer = {name.split(".mrla.")[1]: decay for name, (_, decay) in numbers.items() if "layer1.1.mrla." in name}
        assert {name for name, decay in mixer.items() if decay} == {"query_weight", "key_weight", "value_weight"}
        assert ("decay" in mixer) == (method == "light")


def test_equal_numbers_make_one_group():
    model = resnet()
    (group,) = mrla.param_groups(model, lr=0.1, weight_decay=0.3, old_lr_scale=1.0, decay_vectors=True)
    assert group["params"] == list(model.parameters())
    assert len(mrla.param_groups(model, lr=0.1, weight_decay=0.3, old_lr_scale=1.0)) == 2


def test_frozen_parameters_are_left_out():
    model = resnet()
    model.layer1.requires_grad_(False)
    names = by_name(model, mrla.param_groups(model, lr=0.1))
    assert not any(name.startswith("layer1.") for name in names)


def test_patterns_add_to_what_is_new():
    model = resnet()
    numbers = by_name(model, mrla.param_groups(model, lr=1.0, new=["layer4.*"]))
    assert numbers["layer4.0.conv1.weight"][0] == 1.0
    assert numbers["layer3.0.conv1.weight"][0] == pytest.approx(0.1)


def test_the_step_moves_old_weights_less():
    model = mrla.attach(timm.create_model("resnet18", **SMALL), init="released")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(mrla.param_groups(model, lr=0.1, old_lr_scale=0.01))
    model(torch.randn(4, 3, 32, 32)).square().sum().backward()
    optimizer.step()
    for name, p in model.named_parameters():
        lr = 0.1 if ".mrla." in name or name.startswith("fc.") else 0.001
        torch.testing.assert_close(p.detach(), before[name] - lr * p.grad)


@pytest.mark.parametrize(
    ("build", "names"),
    [
        (lambda: timm.create_model("resnet18", **SMALL), ["fc"]),
        (lambda: timm.create_model("convnext_atto", num_classes=3), ["head.fc"]),
        (lambda: timm.create_model("deit_tiny_distilled_patch16_224", depth=1), ["head", "head_dist"]),
        (lambda: timm.create_model("resnet18", num_classes=0), []),
        (lambda: torchvision.models.resnet18(num_classes=3), ["fc"]),
        (lambda: torchvision.models.mobilenet_v3_small(num_classes=3), ["classifier.3"]),
        (lambda: torchvision.models.vit_b_16(num_classes=3), ["heads.head"]),
        (lambda: torchvision.models.swin_t(num_classes=3), ["head"]),
        (lambda: torchvision.models.convnext_tiny(num_classes=3), ["classifier.2"]),
        (lambda: torchvision.models.squeezenet1_0(num_classes=3), ["classifier.1"]),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 1)), []),
    ],
    ids=[
        "resnet",
        "convnext",
        "distilled",
        "no classes",
        "tv resnet",
        "tv mobilenet",
        "tv vit",
        "tv swin",
        "tv convnext",
        "tv squeezenet",
        "none",
    ],
)
def test_classifiers_are_found(build, names):
    with torch.device("meta"):
        model = build()
    assert [id(part) for part in classifiers(model)] == [id(model.get_submodule(name)) for name in names]
    assert {name.rpartition(".")[0] for name in new_parameters(model)} <= {
        path for name in names for path, _ in model.named_modules() if path.startswith(name)
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": 0.0}, "lr must be positive: got 0.0; to freeze"),
        ({"lr": float("nan")}, "lr must be positive: got nan"),
        ({"lr": 0.1, "old_lr_scale": 0.0}, "old_lr_scale must be positive: got 0.0; to freeze"),
        ({"lr": 0.1, "weight_decay": -1.0}, "weight_decay must be zero or more: got -1.0"),
        ({"lr": 0.1, "new": ["layer9.*"]}, r"must fit a parameter's name: 'layer9\.\*' fits none"),
    ],
    ids=["lr", "nan", "scale", "decay", "pattern"],
)
def test_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        mrla.param_groups(resnet(), **arguments)


def test_nothing_to_train_is_refused():
    model = resnet().requires_grad_(False)
    with pytest.raises(ValueError, match="must have a parameter to train: all of them are frozen"):
        mrla.param_groups(model, lr=0.1)
