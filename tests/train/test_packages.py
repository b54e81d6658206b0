"""What is not installed is said before anything is read or written."""

import sys

import pytest
import timm
from tiny_runs import tiny, tiny_detection

import mrla
from mrla.cli import main
from mrla.train.fitting import train
from mrla.train.packages import need


def test_the_first_that_is_missing_is_named():
    need("torch", "timm")
    with pytest.raises(ModuleNotFoundError, match=r"no_such_package is not installed.*pip install 'mrla\[train\]'"):
        need("torch", "no_such_package", "another")


COMMANDS = {
    "tensorboard": (["train", "--out", "out"], ["compare", "--out", "out"]),
    "bokeh": (["compare", "--out", "out"],),
    "pycocotools": (["train", "--recipe", "shapes_mask_rcnn", "--out", "out"],),
    "captum": (["explain", "nowhere"],),
    "scipy": (["prune", "nowhere"], ["explain", "nowhere"], ["compare", "--out", "out"]),
    "matplotlib": (["predict", "nowhere", "x.png"],),
    "onnx": (["export", "nowhere"],),
}


@pytest.mark.parametrize("missing", COMMANDS)
def test_commands_say_it_first(missing, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, missing, None)
    for words in COMMANDS[missing]:
        assert main(words) == 2
        error = capsys.readouterr().err
        assert error.startswith("mrla: error: ")
        assert error.count("\n") == 1
        assert missing in error
        assert "pip install 'mrla[" in error
    assert not list(tmp_path.iterdir())


def test_so_does_python(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ModuleNotFoundError, match="tensorboard is not installed"):
        train(tiny(), tmp_path / "run")
    with pytest.raises(ModuleNotFoundError, match="tensorboard is not installed"):
        mrla.fit(timm.create_model("test_resnet"), None, None, epochs=1, out=tmp_path / "run")
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'mrla\[dense\]'|tensorboard"):
        train(tiny_detection(), tmp_path / "run")
    assert not list(tmp_path.iterdir())
