import json

import pytest
import timm
import torch
import torchvision
from conftest import randomise_norms

import mrla
from mrla.models import attach_recipe, build, read_config

MAKERS = {
    "plain": lambda: timm.create_model("resnet18", num_classes=3, in_chans=1, channels=(8, 8, 8, 8)),
    "attached": lambda: mrla.attach(timm.create_model("resnet18", channels=(8, 8, 8, 8)), head_dim=4, init="released"),
    "named": lambda: timm.create_model("test_resnet_basic_cifar_mrla_light", mixer={"heads": 2}),
    "detached name": lambda: mrla.detach(timm.create_model("test_resnet_basic_cifar_mrla_light")),
    "eca": lambda: timm.create_model("resnet18", channels=(8, 8, 8, 8), block_args={"attn_layer": "eca"}),
}


@pytest.mark.parametrize("kind", MAKERS)
def test_a_saved_network_is_rebuilt_bit_for_bit(kind, tmp_path):
    model = randomise_norms(MAKERS[kind]()).eval()
    folder = mrla.save(model, tmp_path / "net", class_names=["a", "b"], mean=(0.5,))
    again = mrla.load(folder)
    assert not again.training
    x = torch.randn(2, model.conv1.in_channels, 64, 64)
    assert torch.equal(again(x), model(x))
    assert list(again.state_dict()) == list(model.state_dict())
    assert attach_recipe(again) == attach_recipe(model)
    assert read_config(folder)["pretrained_cfg"]["label_names"] == ["a", "b"]
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


def test_damage_is_named(tmp_path):
    model = MAKERS["plain"]()
    with pytest.raises(ValueError, match=r"a saved network is a folder with config\.json"):
        mrla.load(tmp_path)
    mrla.save(model, tmp_path)
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"model\.safetensors is missing or damaged"):
        mrla.load(tmp_path)
    weights.unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors is missing or damaged"):
        mrla.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        mrla.load(tmp_path)


def test_weights_of_another_network_are_refused_with_the_first_differences(tmp_path):
    mrla.save(MAKERS["plain"](), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["model_args"]["num_classes"] = 4
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"of another network than resnet18 \(2 differences: fc.weight is \(3, 8\)"):
        mrla.load(tmp_path)
    config["architecture"] = "resnet18_no_such"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="resnet18_no_such cannot be built"):
        mrla.load(tmp_path)


def test_nothing_half_written_is_left(tmp_path, monkeypatch):
    mrla.save(MAKERS["plain"](), tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()

    def fail(tensors, path):
        path.write_bytes(b"half")
        raise RuntimeError("disk full")

    monkeypatch.setattr("mrla.models.checkpoints.save_file", fail)
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
