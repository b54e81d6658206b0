"""Comparing from Python: a network in hand and two loaders, with and without mixers."""

import copy
import json
from dataclasses import replace

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler, TensorDataset, WeightedRandomSampler

import mrla
from mrla.analysis import compare
from mrla.analysis.comparison import runs as comparison_runs
from mrla.cli.printing import print_comparison
from mrla.train import Machine, Optim, get_recipe

RECIPE = replace(
    get_recipe("finetune"),
    epochs=2,
    optim=Optim(lr=0.1, frozen_epochs=1, old_lr_scale=0.5),
    machine=Machine(accelerator="cpu", threads=1),
)


def network() -> nn.Module:
    return timm.create_model("resnet18", channels=(8, 8, 8, 8), num_classes=3)


def batches(count: int, *, shuffle: bool = False) -> DataLoader:
    images = torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(count))
    return DataLoader(TensorDataset(images, torch.arange(count) % 3), batch_size=6, shuffle=shuffle)


def given(**changes):
    return {"model": network(), "train_loader": batches(18, shuffle=True), "val_loader": batches(9), **changes}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    torch.manual_seed(0)
    own = given()
    before = copy.deepcopy(own["model"].state_dict())
    progress: list[tuple[int, int]] = []
    result = compare(
        RECIPE,
        **own,
        seeds=2,
        out=tmp_path_factory.mktemp("own") / "out",
        on_progress=lambda *counts: progress.append(counts),
    )
    assert progress == [(2, 8), (4, 8), (6, 8), (8, 8)]
    after = own["model"].state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not mrla.models.is_attached(own["model"])
    return own, result


def test_every_arm_and_seed_is_there(done):
    _, result = done
    content = json.loads((result.folder / "compare.json").read_text())
    assert content == result.content
    assert content["arms"] == ["plain", "light"]
    assert content["seeds"] == [0, 1]
    assert content["recipe"]["model"] == "resnet18"
    assert content["recipe"]["model_args"] == {"channels": [8, 8, 8, 8], "num_classes": 3}
    assert content["recipe"]["data"] == {"kind": "loaders"}
    assert content["recipe"]["optim"]["frozen_epochs"] == 1
    for arm in content["arms"]:
        assert len(content["table"][arm]["val_accuracy"]["values"]) == 2
        assert content["table"][arm]["images_per_second"]["batch_size"] == 6
    assert content["table"]["light"]["macs"] > content["table"]["plain"]["macs"] > 0
    assert (result.folder / "curves.png").stat().st_size > 1000
    light = mrla.load(result.folder / "runs" / "light-seed1")
    assert mrla.models.is_attached(light)


def test_arms_start_from_the_same_weights(done):
    own, _ = done
    source = comparison_runs.OwnRuns(RECIPE, *own.values(), None, None)
    plain, light, again, other = (
        source.network(arm, seed).state_dict() for arm, seed in (("plain", 0), ("light", 0), ("light", 0), ("light", 1))
    )
    weights = own["model"].state_dict()
    assert all(torch.equal(plain[name], weights[name]) and torch.equal(light[name], weights[name]) for name in weights)
    assert all(torch.equal(light[name], again[name]) for name in light)
    assert not torch.equal(light["layer1.0.mrla.value_weight"], other["layer1.0.mrla.value_weight"])


def test_finished_is_not_repeated(done, monkeypatch):
    own, result = done
    monkeypatch.setattr("mrla.train.fitting.L.Trainer.fit", lambda *_, **__: pytest.fail("a run was repeated"))
    again = compare(RECIPE, **own, seeds=2, out=result.folder)
    assert again.verdicts == result.verdicts
    assert again.content["epochs"] == result.content["epochs"]


def test_another_start_does_not_go_on_in_the_folder(done):
    own, result = done
    other = copy.deepcopy(own["model"])
    with torch.no_grad():
        other.conv1.weight[0, 0, 0, 0] += 1e-3
    with pytest.raises(ValueError, match=r"belongs to a run with other settings \(compare\.start\.plain is"):
        compare(RECIPE, **{**own, "model": other}, seeds=2, out=result.folder)


def drawn(size: int, count: int) -> DataLoader:
    """Of a sampler of the caller's."""
    images = batches(count).dataset
    return DataLoader(images, batch_size=size, sampler=WeightedRandomSampler([1.0] * count, count))


@pytest.mark.parametrize(
    ("train_loader", "said"),
    [
        (batches(18), True),
        (DataLoader(batches(18).dataset, batch_sampler=BatchSampler(SequentialSampler(range(18)), 6, False)), True),
        (batches(18, shuffle=True), False),
        (drawn(6, 18), False),
    ],
    ids=["in order", "in order by a batch sampler", "shuffled", "drawn"],
)
def test_loaders_that_do_not_shuffle_are_noted(train_loader, said):
    own = given(train_loader=train_loader)
    assert comparison_runs.OwnRuns(RECIPE, *own.values(), None, None).notes == [comparison_runs.SAME_ORDER] * said


def test_the_note_on_the_order_stands_in_every_result(tmp_path, capsys):
    result = compare(RECIPE, **given(train_loader=batches(18)), seeds=2, out=tmp_path / "out")
    assert result.content["notes"] == [comparison_runs.SAME_ORDER]
    assert json.loads((result.folder / "compare.json").read_text())["notes"] == [comparison_runs.SAME_ORDER]
    assert comparison_runs.SAME_ORDER.partition(":")[0] in (result.folder / "report.html").read_text()
    print_comparison(result.content, result.folder)
    assert comparison_runs.SAME_ORDER in " ".join(capsys.readouterr().out.split())
    # Three classes: each of them is among the five most likely.
    assert not [name for name in result.content["table"]["light"] if "top5" in name]
    for file in ("compare.json", "table.csv", "history.csv", "report.html"):
        assert "top5" not in (result.folder / file).read_text()


def test_a_network_of_torchvision(tmp_path):
    model = torchvision.models.mobilenet_v3_small(num_classes=3)
    named = {"architecture": "torchvision/mobilenet_v3_small", "model_args": {"num_classes": 3}}
    result = compare(RECIPE, **given(model=model), **named, seeds=1, out=tmp_path / "out")
    assert result.content["recipe"]["model"] == "torchvision/mobilenet_v3_small"


def test_the_recipe_for_a_network_in_hand_is_finetune(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(comparison_runs.OwnRuns, "make", lambda self, *_: seen.append(self.recipe) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        compare(**given(), seeds=1, out=tmp_path)
    assert seen[0].recipe == "finetune"
    assert seen[0].init == "identity"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_loader": None}, "go together: give train_loader too"),
        ({"model": None, "val_loader": None}, "go together: give model and val_loader too"),
        ({"model": "attached"}, "model must be a plain network, since the arms differ in their mixers"),
        ({"val_loader": DataLoader([])}, "val_loader must have at least one image: it has none"),
        ({"arms": ("plain", "se")}, "arms of your own model must be plain or of light, base, exact, dw: got 'se'"),
        ({"recipe": replace(RECIPE, machine=Machine(devices=2))}, r"on one device: got machine.devices=2"),
        ({"model": torchvision.models.alexnet(num_classes=3)}, "timm did not make this AlexNet"),
    ],
    ids=["train", "two", "attached", "empty", "arm", "devices", "name"],
)
def test_refused_before_anything_is_written(changes, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if changes.get("model") == "attached":
        changes = {"model": mrla.attach(network())}
    with pytest.raises(ValueError, match=message):
        compare(**{"recipe": RECIPE, **given(), "seeds": 1, **changes})
    assert list(tmp_path.iterdir()) == []


def test_labels_of_several_classes_are_refused(tmp_path):
    several = DataLoader(TensorDataset(torch.randn(4, 3, 16, 16), torch.ones(4, 3)), batch_size=2)
    with pytest.raises(ValueError, match="labels must be one class for each image"):
        compare(RECIPE, **given(val_loader=several), seeds=1, out=tmp_path / "out")
    assert not list(tmp_path.iterdir())
