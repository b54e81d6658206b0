import json

import pytest
import timm
import torch
import torchvision
from conftest import randomise_norms, sweep_but
from safetensors.torch import load_file, save_file

import mrla
from mrla.models import attach_recipe, build, read_config
from mrla.models.checkpoints.descriptions import describe
from mrla.models.dry_run import dry_run

MAKERS = {
    "plain": lambda: timm.create_model("resnet18", num_classes=3, in_chans=1, channels=(8, 8, 8, 8)),
    "attached": lambda: mrla.attach(timm.create_model("resnet18", channels=(8, 8, 8, 8)), head_dim=4, init="released"),
    "named": lambda: timm.create_model("test_resnet_basic_cifar_mrla_light", mixer={"heads": 2}),
    "detached name": lambda: mrla.detach(timm.create_model("test_resnet_basic_cifar_mrla_light")),
    "eca": lambda: timm.create_model("resnet18", channels=(8, 8, 8, 8), block_args={"attn_layer": "eca"}),
    "pattern": lambda: small(blocks="layer[23]"),
    "list": lambda: small(blocks=["layer2", "layer*4"]),
    "function": lambda: small(blocks=lambda name, module: name == "layer3"),
    "light options": lambda: small(carry="output", norm="layer", value_act="gelu", chain_length=1, drop_path=0.1),
    "base options": lambda: small("base", last=2, weighting="sigmoid", heads=2, out_act=None, example=(2, 3, 96, 96)),
    "exact": lambda: small("exact", last=1),
    "depthwise": lambda: small("dw"),
}


def small(method="light", **options):
    model = timm.create_model("resnet18", channels=(8, 8, 8, 8))
    return mrla.attach(model, method, **{"init": "released", **options})


@pytest.mark.parametrize("kind", sweep_but(("attached", "named", "detached name", "list", "base options"), MAKERS))
def test_a_saved_network_is_rebuilt_bit_for_bit(kind, tmp_path):
    model = randomise_norms(MAKERS[kind]()).eval()
    names = [str(number) for number in range(model.num_classes)]
    folder = mrla.save(model, tmp_path / "net", class_names=names, mean=(0.5,))
    again = mrla.load(folder)
    assert not again.training
    x = torch.randn(2, model.conv1.in_channels, 64, 64)
    assert torch.equal(again(x), model(x))
    assert list(again.state_dict()) == list(model.state_dict())
    assert attach_recipe(again) == attach_recipe(model)
    assert read_config(folder)["pretrained_cfg"]["label_names"] == names
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_a_torchvision_network_is_saved_under_its_name(tmp_path):
    model = randomise_norms(mrla.attach(torchvision.models.resnet18(num_classes=5))).eval()
    with pytest.raises(ValueError, match="timm did not make this ResNet"):
        mrla.save(model, tmp_path)
    with pytest.raises(
        ValueError, match=r"does not rebuild this ResNet \(2 differences: fc.weight.*pass the model_args"
    ):
        mrla.save(model, tmp_path, architecture="torchvision/resnet18")
    assert not list(tmp_path.iterdir())
    mrla.save(model, tmp_path, architecture="torchvision/resnet18", model_args={"num_classes": 5})
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(mrla.load(tmp_path)(x), model(x))


def test_a_named_network_is_read_by_timm_too(tmp_path):
    model = randomise_norms(MAKERS["named"]()).eval()
    mrla.save(model, tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(again(x), model(x))


def test_reset_classifier_is_remembered(tmp_path):
    model = timm.create_model("resnet18", num_classes=3, channels=(8, 8, 8, 8))
    model.reset_classifier(11)
    mrla.save(model, tmp_path)
    assert mrla.load(tmp_path)(torch.randn(1, 3, 64, 64)).shape == (1, 11)


def test_class_names_of_a_classifier_that_was_replaced_are_not_saved(tmp_path):
    mrla.save(MAKERS["plain"](), tmp_path / "three", class_names=["a", "b", "c"])
    model = mrla.load(tmp_path / "three")
    model.reset_classifier(2)
    mrla.save(model, tmp_path / "two")
    assert read_config(tmp_path / "two")["pretrained_cfg"].get("label_names") is None
    mrla.save(model, tmp_path / "named", class_names=["d", "e"])
    assert mrla.load(tmp_path / "named").pretrained_cfg["label_names"] == ["d", "e"]


def test_a_network_that_reads_numbers_while_it_is_built(tmp_path):
    """torchvision's RegNets read the widths of their blocks from tensors, which the meta device has no numbers for."""
    model = mrla.attach(torchvision.models.regnet_y_400mf(num_classes=3)).eval()
    before = torch.random.get_rng_state()
    mrla.save(model, tmp_path, architecture="torchvision/regnet_y_400mf", model_args={"num_classes": 3})
    again = mrla.load(tmp_path).eval()
    assert torch.equal(torch.random.get_rng_state(), before)
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(again(x), model(x))


def test_damage_is_named(tmp_path):
    model = MAKERS["plain"]()
    with pytest.raises(ValueError, match=r"a saved network is a folder with config\.json"):
        mrla.load(tmp_path)
    mrla.save(model, tmp_path)
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged or no safetensors file"):
        mrla.load(tmp_path)
    weights.unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors is missing"):
        mrla.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        mrla.load(tmp_path)


def test_weights_of_another_network_are_refused_with_the_first_differences(tmp_path):
    mrla.save(MAKERS["plain"](), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["model_args"]["num_classes"] = 4
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"of another network than resnet18.* \(2 differences: fc.weight is \(3, 8\)"):
        mrla.load(tmp_path)
    config["architecture"] = "resnet18_no_such"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="resnet18_no_such cannot be built"):
        mrla.load(tmp_path)


HARMFUL = {
    "pretrained weights": {"model_args": {"pretrained": True}},
    "a cache": {"model_args": {"cache_dir": "any/folder"}},
    "an address": {"model_args": {"pretrained_cfg": {"url": "http://127.0.0.1:1/usercustomize.py"}}},
    "an overlay": {"model_args": {"pretrained_cfg_overlay": {"file": "any/file"}}},
    "a checkpoint": {"model_args": {"checkpoint_path": "any/file"}},
    "torchvision's weights": {"architecture": "torchvision/resnet18", "model_args": {"weights": "DEFAULT"}},
    "a folder": {"architecture": "local-dir:../x"},
    "the hub": {"architecture": "hf-hub:a/b"},
    "a path": {"architecture": "../x"},
    "an address as a name": {"architecture": "https://127.0.0.1/x"},
    "two lines": {"architecture": "resnet18\nresnet18"},
    "a detector": {"architecture": "torchvision/fasterrcnn_resnet50_fpn"},
    "a segmenter": {"architecture": "torchvision/fcn_resnet50"},
    "no name": {"architecture": 5},
    "arguments": {"model_args": [1]},
    "attach": {"mrla": {"attach": "light"}},
    "an unknown option": {"mrla": {"attach": {"method": "light", "chain_leng4h": 1}}},
    "no method": {"mrla": {"attach": {"mathod": "light"}}},
    "a width of text": {"mrla": {"attach": {"method": "light", "head_dim": "x"}}},
    "one label": {"pretrained_cfg": {"label_names": ["a"]}},
    "labels by number": {"pretrained_cfg": {"label_names": {"a": 1}}},
    "a word": {"pretrained_cfg": {"label_names": "abc"}},
    "a number": {"pretrained_cfg": {"label_names": 5}},
    "a short size": {"pretrained_cfg": {"input_size": [3]}},
    "a large size": {"pretrained_cfg": {"input_size": [3, 100000, 100000]}},
    "no size": {"pretrained_cfg": {"input_size": [3, 0, 64]}},
    "no channels": {"model_args": {"channels": ""}},
    "a list of none": {"model_args": {"channels": []}},
    "an object": {"model_args": {"channels": {}}},
}


@pytest.mark.parametrize("case", HARMFUL)
def test_nothing_is_fetched_opened_or_run_that_a_config_names(case, tmp_path, monkeypatch):
    def reached(*_: object, **__: object):
        raise AssertionError("the net was asked")

    mrla.save(MAKERS["plain"](), tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | HARMFUL[case]))
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr("socket.socket.connect", reached)
    with pytest.raises(
        ValueError, match=r"config\.json|resnet18 cannot be built|mixers cannot be attached as"
    ) as caught:
        mrla.load(tmp_path)
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_config_of_brackets_is_damaged(tmp_path):
    mrla.save(MAKERS["plain"](), tmp_path)
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"config\.json is damaged \(RecursionError"):
        mrla.load(tmp_path)


def test_arguments_of_loading_that_are_unset_are_left_out(tmp_path):
    model = MAKERS["plain"]().eval()
    mrla.save(model, tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["model_args"] |= {"pretrained": False, "checkpoint_path": "", "cache_dir": None}
    path.write_text(json.dumps(config))
    x = torch.randn(1, model.conv1.in_channels, 32, 32)
    assert torch.equal(mrla.load(tmp_path)(x), model(x))


def test_class_names_for_other_outputs_are_not_saved(tmp_path):
    with pytest.raises(ValueError, match=r"class_names must name every class: .* has label_names of 1 for 3 outputs"):
        mrla.save(MAKERS["plain"](), tmp_path, class_names=["a"])
    assert not list(tmp_path.iterdir())


def test_nothing_half_written_is_left(tmp_path, monkeypatch):
    mrla.save(MAKERS["plain"](), tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()

    def fail(tensors, path):
        path.write_bytes(b"half")
        raise RuntimeError("disk full")

    monkeypatch.setattr("mrla.models.checkpoints.store.save_file", fail)
    with pytest.raises(RuntimeError):
        mrla.save(MAKERS["attached"](), tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="the output folder must be writable"):
        mrla.save(MAKERS["plain"](), tmp_path / "file")


def test_arguments_that_are_not_json_are_refused(tmp_path):
    model = timm.create_model("resnet18", channels=(8, 8, 8, 8), act_layer=torch.nn.ReLU)
    with pytest.raises(ValueError, match="every argument of the network must be writable as JSON"):
        mrla.save(model, tmp_path / "net")
    assert not (tmp_path / "net").exists()


def test_unknown_arguments_are_refused():
    with pytest.raises(ValueError, match="resnet18 cannot be built with"):
        build("resnet18", {"no_such_argument": 1}, None)


@pytest.mark.parametrize("options", [{}, {"out_indices": (1, 3)}], ids=["every map", "two maps"])
@pytest.mark.parametrize("name", ["resnet18", "test_vit", "test_resnet_basic_cifar_mrla_light"])
def test_a_network_of_features_is_rebuilt_bit_for_bit(name, options, tmp_path):
    if name == "test_vit":
        options = {"out_indices": (1, 2)} if options else options
    model = timm.create_model(name, features_only=True, **options)
    if attach_recipe(model) is None and "mrla" not in name:
        mrla.attach(model, init="released")
    model = randomise_norms(model).eval()
    again = mrla.load(mrla.save(model, tmp_path))
    assert sum(isinstance(module, mrla.ops.LayerMixer) for module in again.modules()) > 0
    x = torch.randn(1, 3, 160, 160)
    assert all(torch.equal(one, other) for one, other in zip(again(x), model(x), strict=True))


@pytest.mark.parametrize("blocks", ["layer[12]", ["layer2"], lambda name, module: name in ("layer3", "layer4")])
def test_chosen_containers_of_a_torchvision_network_are_remembered(blocks, tmp_path):
    model = mrla.attach(torchvision.models.resnet18(num_classes=5), init="released", blocks=blocks)
    randomise_norms(model).eval()
    mrla.save(model, tmp_path, architecture="torchvision/resnet18", model_args={"num_classes": 5})
    again = mrla.load(tmp_path)
    assert list(again.state_dict()) == list(model.state_dict())
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(again(x), model(x))


@pytest.mark.parametrize("kind", ["attached", "named", "torchvision"])
def test_a_loaded_network_is_saved_without_being_told_anything(kind, tmp_path):
    given = {"architecture": "torchvision/resnet18"} if kind == "torchvision" else {}
    model = mrla.attach(torchvision.models.resnet18()) if given else MAKERS[kind]()
    names = [str(number) for number in range(getattr(model, "num_classes", 1000))]
    first = mrla.save(model, tmp_path / "first", class_names=names, std=(0.2,), **given)
    second = mrla.save(mrla.load(first), tmp_path / "second")
    assert read_config(second) == read_config(first)
    assert (second / "model.safetensors").read_bytes() == (first / "model.safetensors").read_bytes()


@pytest.mark.parametrize("kind", ["plain", "named", "reset", "pooling"])
def test_timm_reads_a_folder_as_load_does(kind, tmp_path):
    model = MAKERS["plain" if kind == "plain" else "named"]()
    if kind in ("reset", "pooling"):
        model.reset_classifier(7, "max" if kind == "pooling" else None)
    model = randomise_norms(model).eval()
    mrla.save(model, tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = torch.randn(1, model.conv1.in_channels, 64, 64)
    assert torch.equal(again(x), model(x))
    assert torch.equal(mrla.load(tmp_path)(x), model(x))


def test_timm_does_not_fill_up_a_saved_network_that_lacks_a_mixer(tmp_path):
    mrla.save(MAKERS["named"](), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights[next(name for name in weights if name.endswith(".mrla.query_weight"))]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(RuntimeError, match=r"Missing key.*mrla"):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True)


def test_a_pooling_that_was_changed_before_attach_is_remembered(tmp_path):
    model = timm.create_model("test_vit")
    model.reset_classifier(4, "avg")
    randomise_norms(mrla.attach(model, init="released")).eval()
    x = torch.randn(1, 3, 160, 160)
    assert torch.equal(mrla.load(mrla.save(model, tmp_path))(x), model(x))


def test_a_pooling_that_was_changed_after_attach_gets_the_remedy(tmp_path):
    model = mrla.attach(timm.create_model("test_vit"))  # the last block has none, for only its class token is read
    model.reset_classifier(4, "avg")
    with pytest.raises(ValueError, match=r"blocks.5.mrla.query_weight is missing.*; detach it, change what"):
        mrla.save(model, tmp_path)
    mrla.detach(model)
    mrla.save(mrla.attach(model), tmp_path)


@pytest.fixture
def dry_runs(monkeypatch):
    runs = []
    monkeypatch.setattr(
        "mrla.models.attachment.dry_run", lambda model, shape=None: runs.append(model) or dry_run(model, shape)
    )
    return runs


def test_a_network_is_rebuilt_once_for_every_way_it_is_described(dry_runs, tmp_path):
    model = small()
    dry_runs.clear()
    mrla.save(model, tmp_path)
    mrla.save(model, tmp_path, state_dict={name: tensor + 1 for name, tensor in model.state_dict().items()})
    assert len(dry_runs) == 2  # attach looks before and after
    model.reset_classifier(3, "max")  # described anew, and with another pooling still in one attach
    mrla.save(model, tmp_path)
    assert len(dry_runs) == 4
    mrla.save(small(), tmp_path)  # its own attach, then its own description
    assert len(dry_runs) == 8
    mrla.detach(model)
    assert read_config(mrla.save(model, tmp_path))["mrla"]["attach"] is None
    assert len(dry_runs) == 8


def test_what_is_remembered_of_a_network_does_not_let_other_weights_pass(tmp_path):
    model = small()
    config = describe(model, model.state_dict())
    config["model_args"]["num_classes"] = 99
    assert describe(model, model.state_dict())["model_args"] == {"channels": [8, 8, 8, 8]}
    weights = model.state_dict()
    del weights["fc.bias"]
    with pytest.raises(ValueError, match=r"1 differences: fc\.bias is missing"):
        mrla.save(model, tmp_path, state_dict=weights)
    model.fc = torch.nn.Linear(8, 2)  # behind timm's back
    with pytest.raises(ValueError, match=r"fc\.weight is \(2, 8\), the network's is \(1000, 8\)"):
        mrla.save(model, tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lower_precision_keeps_its_values(dtype, tmp_path):
    model = randomise_norms(small()).eval().to(dtype)
    again = mrla.load(mrla.save(model, tmp_path))
    assert {tensor.dtype for tensor in again.state_dict().values()} == {torch.float32, torch.int64}
    x = torch.randn(1, 3, 64, 64, dtype=dtype)
    assert torch.equal(again.to(dtype)(x), model(x))
    stored = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(tensor, stored[name]) for name, tensor in model.state_dict().items())


def test_weights_in_any_layout_are_saved(tmp_path):
    model = randomise_norms(small()).to(memory_format=torch.channels_last)
    model.fc.weight.data = model.fc.weight.data.T.contiguous().T
    assert not model.fc.weight.is_contiguous()
    again = mrla.load(mrla.save(model, tmp_path)).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())


def test_tied_weights_are_saved_under_each_of_their_names(tmp_path):
    model = small()
    model.layer2[1].conv2.weight = model.layer2[1].conv1.weight
    again = mrla.load(mrla.save(randomise_norms(model).eval(), tmp_path))
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(again(x), model(x))
    # Views of one tensor too, as flattened parameters are.
    flat = torch.randn(1000 * 8 + 4)
    views = {**model.state_dict(), "fc.weight": flat[4:].view(1000, 8), "fc.bias": flat[:1000]}
    mrla.save(model, tmp_path, state_dict=views)
    stored = load_file(tmp_path / "model.safetensors")
    assert torch.equal(stored["fc.weight"].flatten(), flat[4:])
    assert torch.equal(stored["fc.bias"], flat[:1000])


def test_weights_without_values_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"weights must have values to be saved: conv1\.weight is on the meta device"):
        mrla.save(small().to("meta"), tmp_path / "net")
    assert not (tmp_path / "net").exists()


@pytest.mark.unchecked
def test_facts_that_are_not_json_are_refused(tmp_path):
    with pytest.raises(ValueError, match="class_names, input_size, mean and std must be writable as JSON"):
        mrla.save(small(), tmp_path / "net", mean=torch.zeros(3))
    assert not (tmp_path / "net").exists()


@pytest.mark.parametrize("at", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupted_save_leaves_the_old_folder(at, error, tmp_path, monkeypatch):
    old = MAKERS["plain"]().eval()
    mrla.save(old, tmp_path)

    def interrupted(*_):
        raise error

    if at == "config.json":
        monkeypatch.setattr("pathlib.Path.write_text", interrupted)
    else:
        monkeypatch.setattr("mrla.models.checkpoints.store.save_file", interrupted)
    with pytest.raises(error if isinstance(error, type) else type(error)):
        mrla.save(MAKERS["attached"](), tmp_path)
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    x = torch.randn(1, 1, 64, 64)
    assert torch.equal(mrla.load(tmp_path)(x), old(x))


def test_loading_draws_no_random_numbers(tmp_path):
    mrla.save(MAKERS["named"](), tmp_path)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    mrla.load(tmp_path)
    assert torch.equal(torch.rand(1), expected)


def net(**options):
    """A small network with mixers whose every part has values of its own."""
    return randomise_norms(small(**options)).eval()


def of_block(model, index=1):
    return model.layer2.get_submodule(str(index))


CHANGES = {
    "eps": (lambda m: setattr(m.bn1, "eps", 1e-2), r"bn1\.eps is 0\.01, and 1e-05 in the network"),
    "an activation": (lambda m: setattr(of_block(m), "act2", torch.nn.GELU()), r"layer2\.1\.act2 is GELU, and ReLU"),
    "a missing part": (lambda m: setattr(m, "maxpool", torch.nn.Identity()), r"maxpool is Identity, and MaxPool2d"),
    "a pool's size": (lambda m: setattr(m.maxpool, "stride", 1), r"maxpool is MaxPool2d\(kernel_size=3, stride=1"),
    "a convolution's": (lambda m: setattr(m.conv1, "stride", (1, 1)), r"conv1 is Conv2d\(.*stride=\(1, 1\)"),
    "a mixer's norm": (lambda m: setattr(of_block(m).mrla.norm, "eps", 1e-2), r"layer2\.1\.mrla\.norm\.eps is 0\.01"),
    "one more": (
        lambda m: m.add_module("extra", torch.nn.Identity()),
        r"extra is Identity, and missing in the network",
    ),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_what_cannot_be_written_down_is_refused_with_the_first_difference(kind, tmp_path):
    change, message = CHANGES[kind]
    model = net()
    change(model)
    with pytest.raises(ValueError, match=message) as refusal:
        mrla.save(model, tmp_path / "net")
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "net").exists()


def test_what_changes_no_output_is_no_difference(tmp_path):
    """Hooks on an activation need it not to work in place; statistics are collected anew with another momentum."""
    model = net()
    of_block(model).bn2.momentum, of_block(model, 0).bn2.momentum = None, 1.0
    for module in model.modules():
        if isinstance(module, torch.nn.ReLU):
            module.inplace = not module.inplace
    mrla.save(model, tmp_path)


TIES = {
    "a convolution": lambda m: setattr(of_block(m), "conv1", of_block(m).conv2),
    "two stages' blocks": lambda m: setattr(m.layer3.get_submodule("1"), "conv2", m.layer3.get_submodule("1").conv1),
    "a mixer's norm": lambda m: setattr(of_block(m).mrla, "norm", of_block(m, 0).mrla.norm),
    "a parameter": lambda m: setattr(of_block(m).conv1, "weight", of_block(m).conv2.weight),
    "two of each": lambda m: (TIES["a convolution"](m), TIES["two stages' blocks"](m)),
}


@pytest.mark.parametrize("kind", TIES)
def test_what_two_places_share_comes_back_shared(kind, tmp_path):
    model = net()
    TIES[kind](model)
    again = mrla.load(mrla.save(model, tmp_path))
    assert sum(p.numel() for p in again.parameters()) == sum(p.numel() for p in model.parameters())
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(again(x), model(x))
    once_more = mrla.load(mrla.save(again, tmp_path / "again"))
    assert torch.equal(once_more(x), model(x))


@pytest.mark.parametrize(
    "ties",
    [
        {"modules": {"layer2": "layer2.0"}, "parameters": {}},
        {"modules": {"layer2.0": "layer2"}, "parameters": {}},
        {"modules": {"": "layer2"}, "parameters": {}},
        {"modules": {"nowhere": "layer2"}, "parameters": {}},
        {"modules": {"layer2": "nowhere"}, "parameters": {}},
        {"modules": {}, "parameters": {"fc.weight": "fc.nothing"}},
        {"modules": {}, "parameters": {"fc.forward": "fc.weight"}},
        {"modules": {"layer2": 5}, "parameters": {}},
        {"modules": []},
        "layer2",
    ],
)
def test_ties_that_cannot_be_are_refused_in_one_line(ties, tmp_path):
    mrla.save(net(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["mrla"]["ties"] = ties
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r".") as refusal:
        mrla.load(tmp_path)
    assert "\n" not in str(refusal.value)


def test_weights_of_another_save_are_noticed_and_older_folders_load(tmp_path, monkeypatch):
    """What is left by a kill between the two renames, for a network of the same shapes."""
    monkeypatch.setattr("mrla.models.checkpoints.store.time.sleep", lambda _: None)
    first, second = net(), net()
    mrla.save(first, tmp_path / "first", class_names=[str(at) for at in range(1000)])
    mrla.save(second, tmp_path / "second")
    (tmp_path / "second" / "model.safetensors").replace(tmp_path / "first" / "model.safetensors")
    with pytest.raises(ValueError, match=r"first/model\.safetensors is not what .*config\.json was written with"):
        mrla.load(tmp_path / "first")
    config = json.loads((tmp_path / "first" / "config.json").read_text())
    del config["mrla"]["weights_sha256"]
    (tmp_path / "first" / "config.json").write_text(json.dumps(config))
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(mrla.load(tmp_path / "first")(x), second(x))


@pytest.mark.parametrize("then", ["load", "save"])
def test_a_kill_between_the_two_renames_loses_nothing(tmp_path, then):
    import os
    from unittest.mock import patch

    first, second, third = net(), net(), net()
    mrla.save(first, tmp_path, mean=(0.0, 0.0, 0.0))
    replace, done = type(tmp_path).replace, []

    def killed(path, target):
        if done:
            os._exit(9)
        done.append(target)
        return replace(path, target)

    process = os.fork()
    if process == 0:
        with patch("pathlib.Path.replace", killed):
            mrla.save(second, tmp_path, mean=(1.0, 1.0, 1.0))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 9
    if then == "save":  # which finishes the other before it begins
        with (
            patch("mrla.models.checkpoints.store.save_file", side_effect=OSError("broken off")),
            pytest.raises(OSError, match="broken off"),
        ):
            mrla.save(third, tmp_path)
    again = mrla.load(tmp_path)
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(again(x), second(x))
    assert list(again.pretrained_cfg["mean"]) == [1.0] * 3


def test_a_reader_beside_a_writer_gets_one_save_or_the_other(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    models = [net(), net()]
    x = torch.randn(1, 3, 64, 64)
    expected = [model(x) for model in models]
    mrla.save(models[0], tmp_path, mean=(0.0, 0.0, 0.0))

    def write():
        for turn in range(20):
            mrla.save(models[turn % 2], tmp_path, mean=[float(turn % 2)] * 3)

    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(write)
        while not writing.done():
            model = mrla.load(tmp_path)
            which = int(model.pretrained_cfg["mean"][0])
            assert torch.equal(model(x), expected[which])
        writing.result()


def test_weights_that_are_not_numbers_are_refused_unless_asked_for(tmp_path):
    model = net()
    with torch.no_grad():
        of_block(model).conv1.weight[0, 0, 0, 0] = float("nan")
    mrla.save(model, tmp_path)
    with pytest.raises(ValueError, match=r"weights that are NaN, the first layer2\.1\.conv1\.weight.*allow_nan=True"):
        mrla.load(tmp_path)
    assert mrla.load(tmp_path, allow_nan=True).layer2 is not None


@pytest.mark.parametrize(
    "arguments",
    [
        {"channels": [100_000, 8, 8, 8]},
        {"layers": [5000, 2, 2, 2]},
        {"channels": [10**30, 8, 8, 8]},
        {"in_chans": -1},
        {"channels": ""},
        {"channels": []},
        {"channels": {}},
        {"weights_anything": "file"},
        {"pretrained_of_tomorrow": True},
    ],
)
def test_a_description_of_another_size_is_refused_before_memory_is_taken(arguments, tmp_path):
    mrla.save(net(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["model_args"] |= arguments
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r".") as refusal:
        mrla.load(tmp_path)
    assert "\n" not in str(refusal.value)
