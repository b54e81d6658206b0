"""The promises of attach and detach, over timm's and torchvision's ResNet family."""

import copy
import pickle

import pytest
import timm
import torch
import torchvision
from conftest import randomise_norms
from timm.optim import param_groups_layer_decay
from torch import nn

import mrla
from mrla.models import Stage, find_chains, is_attached

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
@pytest.mark.parametrize("name", NETWORKS)
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
    mrla.attach(model)
    assert model.layer2 is container
    assert isinstance(container, Stage)
    model(image())
    assert calls == ["block", "stage"]
    mrla.detach(model)
    assert type(container) is nn.Sequential


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


def test_block_by_block_is_the_same_as_the_whole_stage():
    model = mrla.attach(tiny(), carry="output", init="released").eval()
    stage, x = model.layer2, torch.randn(2, 8, 16, 16)
    expected = stage(x)
    stepped = x
    for step in iter(stage):
        stepped = step(stepped)
    assert torch.equal(stepped, expected)
    assert torch.equal(stage[:][0:2](x), expected)
    assert len(stage) == 2
    assert stage[1].conv1 is stage.get_submodule("1").conv1  # a step hands attributes on
    # A step by index is a chain of one: the second block then hears nothing of the first.
    assert not torch.equal(stage[1](stage[0](x)), expected)


def test_two_threads_and_repeated_calls_cannot_meet():
    from concurrent.futures import ThreadPoolExecutor

    model = mrla.attach(tiny(), carry="output", init="released").eval()
    images = [image() for _ in range(8)]
    with torch.no_grad():
        expected = [model(x) for x in images]
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(torch.no_grad()(model), images))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_an_exception_in_the_middle_leaves_nothing_behind():
    model = mrla.attach(tiny(), carry="output", init="released").eval()
    x = image()
    expected = model(x)
    handle = model.layer3[1].conv2.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(x)
    handle.remove()
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("options", [{}, {"carry": "output"}], ids=["shortcut", "output"])
def test_gradients_under_checkpointing_are_those_without(options):
    model = mrla.attach(tiny(), init="released", **options).double()
    twin = copy.deepcopy(model)
    twin.set_grad_checkpointing()
    x = image(torch.float64)
    model(x).square().sum().backward()
    twin(x).square().sum().backward()
    for (name, parameter), (_, other) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, msg=name)


@pytest.mark.parametrize("options", [{}, {"carry": "output"}], ids=["shortcut", "output"])
def test_features_are_those_of_the_whole_network(options):
    model = mrla.attach(tiny(), init="released", **options).eval()
    x = image()
    last = model.forward_features(x)
    final, maps = model.forward_intermediates(x)
    assert torch.equal(final, last)
    assert torch.equal(maps[-1], last)
    wrapped = timm.models.FeatureListNet(copy.deepcopy(model), out_indices=(1, 2, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(wrapped(x), maps[1:], strict=True))
    getter = torchvision.models._utils.IntermediateLayerGetter(model, {"layer2": "2", "layer4": "4"})
    assert torch.equal(getter(x)["4"], last)


def test_copies_and_pickles_give_the_same_network():
    model = mrla.attach(tiny(), init="released").eval()
    x = image()
    expected = model(x)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    thawed = pickle.loads(pickle.dumps(model))
    assert torch.equal(thawed(x), expected)
    mrla.detach(thawed)
    assert not is_attached(thawed)
    assert is_attached(model)


def test_new_parameters_are_in_their_blocks_layer_group_and_not_decayed():
    model = mrla.attach(tiny())
    groups = param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.5)
    by_id = {id(parameter): group for group in groups for parameter in group["params"]}
    block = model.layer3.get_submodule("1")
    assert by_id[id(block.mrla.decay)]["lr_scale"] == by_id[id(block.conv1.weight)]["lr_scale"]
    assert by_id[id(block.mrla.decay)]["weight_decay"] == 0
    assert by_id[id(block.mrla.norm.weight)]["weight_decay"] == 0
    assert by_id[id(block.mrla.value_weight)]["weight_decay"] == 0.05


@pytest.mark.unchecked
@pytest.mark.parametrize("name", ["timm basic", "timm bottleneck", "torchvision basic"])
@pytest.mark.parametrize("options", [{}, {"carry": "output"}], ids=["shortcut", "output"])
def test_compile_and_export_give_the_same_logits(name, options):
    model = randomise_norms(mrla.attach(NETWORKS[name](), init="released", **options)).eval()
    x = image()
    with torch.no_grad():
        expected = model(x)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), expected, atol=1e-5, rtol=1e-5)
        program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=64)},))
        torch.testing.assert_close(program.module()(x), expected, atol=1e-5, rtol=1e-5)
        three = torch.randn(3, 3, 64, 64)
        torch.testing.assert_close(program.module()(three), model(three), atol=1e-5, rtol=1e-5)


@pytest.mark.unchecked
def test_training_compiles_in_one_graph():
    model = mrla.attach(tiny(), init="released").train()
    twin = copy.deepcopy(model)
    x = image()
    torch.compile(twin, fullgraph=True, backend="aot_eager")(x).sum().backward()
    model(x).sum().backward()
    torch.testing.assert_close(twin.layer2[0].mrla.decay.grad, model.layer2[0].mrla.decay.grad, atol=1e-4, rtol=1e-3)
    assert torch.equal(twin.layer2[0].downsample[1].running_mean, model.layer2[0].downsample[1].running_mean)


def test_channels_last_agrees():
    model = mrla.attach(tiny(), init="released").eval()
    x = image()
    expected = model(x)
    found = model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


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
