"""A kind of images that stands in one file of a user's: commands train on it, score it, and read its run again."""

import importlib.util
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_runs import CPU, OPTIM, tiny

import mrla
from mrla.analysis.comparison import runs as comparison_runs
from mrla.cli import main
from mrla.data import DATA_KINDS, SampleKey
from mrla.train.recipe import as_dict, from_dict
from mrla.train.trained import load_trained

README = Path(mrla.__file__).parent / "data" / "sources" / "README.md"
TRAIN = ["train", "--data.kind", "stripes", "--data.per_class", "8", "--model_args", '{"channels": [8, 8, 8, 8]}']
TRAIN += ["--epochs", "1", "--batch_size", "8", "--progress", "false", "--out", "run"]


@pytest.fixture
def stripes(tmp_path, monkeypatch):
    """The class that the README shows, in a file of its own, registered by importing it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    before = dict(DATA_KINDS)
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    (tmp_path / "stripes.py").write_text(code)
    spec = importlib.util.spec_from_file_location("stripes", tmp_path / "stripes.py")
    monkeypatch.setitem(sys.modules, "stripes", module := importlib.util.module_from_spec(spec))
    spec.loader.exec_module(module)
    yield module.Stripes
    DATA_KINDS.clear()
    DATA_KINDS.update(before)


def test_commands_train_on_it_score_it_and_read_its_run_again(stripes, capsys):
    assert main([*TRAIN]) == 0, capsys.readouterr().err
    settings = json.loads(Path("run/run.json").read_text())["settings"]
    assert settings["data"] == {"kind": "stripes", "workers": 0, "per_class": 8}
    recipe = from_dict(settings)
    assert recipe.data == stripes(per_class=8)
    assert from_dict(json.loads(json.dumps(as_dict(recipe)))) == recipe
    config = json.loads(Path("run/config.json").read_text())
    assert config["pretrained_cfg"]["input_size"] == [1, 8, 8]
    capsys.readouterr()

    assert main(["eval", "run"]) == 0
    assert "val part, 16 images" in capsys.readouterr().out
    assert main(["eval", "run", "--data.kind", "stripes", "--data.per_class", "3", "--split", "test"]) == 0
    assert "test part, 6 images" in capsys.readouterr().out
    assert main(["eval", "run", "--data.root", "elsewhere"]) == 2
    assert "stripes lie in no folder" in capsys.readouterr().err

    assert main([*TRAIN]) == 0
    assert "was finished before" in capsys.readouterr().out
    model, read, names = load_trained("run/checkpoints/last.ckpt")
    assert (read, names) == (recipe, ("horizontal", "vertical"))
    with torch.no_grad():
        assert model(recipe.data.open("val")[SampleKey(0, 0)][0][None]).shape == (1, 2)

    del DATA_KINDS["stripes"]
    assert main(["eval", "run"]) == 2
    said = capsys.readouterr().err
    assert "or a kind of your own, whose file is imported by a command's --plugins FILE.py: got 'stripes'" in said


def test_a_comparison_tells_its_processes_of_the_file(stripes, monkeypatch):
    told = []

    def start(folder, recipe, plugins):
        told.append(list(plugins))
        raise ValueError("enough is seen")

    monkeypatch.setattr(comparison_runs, "_start", start)
    recipe = replace(tiny(), data=stripes(per_class=8), batch_size=8)
    with pytest.raises(ValueError, match="enough is seen"):
        mrla.compare(recipe, seeds=2, out="run")
    assert told == [[str(Path("stripes.py").resolve())]]


def test_its_fields_are_flags_with_the_help_of_its_docstring(stripes, capsys):
    assert main(["train", "--data.kind", "stripes", "--help"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "Images of horizontal and vertical stripes" in said
    assert "--data.per_class PER_CLASS How many there are of each class in each part. (type: int, default: 32)" in said
    assert main(["eval", "--help"]) == 0
    assert "shapes, stripes" in " ".join(capsys.readouterr().out.split())
    assert main(["train", "--data.kind", "stripe"]) == 2
    assert "did you mean 'stripes'?" in capsys.readouterr().err
    assert main(["train", "--data.per_class", "8"]) == 2
    assert "are digits and have no --data.per_class: say --data.kind stripes" in capsys.readouterr().err


def test_it_learns(stripes, tmp_path):
    recipe = tiny(data=stripes(per_class=32), epochs=2, batch_size=8, optim=replace(OPTIM, lr=0.01), machine=CPU)
    run = mrla.train.train(recipe, tmp_path / "learns", progress=False)
    assert run.result["last"]["train_accuracy"] == 1.0  # in validation BatchNorm's means lag behind so few steps


def test_a_recipe_takes_images_of_its_task_alone(stripes):
    from mrla.train.recipes import get_recipe

    with pytest.raises(ValueError, match=r"data\.kind must be one of coco, voc, shapes for a detector: got stripes"):
        replace(get_recipe("shapes_mask_rcnn"), data=stripes())
