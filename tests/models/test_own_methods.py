"""The worked example of docs/extend/method.md: a method of a user's own, whose mixers share a module."""

import copy
import re
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import mrla
from mrla.models import mixed_chains, recording, remove_mixers
from mrla.models.attachment import is_attached
from mrla.ops import METHODS, LayerMixer

PAGE = Path(__file__).parents[2] / "docs" / "extend" / "method.md"
CELL = "layer1.0.mrla.cell.weight_ih"


@pytest.fixture(autouse=True)
def example(monkeypatch):
    """The page's file, run once; afterwards its method is gone again."""
    code = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[0]
    names: dict = {"__name__": "my_methods"}
    exec(compile(code, str(PAGE), "exec"), names)
    yield names
    del METHODS["dia"]


def network(**options) -> nn.Module:
    model = timm.create_model("resnet18", channels=(8, 8, 8, 8), num_classes=3)
    return mrla.attach(model, "dia", init="released", **options).eval()


def image() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32)


def test_one_cell_a_stage_looks_at_every_block():
    model = network()
    cells = {name: module for name, module in model.named_modules() if isinstance(module, nn.LSTMCell)}
    assert list(cells) == [f"layer{stage}.0.mrla.cell" for stage in range(1, 5)]
    calls = []
    cells["layer1.0.mrla.cell"].register_forward_hook(lambda *_: calls.append(1))
    model(image())
    assert len(calls) == 2


def test_it_learns_from_every_block():
    model = network().train()
    # Large enough that a map has an inside and a border: behind a constant one the next norm takes a bias away.
    model(torch.randn(2, 3, 96, 96)).square().sum().backward()
    mixers = {name: part.grad for name, part in model.named_parameters() if ".mrla." in name}
    assert [name for name, grad in mixers.items() if grad is None or not grad.any()] == []


def test_a_chain_that_begins_anew_has_a_cell_of_its_own():
    model = network(chain_length=1)
    assert sum(isinstance(module, nn.LSTMCell) for module in model.modules()) == 8


def test_it_survives_copy_save_load_and_detach(tmp_path):
    model, x = network(), image()
    before = model(x)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), before)
    twin.state_dict()[CELL].add_(1)
    assert torch.equal(model(x), before)  # the copy's cell is its own
    assert not torch.equal(twin(x), before)
    loaded = mrla.load(mrla.save(model, tmp_path / "net"))
    assert torch.equal(loaded(x), before)
    assert loaded.layer1[1].mrla.cell is loaded.layer1[0].mrla.cell
    plain = mrla.detach(model)
    assert not is_attached(plain)
    assert not any("cell" in name for name in plain.state_dict())


def test_the_folder_names_the_plugin_and_does_not_run_it(tmp_path, example):
    model = network()
    mrla.save(model, tmp_path / "net")
    kept = METHODS.pop("dia")
    try:
        with pytest.raises(ValueError, match=r"config\.json names 'dia' of the plugin 'my_methods.*--plugins"):
            mrla.load(tmp_path / "net")
    finally:
        METHODS["dia"] = kept


def test_a_chain_without_its_head_keeps_the_cell(tmp_path):
    model, x = network(), image()
    remove_mixers(model, ["layer1.0"])
    assert "layer1.1.mrla.cell.weight_ih" in model.state_dict()
    out = model(x)
    loaded = mrla.load(mrla.save(model, tmp_path / "net"))
    assert torch.equal(loaded(x), out)
    assert mixed_chains(loaded)[0].mixers == ("layer1.1",)


def test_its_parameters_are_in_the_mixers_group():
    groups = mrla.param_groups(network(), lr=1.0, weight_decay=0.1)
    (cell,) = [group for group in groups if any(part.shape == (32, 8) for part in group["params"])]
    assert cell["lr"] == 1.0


def test_what_says_nothing_of_contributions_records_nothing():
    model = network()
    with torch.no_grad(), recording(model) as noted:
        model(image())
    assert noted.attention_over_layers() == []


def test_an_option_that_it_does_not_take_is_refused():
    with pytest.raises(TypeError, match=r"method 'dia' takes .*norm.*: got width"):
        network(width=3)


@pytest.mark.parametrize("wrong", ["too few", "one for all", "none of ours"])
def test_what_build_chain_must_give(wrong, monkeypatch):
    usual = METHODS["dia"].build_chain

    def build_chain(sites, **options):
        built = list(usual(sites, **options))
        match wrong:
            case "too few":
                return built[1:]
            case "one for all":
                return [built[0]] * len(built)
        return [nn.Identity() for _ in built]

    monkeypatch.setattr(METHODS["dia"], "build_chain", build_chain)
    model = timm.create_model("resnet18")
    with pytest.raises((ValueError, TypeError), match="build_chain must give"):
        mrla.attach(model, "dia")
    assert not any(isinstance(module, LayerMixer) for module in model.modules())
