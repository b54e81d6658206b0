"""A disk that is full: one line that names the file, nothing half-written, and the same command goes on."""

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file
from test_cli import TINY

from mrla.cli import main

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")
QUIET = ["--machine.accelerator", "cpu", "--machine.threads", "1", "--progress", "false"]
STUDY = ["--max_images", "20", *QUIET]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert main(["train", *TINY, "--out", str(folder)]) == 0
    return folder


def refused(words: list[str], file: str, capsys) -> None:
    assert main(words) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.count("\n") == 1, told.err
    reason = os.strerror(errno.EFBIG)
    assert f"{file} cannot be written ({reason}); make room there and start the same command again" in told.err


def test_train_goes_on_when_there_is_room(trained, small_files, capsys):
    with small_files(60_000):  # less than a checkpoint
        refused(["train", *TINY, "--out", "run"], "run/checkpoints/best.ckpt", capsys)
    assert not list(Path("run/checkpoints").iterdir())
    with small_files(200):
        refused(["train", *TINY, "--out", "other"], "other/run.json", capsys)
    assert not Path("other").exists()
    assert main(["train", *TINY, "--out", "run"]) == 0
    weights, others = load_file("run/model.safetensors"), load_file(trained / "model.safetensors")
    assert all(weights[name].equal(others[name]) for name in others)
    assert not list(Path("run").rglob(".*"))


def test_tensorboards_file(small_files, monkeypatch, capsys):
    """A thread of its own writes it."""
    monkeypatch.setattr("mrla.train.runs.write_json", lambda path, content: None)
    with small_files(40):
        refused(["train", *TINY, "--out", "run"], "run/tensorboard", capsys)


@pytest.mark.parametrize(
    ("format", "suffix"),
    [
        ("onnx", ".onnx"),
        pytest.param("torch_export", ".pt2", marks=pytest.mark.sweep),
        pytest.param("openvino", ".xml", marks=pytest.mark.sweep),
    ],
)
def test_export(trained, format, suffix, small_files, capsys):
    with small_files(20_000):
        refused(["export", str(trained), "--format", format], f"run{suffix}", capsys)
    assert not list(Path().iterdir())


@pytest.mark.parametrize(
    ("words", "file"),
    [
        (["explain", "RUN", "--cuts", "", "--out", "said", *STUDY], "said/"),
        (["prune", "RUN", "--keep", "2", "--margin", "100", "--out", "said", *STUDY], "said/model.safetensors"),
        (["predict", "RUN", "one.png", "--out", "said", *QUIET], "said/one.png"),
    ],
    ids=["explain", "prune", "predict"],
)
def test_what_studies_a_network(trained, words, file, small_files, capsys):
    pixels = np.random.default_rng(0).random((64, 64, 3)) * 255
    Image.fromarray(pixels.astype("uint8")).save("one.png")
    words = [str(trained) if word == "RUN" else word for word in words]
    with small_files(3_000):
        assert main(words) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1, said
    assert file in said
    assert "cannot be written" in said
    assert [path.name for path in Path().iterdir()] == ["one.png"]
    assert main(words) == 0


def test_the_older_result_stays(trained, small_files, capsys):
    words = ["prune", str(trained), "--keep", "2", "--margin", "100", "--out", "less", *STUDY]
    assert main(words) == 0
    before = json.loads(Path("less/prune.json").read_text())
    with small_files(3_000):
        assert main([*words, "--overwrite", "true"]) == 2
    assert json.loads(Path("less/prune.json").read_text()) == before
    assert [path.name for path in Path().iterdir()] == ["less"]
