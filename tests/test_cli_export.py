"""`mrla export`, and `mrla predict` on what it wrote."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import timm
from PIL import Image

import mrla
from mrla.cli import main
from mrla.dense import detector, save


@pytest.fixture(scope="module")
def network(tmp_path_factory) -> Path:
    """A saved network with classes and a normalisation of its own."""
    model = mrla.attach(timm.create_model("test_resnet", num_classes=3), "base", init="released")
    facts = {"class_names": ["cat", "dog", "<b>"], "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.2)}
    return mrla.save(model, tmp_path_factory.mktemp("nets") / "mine", input_size=(3, 64, 64), **facts)


@pytest.fixture(scope="module")
def picture(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "one.png"
    Image.fromarray((np.random.default_rng(0).random((90, 70, 3)) * 255).astype("uint8")).save(path)
    return path


@pytest.mark.parametrize(
    ("format", "suffix"),
    [
        ("onnx", ".onnx"),
        pytest.param("torch_export", ".pt2", marks=pytest.mark.sweep),
        pytest.param("openvino", ".xml", marks=pytest.mark.sweep),
    ],
)
def test_the_file_predicts_as_the_checkpoint(format, suffix, network, picture, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["export", str(network), "--format", format]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"mine{suffix}: {format}, against the network" in said
    assert "1x3x64x64" in said
    assert "Of any size: batch, height, width." in said
    answers = []
    for checkpoint, out in ((network, "a"), (f"mine{suffix}", "b")):
        words = ["predict", str(checkpoint), str(picture), "--out", out, "--machine.accelerator", "cpu"]
        assert main([*words, "--machine.threads", "1"]) == 0
        answers.append(json.loads((tmp_path / out / "predictions.json").read_text())["images"][0])
    assert answers[0]["names"] == answers[1]["names"]
    assert answers[0]["scores"] == pytest.approx(answers[1]["scores"], abs=1e-5)
    assert set(answers[0]["names"]) == {"cat", "dog", "<b>"}


def test_a_difference_beyond_the_bound_is_exit_code_1(network, tmp_path, capsys):
    out = tmp_path / "net.onnx"
    assert main(["export", str(network), "--out", str(out), "--tolerance", "1e-12"]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "differs by" in said
    assert "it is kept as" in said
    assert [path.name for path in tmp_path.iterdir()] == ["net.onnx.failed"]


def test_refused_with_one_line_and_exit_code_2(network, tmp_path, capsys):
    def refused(*words: str) -> str:
        assert main(["export", *words]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        return said

    said = refused(str(network), "--format", "onx")
    assert re.search("format must be one of onnx, torch_export, openvino, .*: got 'onx'; did you mean 'onnx'?", said)
    (tmp_path / "there.onnx").touch()
    assert "there.onnx exists" in refused(str(network), "--out", str(tmp_path / "there.onnx"))
    assert ".onnx" in refused(str(network), "--out", str(tmp_path / "net.pt2"))
    assert "does not exist" in refused(str(tmp_path / "nothing"))
    backbone = timm.create_model("test_resnet")
    save(detector("fcos", backbone, 3, min_size=64, max_size=64, fpn_channels=32), tmp_path / "detector")
    assert "detector" in refused(str(tmp_path / "detector"), "--out", str(tmp_path / "detector.onnx"))
    assert not (tmp_path / "detector.onnx").exists()
