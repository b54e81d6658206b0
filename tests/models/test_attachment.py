"""The promises of attach and detach, over timm's and torchvision's ResNet family."""

import copy
from typing import Any

import pytest
import timm
import torch
import torchvision
from conftest import randomise_norms, sweep_but
from torch import nn

import mrla
from mrla.models import MixedBlock, find_chains

SMALL = {"channels": (8, 16, 24, 32), "num_classes": 7}
NETWORKS = {
    "timm basic": lambda: timm.create_model("resnet18", **SMALL),
    "timm bottleneck": lambda: timm.create_model("resnet26", **SMALL),
    "timm d (average-pooled shortcut)": lambda: timm.create_model("resnet26d", **SMALL),
    "timm resnext": lambda: timm.create_model("resnext50_32x4d", num_classes=7),
    "timm wide": lambda: timm.create_model("wide_resnet50_2", num_classes=7),
    "timm se": lambda: timm.create_model("seresnet18", **SMALL),
    "timm eca": lambda: timm.create_model("resnet18", **SMALL, block_args={"attn_layer": "eca"}),
    "timm anti-aliased": lambda: timm.create_model("resnetblur18", **SMALL),
    "torchvision basic": lambda: torchvision.models.resnet18(num_classes=7),
    "torchvision bottleneck": lambda: torchvision.models.resnet50(num_classes=7),
    "torchvision resnext": lambda: torchvision.models.resnext50_32x4d(num_classes=7),
}
METHODS = [("light", {}), ("light", {"carry": "output"}), ("dw", {})]


def tiny() -> nn.Module:
    return randomise_norms(timm.create_model("resnet18", **SMALL))


def image(dtype=torch.float32) -> torch.Tensor:
    return torch.randn(2, 3, 64, 64).to(dtype)


@pytest.mark.parametrize(("method", "options"), METHODS, ids=["light", "light-output", "dw"])
@pytest.mark.parametrize(
    "name", sweep_but(("timm basic", "timm bottleneck", "timm se", "torchvision bottleneck"), NETWORKS)
)
def test_attached_network_says_the_same_bit_for_bit(name, method, options):
    plain = randomise_norms(NETWORKS[name]())
    x = image()
    attached = mrla.attach(copy.deepcopy(plain), method, **options)
    for training in (True, False):  # in train mode the statistics move: both networks must move alike
        assert torch.equal(attached.train(training)(x), plain.train(training)(x))
    old, new = plain.state_dict(), attached.state_dict()
    assert all(torch.equal(new[key], old[key]) for key in old)


@pytest.mark.parametrize("name", ["timm basic", "timm bottleneck", "torchvision basic"])
@pytest.mark.parametrize("training", [True, False])
def test_same_logits_in_bfloat16_and_under_autocast(name, training):
    plain = randomise_norms(NETWORKS[name]()).train(training)
    attached = mrla.attach(copy.deepcopy(plain))
    x = image()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(attached(x), plain(x))
    plain, attached, x = plain.bfloat16(), attached.bfloat16(), x.bfloat16()
    assert torch.equal(attached(x), plain(x))


@pytest.mark.parametrize("name", NETWORKS)
def test_detach_gives_the_original_back(name):
    plain = NETWORKS[name]()
    twin = copy.deepcopy(plain)
    mrla.detach(mrla.attach(twin))
    assert [(key, type(module)) for key, module in twin.named_modules()] == [
        (key, type(module)) for key, module in plain.named_modules()
    ]
    old, new = plain.state_dict(), twin.state_dict()
    assert list(old) == list(new)
    assert all(torch.equal(old[key], new[key]) for key in old)
    assert {key: vars(module).keys() for key, module in twin.named_modules()} == {
        key: vars(module).keys() for key, module in plain.named_modules()
    }


def test_old_keys_keep_their_names_and_a_plain_checkpoint_misses_only_mixers():
    plain = tiny()
    attached = mrla.attach(copy.deepcopy(plain))
    missing, unexpected = attached.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected
    assert missing
    assert all(".mrla." in key for key in missing)
    assert "layer1.0.mrla.decay" in missing


def test_containers_stay_the_same_objects_and_keep_their_hooks():
    model = tiny()
    container, calls = model.layer2, []
    container.register_forward_hook(lambda *_: calls.append("stage"))
    container[0].register_forward_hook(lambda *_: calls.append("block"))
    block_class = type(container[0])
    mrla.attach(model)
    assert model.layer2 is container
    assert type(container) is nn.Sequential
    assert isinstance(container[0], MixedBlock)
    assert isinstance(container[0], block_class)
    assert type(container[0]).__name__ == block_class.__name__
    model(image())
    assert calls == ["block", "stage"]
    mrla.detach(model)
    assert type(container[0]) is block_class


def test_the_global_random_state_is_left_alone():
    model, before = tiny(), torch.get_rng_state()
    mrla.attach(model, init="released")
    assert torch.equal(torch.get_rng_state(), before)


def test_new_parameters_follow_the_block():
    model = tiny().to(torch.float64).eval()
    mrla.attach(model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    assert not any(module.training for module in model.modules())
    with torch.device("meta"):
        on_meta = timm.create_model("resnet18")
    assert {parameter.device.type for parameter in mrla.attach(on_meta).parameters()} == {"meta"}


def test_parameters_made_in_inference_mode_can_train():
    model = tiny()
    with torch.inference_mode():
        mrla.attach(model)
    model(image()).sum().backward()


def test_the_shortcut_is_computed_once():
    """A second call of the downsample would move its running statistics twice."""
    plain = tiny()
    attached = mrla.attach(copy.deepcopy(plain), init="released")
    with torch.no_grad():
        for block in (module for module in attached.modules() if hasattr(module, "mrla")):
            block.mrla.norm.weight.zero_()
    x = image()
    for _ in range(3):
        assert torch.equal(attached.train()(x), plain.train()(x))
    assert torch.equal(
        attached.layer2[0].downsample[1].running_mean,
        plain.layer2[0].downsample[1].running_mean,
    )


def test_what_light_hears_is_the_projected_shortcut():
    model = mrla.attach(tiny(), init="released").eval()
    block, seen = model.layer2.get_submodule("0"), {}
    block.mrla.register_forward_pre_hook(lambda _, inputs: seen.update(shortcut=inputs[1]))
    block.downsample.register_forward_hook(lambda _, __, output: seen.update(projected=output))
    model(image())
    assert seen["shortcut"] is seen["projected"]


def test_blocks_by_index_by_iteration_and_by_slice_are_the_stage():
    model = mrla.attach(tiny(), carry="output", init="released").eval()
    stage: Any = model.layer2
    x = torch.randn(2, 8, 16, 16)
    expected = stage(x)
    stepped = x
    for block in stage:
        stepped = block(stepped)
    assert torch.equal(stepped, expected)
    assert torch.equal(stage[:][0:2](x), expected)
    assert torch.equal(stage[1](stage[0](x)), expected)
    with pytest.raises(RuntimeError, match=r"block layer2\.1 needs the memory of the blocks before it in its chain"):
        stage[1](stage[0](x).clone())


def test_a_network_without_a_reader_of_its_only_mixer_is_refused():
    model = timm.create_model("vit_tiny_patch16_224", depth=1)
    names = [(name, type(module)) for name, module in model.named_modules()]
    with pytest.raises(ValueError, match="only the class token is read; build it with another pooling"):
        mrla.attach(model)
    assert [(name, type(module)) for name, module in model.named_modules()] == names
    assert mrla.models.is_attached(mrla.attach(timm.create_model("vit_tiny_patch16_224", depth=1, global_pool="avg")))


def test_chains_are_what_attach_serves():
    for name in ("vit_tiny_patch16_224", "resnet18"):
        model = timm.create_model(name)
        served = [f"{chain.name}.{block}" for chain in mrla.chains(model) for block in chain.served]
        mrla.attach(model)
        assert [path.removesuffix(".mrla") for path, _ in model.named_modules() if path.endswith(".mrla")] == served


def test_memory_ends_with_its_chain():
    model = mrla.attach(timm.create_model("resnet18", **SMALL), "base", chain_length=1, init="released").eval()
    given = []
    for block in (module for module in model.modules() if hasattr(module, "mrla")):
        block.mrla.register_forward_pre_hook(lambda _, inputs: given.append(inputs[2]))
    model(image())
    assert given == [None] * 8


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (lambda: mrla.attach(tiny()), {}, r"already has mixers: call mrla.detach\(model\) first"),
        (lambda: nn.DataParallel(tiny()), {}, "attach before wrapping: DataParallel hides"),
        (lambda: torch.compile(tiny()), {}, "attach before wrapping: OptimizedModule hides"),
        (lambda: nn.Sequential(nn.Linear(2, 2)), {}, r"Sequential does not run on .*pass example="),
        (
            tiny,
            {"method": "lihgt"},
            "method must be one of 'light', 'base', 'exact', 'dw': got 'lihgt'; did you mean 'light'",
        ),
        (tiny, {"head_dim": 5}, "head_dim must divide the channels: got head_dim=5, channels=8; try 4"),
        (tiny, {"drop_path": 2.0}, "drop_path must be a probability"),
        (tiny, {"init": "zeros"}, "init must be one of"),
    ],
)
@pytest.mark.unchecked
def test_bad_calls_are_refused_and_change_nothing(make, arguments, message):
    model = make()
    before = list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        mrla.attach(model, **arguments)
    assert list(model.state_dict()) == before


@pytest.mark.unchecked
def test_wrong_kinds_of_arguments_are_type_errors():
    with pytest.raises(TypeError, match=r"method 'light' takes .*carry.*: got carri"):
        mrla.attach(tiny(), carri="output")
    with pytest.raises(TypeError, match="method 'dw' takes drop_path, init, norm, out_act, value_act: got head_dim"):
        mrla.attach(tiny(), "dw", head_dim=8)
    with pytest.raises(TypeError, match=r"attach needs a torch\.nn\.Module: got str"):
        mrla.attach("resnet18")  # type: ignore[type-var]
    with pytest.raises(ValueError, match="detach takes off what attach has added"):
        mrla.detach(tiny())


def test_chains_of_a_resnet50():
    chains = find_chains(timm.create_model("resnet50"))
    assert [(chain.name, len(chain.blocks), chain.channels) for chain in chains] == [
        ("layer1", 3, 256),
        ("layer2", 4, 512),
        ("layer3", 6, 1024),
        ("layer4", 3, 2048),
    ]
