"""Chains found by a dry run: on a sample of families, on networks of nobody's library, and without a trace."""

import copy
import json
import threading

import pytest
import timm
import torch
import torchvision
from conftest import randomise_norms, sweep_but
from torch import Tensor, nn

import mrla
from mrla.models import MixedBlock, attach_recipe, find_chains
from mrla.models.dry_run import dry_run, input_sizes
from mrla.ops import LayerMixer

# Network, chains, blocks with a mixer, layouts.
SAMPLE = {
    "convnext_atto": (4, 12, {"NCHW"}),
    "regnetx_002": (4, 13, {"NCHW"}),  # stages of a class of their own
    "mobilenetv3_small_050": (4, 7, {"NCHW"}),
    "tiny_vit_5m_224": (4, 12, {"NCHW", "NHWC"}),
    "pit_ti_224": (3, 12, {"NLC"}),
    "mvitv2_tiny": (4, 10, {"NLC"}),  # blocks that return their grid
    "edgenext_xx_small": (4, 12, {"NCHW"}),
    "efficientvit_m0": (7, 14, {"NCHW"}),
}


@pytest.mark.parametrize("name", SAMPLE)
def test_chains_of_a_sample_of_families(name):
    with torch.device("meta"):
        chains = find_chains(timm.create_model(name))
    found = len(chains), sum(len(chain.blocks) for chain in chains), {chain.layout for chain in chains}
    assert found == SAMPLE[name]


@pytest.mark.parametrize("method", ["light", "base", "exact"])
@pytest.mark.parametrize("name", sweep_but(("mobilenetv3_small_050", "tiny_vit_5m_224", "mvitv2_tiny"), SAMPLE))
def test_the_sample_says_the_same_after_attach_and_is_itself_after_detach(name, method):
    plain = randomise_norms(timm.create_model(name)).eval()
    attached = mrla.attach(copy.deepcopy(plain), method)
    x = torch.randn(1, 3, *plain.pretrained_cfg["input_size"][1:])
    with torch.no_grad():
        expected = plain(x)
        assert torch.equal(attached(x), expected)
        assert set(attached.state_dict()) > set(plain.state_dict())
        restored = mrla.detach(attached)
        assert torch.equal(restored(x), expected)
    assert [(key, type(module)) for key, module in restored.named_modules()] == [
        (key, type(module)) for key, module in plain.named_modules()
    ]
    assert {key: vars(module).keys() for key, module in restored.named_modules()} == {
        key: vars(module).keys() for key, module in plain.named_modules()
    }


@pytest.mark.parametrize("name", ["mobilenet_v2", "regnet_x_400mf", "swin_t"])
def test_torchvision_too(name):
    plain = randomise_norms(torchvision.models.get_model(name)).eval()
    attached = mrla.attach(copy.deepcopy(plain), "base")
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert torch.equal(attached(x), plain(x))


def test_a_stage_of_its_own_class_keeps_its_checkpointing():
    model = mrla.attach(timm.create_model("regnetx_002", num_classes=3), "base", init="released").double().train()
    other = copy.deepcopy(model)
    other.set_grad_checkpointing()
    assert isinstance(other.s4.b1, MixedBlock)
    assert other.s4.grad_checkpointing
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    model(x).square().sum().backward()
    other(x).square().sum().backward()
    for (name, parameter), (_, checkpointed) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, checkpointed.grad, msg=name)


def test_the_dry_run_leaves_no_trace():
    model = timm.create_model("levit_128s").eval()  # it keeps biases on itself when it runs in eval mode
    model.train()
    called = []
    model.register_forward_hook(lambda *_: called.append("hook"))
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    attributes = {key: dict(vars(module)) for key, module in model.named_modules()}
    random = torch.get_rng_state()
    dry_run(model)
    assert not called
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), random)
    for key, module in model.named_modules():
        assert vars(module).keys() == attributes[key].keys()
        assert not getattr(module, "attention_bias_cache", None)


class Residual(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.GroupNorm(2, channels)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(self.norm(x).relu())


class OfMyOwn(nn.Module):
    """Nobody's network: an input of 5 channels and 12 by 20 pixels, blocks in a list."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(5, 8, 1)
        self.first = nn.ModuleList([Residual(8) for _ in range(3)])
        self.second = nn.ModuleList([Residual(8) for _ in range(2)])
        self.head = nn.Linear(8 * 12 * 20, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in [*self.first, *self.second]:
            x = block(x)
        return self.head(x.flatten(1))


OWN = (2, 5, 12, 20)


def mixed(model: nn.Module) -> set[str]:
    return {path for path, module in model.named_modules() if isinstance(module, LayerMixer)}


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [
        (None, {"first.0", "first.1", "first.2", "second.0", "second.1"}),
        ("first", {"first.0", "first.1", "first.2"}),
        ("sec*", {"second.0", "second.1"}),
        (["first", "second"], {"first.0", "first.1", "first.2", "second.0", "second.1"}),
        (lambda name, module: isinstance(module, nn.ModuleList) and len(module) == 2, {"second.0", "second.1"}),
    ],
)
def test_a_network_of_my_own_by_name_or_by_itself(blocks, expected):
    plain = OfMyOwn()
    x = torch.randn(OWN)
    attached = mrla.attach(copy.deepcopy(plain), "base", blocks=blocks, example=OWN)
    assert mixed(attached) == {f"{name}.mrla" for name in expected}
    json.dumps(attach_recipe(attached))  # a function has become names, so that the network can be saved
    assert torch.equal(attached(x), plain(x))
    assert torch.equal(mrla.detach(attached)(x), plain(x))


def test_blocks_that_hand_memory_on_in_a_list():
    model = mrla.attach(OfMyOwn(), "base", init="released", example=OWN).eval()
    lengths = []
    for name in ("first.0", "first.1", "first.2", "second.0"):
        mixer = model.get_submodule(name).mrla
        mixer.register_forward_hook(lambda _, __, output: lengths.append(len(output[1].values)))
    model(torch.randn(OWN))
    assert lengths == [1, 2, 3, 1]


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (OfMyOwn, {}, r"OfMyOwn does not run on \(2, 5, 224, 224\) .*pass example="),
        (OfMyOwn, {"example": OWN, "blocks": "third"}, r"blocks must choose containers.*got 'third'.*first, second"),
        (
            lambda: timm.create_model("vgg11"),
            {},
            "no chain of blocks was found in this VGG: .*name those that hold blocks",
        ),
        (
            lambda: timm.create_model("tnt_s_legacy_patch16_224"),
            {},
            r"looked at blocks \(outputs of shape \(392, 16, 24\)",
        ),
    ],
)
def test_what_cannot_be_read_says_what_was_seen(make, arguments, message):
    model = make()
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        mrla.attach(model, **arguments)
    assert list(model.state_dict()) == keys


class Recorder:
    """A hook that cannot be copied."""

    def __init__(self):
        self.lock = threading.Lock()
        self.calls = 0

    def __call__(self, *_) -> None:
        self.calls += 1


def test_what_cannot_be_copied_is_shared_and_hooks_stay_where_they_are():
    model = timm.create_model("resnet18")
    expected, recorder = find_chains(model), Recorder()
    model.lock = threading.Lock()
    model.layer1[0].seen = [2 * model.conv1.weight]  # not a leaf of its graph
    model.layer2.register_forward_hook(recorder)
    assert find_chains(model) == expected
    assert recorder.calls == 0
    model(torch.randn(1, 3, 64, 64))
    assert recorder.calls == 1


def test_a_network_that_refuses_to_be_copied_says_so():
    class Refusing(nn.Sequential):
        def __deepcopy__(self, memo):
            raise TypeError("no copies of me")

    with pytest.raises(ValueError, match=r"Refusing cannot be copied \(TypeError: no copies of me\)"):
        mrla.attach(Refusing(nn.Conv2d(3, 8, 1)))


@pytest.mark.parametrize(
    "make",
    [
        lambda: torchvision.models.vit_b_16(image_size=64),
        lambda: timm.create_model("gmlp_ti16_224", img_size=64),
        lambda: timm.create_model("coat_tiny", img_size=64),
    ],
    ids=["image_size", "stem", "patch_embed1"],
)
def test_the_size_that_a_network_was_built_for_is_tried_first(make):
    with torch.device("meta"):
        model = make()
        assert input_sizes(model)[0] == (3, 64, 64)
        assert find_chains(model)


class PassesBy(nn.Module):
    """Works on its second input and hands the first on."""

    def __init__(self):
        super().__init__()
        self.block = Residual(8)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x, self.block(y)


class TwoStages(nn.Module):
    """A stage like any other, and a list of blocks that is gone through in some way of its own."""

    def __init__(self, *blocks: nn.Module):
        super().__init__()
        self.first = nn.Sequential(Residual(8), Residual(8))
        self.second = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = y = self.first(x)
        if isinstance(self.second[0], PassesBy):
            for block in self.second:
                x, y = block(x, y)
            return y
        return torch.stack([block(x) for block in self.second]).sum(0)


def test_a_block_whose_first_output_is_its_input_gets_no_mixer():
    assert [chain.name for chain in find_chains(TwoStages(PassesBy(), PassesBy()), example=(2, 8, 8, 8))] == ["first"]


def test_blocks_side_by_side_are_chains_of_one():
    chains = find_chains(TwoStages(Residual(8), Residual(8)), example=(2, 8, 8, 8))
    assert [(chain.name, chain.blocks) for chain in chains] == [
        ("first", ("0", "1")),
        ("second", ("0",)),
        ("second", ("1",)),
    ]


class Attributes(nn.Module):
    """Blocks that are attributes, each with a container of layers in it."""

    def __init__(self):
        super().__init__()
        for name in ("one", "two", "three"):
            setattr(self, name, Branch())

    def forward(self, x: Tensor) -> Tensor:
        return self.three(self.two(self.one(x)))


class Branch(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.ReLU(), Residual(8), nn.ReLU(), Residual(8))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


def test_layers_of_blocks_that_no_container_holds_are_no_chains():
    with pytest.raises(ValueError, match="one, two, three and so on follow one another, but in no container"):
        mrla.attach(Attributes(), example=(2, 8, 8, 8))


def test_patches_in_groups_are_no_map():
    with torch.device("meta"):
        model = timm.create_model("nest_tiny")
    with pytest.raises(ValueError, match=r"outputs of shape \(2, 16, 196, 96\) that are no map of an image"):
        find_chains(model)
