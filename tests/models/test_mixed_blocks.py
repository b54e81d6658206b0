"""What attach checks and leaves alone, what rides on tensors, and that nothing of it stays behind."""

import copy
import gc
import random
import weakref

import numpy
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

import mrla
from mrla.models import MixedBlock, find_chains
from mrla.models.dry_run import dry_run
from mrla.models.mixed_blocks import mixed

SMALL = {"channels": (8, 16, 24, 32), "num_classes": 7}
METHODS = {"light": {}, "light-output": {"carry": "output"}, "base": {}, "exact": {}, "dw": {}}


def tiny() -> nn.Module:
    return timm.create_model("resnet18", **SMALL)


def attached(option: str) -> nn.Module:
    return mrla.attach(tiny(), option.partition("-")[0], init="released", **METHODS[option])


def image(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 32, 32)


# --- the classes


def test_a_block_keeps_its_class_by_name_and_by_isinstance():
    model = tiny()
    plain = type(model.layer1[0])
    mrla.attach(model)
    for block in model.layer1.children():
        assert type(block) is mixed(plain)
        assert isinstance(block, plain)
        assert (type(block).__module__, type(block).__qualname__) == (plain.__module__, plain.__qualname__)
        assert "mrla_wiring" not in block.state_dict()
    assert type(model.layer1) is nn.Sequential


def test_detach_refuses_blocks_that_somebody_has_changed_the_class_of():
    model = mrla.attach(tiny())
    model.layer1[0].register_parameter("gain", nn.Parameter(torch.ones(1)))
    nn.utils.parametrize.register_parametrization(model.layer1[0], "gain", nn.Identity())
    with pytest.raises(ValueError, match=r"layer1\.0 has become a ParametrizedBasicBlock; first undo"):
        mrla.detach(model)
    nn.utils.parametrize.remove_parametrizations(model.layer1[0], "gain")
    assert not any(isinstance(module, MixedBlock) for module in mrla.detach(model).modules())


# --- the check after attach


def test_a_forward_that_hides_a_mixer_undoes_attach():
    model = tiny()
    for block in (model.layer2[1], model.layer3[0]):  # as hooks by hand and accelerate's do
        block.forward = type(block).forward.__get__(block)
    keys, classes = list(model.state_dict()), [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=r"attach is undone: .* 2 blocks otherwise \(layer2\.1 0 times, layer3"):
        mrla.attach(model)
    assert list(model.state_dict()) == keys
    assert [type(module) for module in model.modules()] == classes
    assert not hasattr(model, "mrla_recipe")


class Cloning(nn.Module):
    """A network that makes a new tensor between two blocks of a container."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.blocks = nn.ModuleList([Residual() for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x).clone()
        return x


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(8)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(self.norm(x))


def test_a_new_tensor_between_two_blocks_ends_a_chain():
    chains = find_chains(Cloning(), example=(2, 3, 8, 8))
    assert [chain.blocks for chain in chains] == [("0",), ("1",), ("2",)]
    model, x = Cloning(), torch.randn(2, 3, 8, 8)
    expected = model(x)
    assert torch.equal(mrla.attach(model, "base", example=(2, 3, 8, 8)).eval()(x), copy.deepcopy(model).eval()(x))
    assert expected.shape == (2, 8, 8, 8)


def test_chains_of_an_attached_network_are_those_of_the_plain_one():
    for name in ("resnet18", "vit_tiny_patch16_224", "mvitv2_tiny"):
        with torch.device("meta"):
            plain = timm.create_model(name)
            assert mrla.chains(mrla.attach(copy.deepcopy(plain), "base")) == mrla.chains(plain)
    own = mrla.attach(Cloning(), example=(2, 3, 8, 8), blocks="blocks")
    assert len(mrla.chains(own)) == 3  # with the example that it was attached with


# --- the dry run


class WritesToItself(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = tiny()
        self.register_buffer("calls", torch.zeros(()))
        self.count = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.count += 1
        with torch.no_grad():
            self.body.fc.weight.mul_(0.5)
            self.body.bn1.running_mean += 1
        random.random()
        numpy.random.rand()
        torch.rand(())
        torch.manual_seed(5)
        return self.body(x)


@pytest.mark.unchecked  # beartype draws from Python's generator
def test_the_dry_run_changes_nothing():
    model = WritesToItself()
    model.body.conv1.requires_grad_(False)
    model.body.layer1.eval()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    versions = {key: value._version for key, value in model.state_dict().items()}
    flags = [parameter.requires_grad for parameter in model.parameters()]
    modes = [module.training for module in model.modules()]
    randomness = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].copy()
    everywhere: list[str] = []
    handles = [
        torch.nn.modules.module.register_module_forward_pre_hook(lambda *_: everywhere.append("before")),
        torch.nn.modules.module.register_module_forward_hook(lambda *_: everywhere.append("after")),
    ]
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            dry_run(model)
    finally:
        for handle in handles:
            handle.remove()
    assert not everywhere
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert {key: value._version for key, value in model.state_dict().items()} == versions
    assert model.count == 0
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), randomness[0])
    assert random.getstate() == randomness[1]
    assert (numpy.random.get_state()[1] == randomness[2]).all()


def test_weights_on_meta_beside_buffers_on_the_cpu():
    """As accelerate's `init_empty_weights` leaves a network."""
    for name in ("resnet18", "swin_tiny_patch4_window7_224"):
        model = timm.create_model(name)
        for module in model.modules():
            for key, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[key] = nn.Parameter(parameter.to("meta"))
        expected = mrla.chains(timm.create_model(name))
        assert mrla.chains(mrla.attach(model, "base")) == expected
        assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


@pytest.mark.parametrize("option", METHODS)
def test_one_image_that_ends_in_one_pixel_trains_as_the_plain_network_does(option):
    """The mixers' BatchNorm sees one value a channel, where the network itself has LayerNorm."""
    plain = timm.create_model("convnext_atto", depths=(2, 2, 2, 2), dims=(8, 16, 24, 32), num_classes=3)
    model = mrla.attach(copy.deepcopy(plain), option.partition("-")[0], **METHODS[option]).train()
    last = model.stages[3].blocks[1].mrla.norm
    before = {key: value.clone() for key, value in last.state_dict().items()}
    x = torch.randn(1, 3, 32, 32)
    out = model(x)
    assert torch.equal(out, plain.train()(x))
    out.sum().backward()
    assert all(torch.equal(value, before[key]) for key, value in last.state_dict().items())
    with mrla.ops.use("reference"):
        assert torch.equal(model(x), out)


# --- what rides on tensors


@pytest.mark.parametrize("option", METHODS)
def test_a_chains_last_block_carries_nothing(option):
    model = attached(option).eval()
    with torch.no_grad():
        for stage in (model.layer1, model.layer2):
            first = stage[0](torch.randn(2, 64 if stage is model.layer1 else 8, 8, 8))
            assert hasattr(first, "mrla_carried") == (option in ("light-output", "base", "exact"))
            assert not hasattr(stage[1](first), "mrla_carried")


@pytest.mark.parametrize("option", METHODS)
def test_nothing_is_left_of_a_step_without_the_garbage_collector(option):
    """No memory holds the output that it rides on: that would be a circle."""
    model = attached(option).train()
    alive: list[weakref.ref] = []

    def watch(module: nn.Module, args: tuple, output: Tensor) -> None:
        alive.append(weakref.ref(output))
        if isinstance(output.grad_fn, Node):
            output.register_hook(lambda gradient: None)

    for block in (module for module in model.modules() if isinstance(module, MixedBlock)):
        block.register_forward_hook(watch)
    gc.collect()
    gc.disable()
    try:
        model(image()).square().mean().backward()
        assert len(alive) == 8
        assert not any(one() is not None for one in alive)
    finally:
        gc.enable()


def test_memory_of_another_chain_is_refused():
    model = mrla.attach(
        timm.create_model("vit_tiny_patch16_224", img_size=32, depth=4, global_pool="avg"), "base", chain_length=2
    ).eval()
    blocks, tokens = list(model.blocks), torch.randn(1, 5, 192)
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"block blocks\.3 needs .* begins with blocks\.2"):
        blocks[3](blocks[0](tokens))
