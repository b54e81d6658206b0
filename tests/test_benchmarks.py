"""Each benchmark runs from end to end, small, and writes what it says."""

import json
import re
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def script(monkeypatch, capsys, tmp_path) -> Iterator[Callable[..., str]]:
    """Runs a benchmark as from the command line and gives what it prints, without another process to import torch."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()

    def run(name: str, *words: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, *words])
        runpy.run_path(str(BENCHMARKS / name), run_name="__main__")
        return capsys.readouterr().out

    yield run
    torch.set_num_threads(threads)


@pytest.mark.sweep
def test_training_loop(script, tmp_path):
    out = tmp_path / "results" / "loop.json"
    printed = script("training_loop.py", "--rounds", "1", "--epochs", "1", "--out", str(out))
    assert [line.split()[0] for line in printed.splitlines()] == ["arm", *["plain"] * 2, *["light"] * 2, "written:"]
    content = json.loads(out.read_text())
    assert set(content) == {
        *("theme", "date", "hardware", "versions", "commit", "changed", "options", "recipes", "results"),
        "epochs",
    }
    assert content["options"] == {"rounds": 1, "epochs": 1}
    assert set(content["results"]) == set(content["recipes"]) == {"plain", "light"}
    for arm, entry in content["results"].items():
        assert content["recipes"][arm]["arm"] == arm
        assert entry["n"] == 1
        assert entry["steps_per_epoch"] == 14
        for clock in ("seconds", "cpu_seconds"):
            for part in ("bare", "loop", "whole"):
                (seconds,) = content["epochs"][arm][clock][part]
                assert entry[clock][f"{part}_ms_per_step"] == 1000 * seconds / 14
            assert entry[clock]["whole_to_bare"]["median"] > entry[clock]["loop_to_bare"]["median"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["results"]


def test_training_loop_refuses_no_rounds(script, capsys):
    with pytest.raises(SystemExit) as left:
        script("training_loop.py", "--rounds", "0")
    assert left.value.code == 2
    assert "rounds and epochs must be positive: got 0 and 8" in capsys.readouterr().err


@pytest.mark.sweep
@pytest.mark.usefixtures("runs_in_one_process")
def test_finetuning_digits(script, tmp_path):
    short = ["--seeds", "1", "--epochs", "1", "--tuning_epochs", "3", "--arms", "plain,light"]
    printed = script("finetuning_digits.py", "--out", str(tmp_path / "out"), *short)
    assert re.search(r"trained on the digits 0 to 4: \d+\.\d\d %", printed)
    content = json.loads((tmp_path / "out" / "compared" / "compare.json").read_text())
    assert content["arms"] == ["plain", "light"]
    assert content["recipe"]["model"] == str(tmp_path / "out" / "trained")
    trained = json.loads((tmp_path / "out" / "trained" / "config.json").read_text())
    assert trained["pretrained_cfg"]["label_names"] == list("01234")
    tuned = json.loads((tmp_path / "out" / "compared" / "runs" / "light-seed0" / "config.json").read_text())
    assert tuned["pretrained_cfg"]["label_names"] == list("56789")


@pytest.mark.sweep
def test_attach_coverage_on_a_sample(script, tmp_path):
    out = tmp_path / "coverage.json"
    script("attach_coverage.py", "--families", "timm/levit", "*/vgg*", "--out", str(out))
    rows = json.loads(out.read_text())["rows"]
    assert set(rows) == {"timm/levit", "timm/vgg", "torchvision/vgg11"}
    promises = {"eval", "train", "bfloat16", "gradients", "checkpoint", "detach"}
    assert rows["timm/levit"]["chains"] == 3
    assert all(rows["timm/levit"][method] == dict.fromkeys(promises, "kept") for method in ("light", "base", "exact"))
    assert rows["timm/vgg"]["chains"] == 0
    assert "no chain of blocks was found" in rows["timm/vgg"]["reason"]


@pytest.mark.sweep
def test_speed_table(script, tmp_path):
    out = tmp_path / "speed.json"
    printed = script("speed_table.py", "--rounds", "1", "--small", "--out", str(out))
    found = json.loads(out.read_text())
    assert len(found) == 5
    eager = found["ResNet-50, eager"]["points"][0]["results"]
    assert set(eager) == {"plain", "light", "base", "light+reference", "base+reference"}
    # Bytes do not depend on the machine: the bounds, which the reference path does not keep.
    small = found["ResNet-18, eager"]["points"][0]["results"]
    assert small["light"]["memory"]["saved_for_backward_ratio"] < 1.10
    assert small["base"]["memory"]["saved_for_backward_ratio"] < 1.40
    assert small["light+reference"]["memory"]["saved_for_backward_ratio"] > 1.5
    assert f"kept {eager['light']['memory']['saved_for_backward_ratio']:.3f}" in printed
    assert [point["value"] for point in found["base, block by block"]["points"]] == [1, 2, 4, 8, 16]


@pytest.mark.sweep
def test_detector_speed(script, tmp_path):
    out = tmp_path / "speed.json"
    words = ["--rounds", "1", "--model", "resnet18", "--size", "64", "--out", str(out)]
    printed = script("detector_speed.py", *words)
    content = json.loads(out.read_text())
    assert list(content["results"]) == ["plain", "light", "base"]
    for arm, entry in content["results"].items():
        for name in ("inference", "training"):
            (own,), (plain,) = content["seconds"][arm][name], content["seconds"]["plain"][name]
            assert entry[name]["n"] == 1
            assert entry[name]["ratio"]["median"] == own / plain
            assert f"{entry[name]['ratio']['median']:.3f}" in printed


def test_recording_cost(script, tmp_path):
    out = tmp_path / "cost.json"
    words = ["--rounds", "1", "--model", "resnet18", "--size", "64", "--batch_size", "2", "--out", str(out)]
    printed = script("recording_cost.py", *words)
    content = json.loads(out.read_text())
    assert list(content["results"]["recorded"]) == ["light", "base"]
    for method, entry in content["results"]["recorded"].items():
        assert f"{method} {entry['ms']:.0f} ms, {entry['ratio']['median']:.3f}" in printed


@pytest.mark.sweep
def test_export_speed(script, tmp_path):
    out = tmp_path / "speed.json"
    words = ["--rounds", "1", "--model", "test_resnet", "--size", "64", "--batches", "2", "--threads", "1"]
    script("export_speed.py", *words, "--out", str(out))
    (rows,) = json.loads(out.read_text())["results"].values()
    assert set(rows) == {"plain", "depthwise", "light", "light_engine", "base"}
    assert rows["plain"]["ratio"] == {"median": 1.0, "p10": 1.0, "p90": 1.0}
    assert all(row["n"] == 1 and row["difference"] < 1e-4 for row in rows.values())
