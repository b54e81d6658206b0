"""The contract of every named model, swept over their tiny twins, and the published counts of the full-size ones."""

import math

import pytest
import timm
import torch
from conftest import randomise_norms, sweep_but
from torch.utils.flop_counter import FlopCounterMode

from mrla.models.zoo.resnets import default_cfgs

TWINS = timm.list_models("test_*mrla*")
# Trainable, and with BatchNorm statistics, 10 classes; facts.md section 1, counted by running the notebook's code.
NOTEBOOK = {
    "resnet18_cifar": (11_173_962, 11_183_562),
    "resnet18_cifar_mrla_light": (11_197_074, 11_210_514),
    "resnet34_cifar_mrla_light": (21_327_582, 21_352_158),
    "resnet50_cifar_mrla_light": (23_702_262, 23_785_590),
    "resnet101_cifar_mrla_light": (42_903_456, 43_073_824),
    "resnet152_cifar_mrla_light": (58_731_594, 58_978_762),
    "resnext50_32x4d_cifar_mrla_light": (23_174_134, 23_272_566),
    "wide_resnet50_2_cifar_mrla_light": (67_028_470, 67_126_902),
}
# Trainable, 1000 classes; facts.md section 2, counted by running the released code.
RELEASED = {
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet50_mrla_light": 25_738_452,
    "resnet101_mrla_light": 44_939_646,
}


def counts(name: str, **arguments) -> tuple[int, int]:
    with torch.device("meta"):
        model = timm.create_model(name, **arguments)
    trainable = sum(parameter.numel() for parameter in model.parameters())
    return trainable, trainable + sum(b.numel() for n, b in model.named_buffers() if "running" in n)


def test_every_name_of_the_issue_is_registered():
    backbones = [*(f"resnet{depth}" for depth in (18, 34, 50, 101, 152)), "resnext50_32x4d", "wide_resnet50_2"]
    wanted = {f"{name}{form}" for name in backbones for form in ("_mrla_light", "_cifar", "_cifar_mrla_light")}
    assert wanted <= set(timm.list_models("*"))
    assert set(timm.list_models(module="resnets")) == set(default_cfgs)


@pytest.mark.parametrize("name", sweep_but(("resnet18_cifar", "resnet18_cifar_mrla_light"), NOTEBOOK))
def test_counts_are_those_of_the_notebook(name):
    assert counts(name, num_classes=10) == NOTEBOOK[name]


@pytest.mark.parametrize(
    ("name", "billions"),
    [("resnet50", 4.087), ("resnet50_mrla_light", 4.137), ("resnet101", 7.799), ("resnet101_mrla_light", 7.880)],
)
def test_convolution_macs_are_those_of_the_released_code(name, billions):
    with torch.device("meta"):
        model = timm.create_model(name).eval()
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, 224, 224))
    per_operator = counter.get_flop_counts()["Global"]
    convolutions = sum(flops for operator, flops in per_operator.items() if "convolution" in str(operator))
    assert round(convolutions / 2 / 1e9, 3) == billions


def test_classes_default_to_the_data_set_of_the_name():
    with torch.device("meta"):
        assert timm.create_model("resnet18_cifar_mrla_light").num_classes == 10
        assert timm.create_model("resnet18_mrla_light").num_classes == 1000


def test_mixer_options_go_through():
    model = timm.create_model("test_resnet_basic_mrla_light", mixer={"heads": 2, "drop_path": 0.2, "carry": "output"})
    mixer = model.layer4.get_submodule("1").mrla
    assert (mixer.heads, mixer.carry, mixer.drop_path.drop_prob) == (2, "output", 0.2)


def test_notebook_start_of_a_whole_network():
    model = timm.create_model("resnext50_32x4d_cifar_mrla_light", init="notebook")
    grouped = model.layer1[0].conv2.weight
    width = 128
    assert grouped.std().item() == pytest.approx(math.sqrt(2 / (9 * width)), rel=0.03)  # groups ignored
    assert model.layer1[0].bn3.weight.eq(1).all()  # no zero-init
    bound = math.sqrt(6 / (2048 + 10))
    assert model.fc.weight.abs().max().item() == pytest.approx(bound, rel=0.01)
    assert model.fc.bias.eq(0).all()


def test_notebook_start_is_shared_by_plain_and_attached():
    torch.manual_seed(3)
    plain = timm.create_model("resnet18_cifar", init="notebook", channels=(8, 8, 8, 8))
    torch.manual_seed(3)
    attached = timm.create_model("resnet18_cifar_mrla_light", init="notebook", channels=(8, 8, 8, 8))
    theirs = attached.state_dict()
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in plain.state_dict().items())


def test_pretrained_takes_plain_weights_and_starts_as_the_identity():
    """The weights cannot be downloaded here: timm's own loading runs on a state dict in their place."""
    plain = randomise_norms(timm.create_model("resnet18", num_classes=1000)).eval()
    overlay = {"state_dict": plain.state_dict()}
    named = timm.create_model("resnet18_mrla_light", pretrained=True, pretrained_cfg_overlay=overlay).eval()
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(named(x), plain(x))
    fewer = timm.create_model("resnet18_mrla_light", pretrained=True, num_classes=5, pretrained_cfg_overlay=overlay)
    assert torch.equal(fewer.layer1[0].conv1.weight, plain.layer1[0].conv1.weight)
    assert fewer(x).shape == (2, 5)


def test_pretrained_names_point_at_the_plain_weights():
    configs = timm.models.get_arch_pretrained_cfgs("resnet50_mrla_light")
    plain = timm.models.get_arch_pretrained_cfgs("resnet50")
    assert len(configs) == len(plain)
    assert configs["resnet50_mrla_light.a1_in1k"].hf_hub_id == "timm/resnet50.a1_in1k"
    assert configs["resnet50_mrla_light.a1_in1k"].license == plain["resnet50.a1_in1k"].license


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("resnet18_cifar", {"mixer": {"heads": 2}}, "mixer needs a network with mixers, this one is plain"),
        ("resnet18_cifar", {"init": "zero"}, "init must be 'released', 'notebook' or 'identity': got 'zero'"),
        ("resnet18_cifar_mrla_light", {"mixer": {"head_dim": 7}}, "head_dim must divide the channels"),
    ],
)
def test_bad_arguments_are_refused(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model(name, **arguments)
