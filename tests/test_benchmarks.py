import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def test_training_loop(tmp_path):
    out = tmp_path / "results" / "loop.json"
    command = [sys.executable, str(BENCHMARKS / "training_loop.py"), "--rounds", "1", "--epochs", "1"]
    done = subprocess.run([*command, "--out", str(out)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["arm", *["plain"] * 2, *["light"] * 2, "written:"]
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


def test_training_loop_refuses_no_rounds(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "training_loop.py"), "--rounds", "0"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert "rounds and epochs must be positive: got 0 and 8" in done.stderr


def test_finetuning_digits(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "finetuning_digits.py"), "--out", str(tmp_path / "out")]
    short = ["--seeds", "1", "--epochs", "1", "--tuning_epochs", "3", "--arms", "plain,light"]
    done = subprocess.run([*command, *short], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"trained on the digits 0 to 4: \d+\.\d\d %", done.stdout)
    content = json.loads((tmp_path / "out" / "compared" / "compare.json").read_text())
    assert content["arms"] == ["plain", "light"]
    assert content["recipe"]["model"] == str(tmp_path / "out" / "trained")
    trained = json.loads((tmp_path / "out" / "trained" / "config.json").read_text())
    assert trained["pretrained_cfg"]["label_names"] == list("01234")
    tuned = json.loads((tmp_path / "out" / "compared" / "runs" / "light-seed0" / "config.json").read_text())
    assert tuned["pretrained_cfg"]["label_names"] == list("56789")


def test_attach_coverage_on_a_sample(tmp_path):
    out = tmp_path / "coverage.json"
    command = [sys.executable, str(BENCHMARKS / "attach_coverage.py"), "--families", "timm/levit", "*/vgg*"]
    done = subprocess.run([*command, "--out", str(out)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert set(rows) == {"timm/levit", "timm/vgg", "torchvision/vgg11"}
    promises = {"eval", "train", "bfloat16", "gradients", "checkpoint", "detach"}
    assert rows["timm/levit"]["chains"] == 3
    assert all(rows["timm/levit"][method] == dict.fromkeys(promises, "kept") for method in ("light", "base", "exact"))
    assert rows["timm/vgg"]["chains"] == 0
    assert "no chain of blocks was found" in rows["timm/vgg"]["reason"]


@pytest.mark.unchecked
def test_speed_table(tmp_path):
    out = tmp_path / "speed.json"
    command = [sys.executable, str(BENCHMARKS / "speed_table.py"), "--rounds", "1", "--small", "--out", str(out)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert len(found) == 5
    eager = found["ResNet-50, eager"]["points"][0]["results"]
    assert set(eager) == {"plain", "light", "base", "light+reference", "base+reference"}
    # Bytes do not depend on the machine: the bounds, which the reference path does not keep.
    small = found["ResNet-18, eager"]["points"][0]["results"]
    assert small["light"]["memory"]["saved_for_backward_ratio"] < 1.10
    assert small["base"]["memory"]["saved_for_backward_ratio"] < 1.40
    assert small["light+reference"]["memory"]["saved_for_backward_ratio"] > 1.5
    assert f"kept {eager['light']['memory']['saved_for_backward_ratio']:.3f}" in done.stdout
    assert [point["value"] for point in found["base, block by block"]["points"]] == [1, 2, 4, 8, 16]


def test_detector_speed(tmp_path):
    out = tmp_path / "speed.json"
    command = [sys.executable, str(BENCHMARKS / "detector_speed.py"), "--rounds", "1", "--model", "resnet18"]
    done = subprocess.run([*command, "--size", "64", "--out", str(out)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    content = json.loads(out.read_text())
    assert list(content["results"]) == ["plain", "light", "base"]
    for arm, entry in content["results"].items():
        for name in ("inference", "training"):
            (own,), (plain,) = content["seconds"][arm][name], content["seconds"]["plain"][name]
            assert entry[name]["n"] == 1
            assert entry[name]["ratio"]["median"] == own / plain
            assert f"{entry[name]['ratio']['median']:.3f}" in done.stdout


def test_recording_cost(tmp_path):
    out = tmp_path / "cost.json"
    command = [sys.executable, str(BENCHMARKS / "recording_cost.py"), "--rounds", "1", "--model", "resnet18"]
    words = ["--size", "64", "--batch_size", "2", "--out", str(out)]
    done = subprocess.run([*command, *words], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    content = json.loads(out.read_text())
    assert list(content["results"]["recorded"]) == ["light", "base"]
    for method, entry in content["results"]["recorded"].items():
        assert f"{method} {entry['ms']:.0f} ms, {entry['ratio']['median']:.3f}" in done.stdout


@pytest.mark.sweep
def test_mixer_overhead_of_two_source_trees(tmp_path):
    out = tmp_path / "overhead.json"
    command = [sys.executable, str(BENCHMARKS / "mixer_overhead.py"), "--rounds", "2", "--places", "hot", "narrow"]
    words = ["--against", str(BENCHMARKS.parent), "--out", str(out)]
    done = subprocess.run([*command, *words], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    content = json.loads(out.read_text())
    keys = {key for rounds in content["rounds"].values() for values in rounds for key in values}
    assert {key.rsplit(" ", 1)[0] for key in keys} == {
        f"{place} {mode} {method}"
        for place in ("hot", "narrow")
        for mode in ("inference", "training")
        for method in ("light", "base")
    }
    assert set(content["results"]) == keys
    for key, row in content["results"].items():
        own, other = ([values[key] for values in content["rounds"][tree]] for tree in ("this", "against"))
        assert row["n"] == len(own) == len(other) == 2
        assert row["microseconds"]["this"]["median"] == pytest.approx(sum(own) / 2)
        assert row["microseconds"]["against"]["median"] == pytest.approx(sum(other) / 2)
        if key.startswith("hot"):
            assert row["ratio"]["median"] == pytest.approx((own[0] / other[0] + own[1] / other[1]) / 2)
        assert f"{key:<34}" in done.stdout


def test_mixer_overhead_refuses_a_tree_without_the_package(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "mixer_overhead.py"), "--against", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert "--against must be a source tree that holds mrla/__init__.py" in done.stderr


@pytest.mark.unchecked
def test_export_speed(tmp_path):
    out = tmp_path / "speed.json"
    command = [sys.executable, str(BENCHMARKS / "export_speed.py"), "--rounds", "1", "--model", "test_resnet"]
    command += ["--size", "64", "--batches", "2", "--threads", "1", "--out", str(out)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (rows,) = json.loads(out.read_text())["results"].values()
    assert set(rows) == {"plain", "depthwise", "light", "light_engine", "base"}
    assert rows["plain"]["ratio"] == {"median": 1.0, "p10": 1.0, "p90": 1.0}
    assert all(row["n"] == 1 and row["difference"] < 1e-4 for row in rows.values())
