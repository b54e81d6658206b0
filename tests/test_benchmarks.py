"""Each benchmark runs from end to end, small, and writes what it says."""

import importlib
import json
import re
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

import mrla

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"

BFLOAT16 = "bfloat16 autocast"

# Runs gpu_check.py as on a machine that lacks what mrla needs elsewhere.
WITHOUT_THE_REST = """
import runpy, sys
MISSING = "jsonargparse rich lightning torchmetrics numba scipy sklearn huggingface_hub matplotlib".split()
class Finder:
    def __init__(self, inner):
        self.inner = inner
    def __getattr__(self, name):
        return getattr(self.inner, name)
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in MISSING else self.inner.find_spec(name, path, target)
sys.meta_path[:] = [Finder(finder) for finder in sys.meta_path]
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


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


@pytest.mark.sweep
def test_gpu_check_on_a_cpu_with_few_packages(tmp_path):
    words = [str(BENCHMARKS / "gpu_check.py"), "--device", "cpu", "--quick", "--out", str(tmp_path)]
    command = [sys.executable, "-c", WITHOUT_THE_REST, *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("gpu_check_*.json")
    content = json.loads(path.read_text())
    assert content["complete"]
    rows = content["rows"]
    assert all(set(row) == {"kind", "name", "settings", "values", "tolerance", "ok"} for row in rows)
    assert rows[0]["kind"] == "environment"
    assert rows[0]["values"]["numba"] is not None  # its version is known, though it cannot be imported
    equality = [row for row in rows if row["kind"] == "equality"]
    assert all(row["ok"] for row in equality)
    # three networks; five methods at their start and at work, and plain; eval and train, two formats, two types
    assert len({json.dumps([row["name"], row["settings"]]) for row in equality}) == len(equality) == 3 * (2 * 5 + 1) * 8
    speed = [row for row in rows if row["kind"] == "speed"]
    assert all(row["ok"] and row["values"]["n"] == 2 for row in speed)
    assert {row["settings"]["arm"] for row in speed} == {
        *("plain", "light", "base", "plain+compiled", "light+compiled", "base+compiled")
    }
    compiled = [row["values"] for row in rows if row["kind"] == "compilation"]
    assert len(compiled) == 5
    assert all(values["graphs"] >= 1 for values in compiled)
    memory = [row for row in rows if row["kind"] == "memory"]
    assert memory
    assert all(row["values"] == {"not_measured": "on a CPU"} for row in memory)


def gpu_check(monkeypatch):
    """The script as a module, with little to do."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    module = importlib.import_module("gpu_check")
    vit = {"ViT": module.small_networks()["ViT"]}
    monkeypatch.setattr(module, "small_networks", lambda: vit)
    monkeypatch.setattr(module, "METHODS", {"light": {"method": "light"}, "dw": {"method": "dw"}})
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", torch.backends.cudnn.deterministic)
    return module


def test_gpu_check_finds_a_wrong_mixer_and_reports_no_speed(tmp_path, monkeypatch, capsys):
    module = gpu_check(monkeypatch)
    right = mrla.ops.MRLALight.forward

    def wrong(self, x, *args, **kwargs):
        out, memory = right(self, x, *args, **kwargs)
        # On the device: the reference is computed in float64.
        return (out if x.dtype == torch.float64 else 1.01 * out), memory

    monkeypatch.setattr(mrla.ops.MRLALight, "forward", wrong)
    assert module.main(["--device", "cpu", "--quick", "--out", str(tmp_path)]) == 1
    (path,) = tmp_path.glob("gpu_check_*.json")
    rows = json.loads(path.read_text())["rows"]
    held = {(row["name"], row["settings"]["dtype"]): row["ok"] for row in rows if row["kind"] == "equality"}
    assert held == {
        (f"ViT, {method}: {what}", dtype): not (method == "light" and (what, dtype) != ("device against CPU", BFLOAT16))
        for method, what in (
            ("plain", "device against CPU"),
            ("light", "same bits at the start"),
            ("light", "device against CPU"),
            ("dw", "same bits at the start"),
            ("dw", "device against CPU"),
        )
        for dtype in ("float32", BFLOAT16)
    }
    assert {row["ok"] for row in rows if row["kind"] == "speed"} == {None}
    assert all("equality rows failed" in row["values"]["not_run"] for row in rows if row["kind"] == "speed")
    printed = capsys.readouterr().out.splitlines()
    assert module.main(["--show", str(path)]) == 0
    assert capsys.readouterr().out.splitlines()[1 : len(rows) + 1] == printed[: len(rows)]


# The alarm may fall into a callback of torch's, where Python prints the exception and goes on; it comes again.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_gpu_check_notes_errors_and_what_it_has_no_time_for(tmp_path, monkeypatch):
    module = gpu_check(monkeypatch)

    right = mrla.ops.DepthwiseMixer.forward

    def broken(self, x, *args, **kwargs):
        if isinstance(x, FakeTensor):  # attach looks whether the network runs
            return right(self, x, *args, **kwargs)
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr(mrla.ops.DepthwiseMixer, "forward", broken)
    assert module.main(["--device", "cpu", "--quick", "--out", str(tmp_path)]) == 1
    assert module.main(["--device", "cpu", "--quick", "--seconds", "1", "--force", "--out", str(tmp_path)]) == 1
    first, second = (json.loads(path.read_text()) for path in sorted(tmp_path.glob("gpu_check_*.json")))
    errors = {row["name"]: row["values"] for row in first["rows"] if "error" in row["values"]}
    assert errors == {
        f"ViT, dw: {what}": {"error": "OutOfMemoryError: no memory left"}
        for what in ("same bits at the start", "device against CPU")
    }
    assert first["complete"]
    assert second["complete"]
    assert [row["values"] for row in second["rows"] if row["kind"] == "speed"] == 3 * [{"not_run": "no time left"}]


@pytest.mark.sweep
def test_export_speed(script, tmp_path):
    out = tmp_path / "speed.json"
    words = ["--rounds", "1", "--model", "test_resnet", "--size", "64", "--batches", "2", "--threads", "1"]
    script("export_speed.py", *words, "--out", str(out))
    (rows,) = json.loads(out.read_text())["results"].values()
    assert set(rows) == {"plain", "depthwise", "light", "light_engine", "base"}
    assert rows["plain"]["ratio"] == {"median": 1.0, "p10": 1.0, "p90": 1.0}
    assert all(row["n"] == 1 and row["difference"] < 1e-4 for row in rows.values())


@pytest.mark.sweep
def test_memory_growth(script, tmp_path):
    out = tmp_path / "growth.json"
    printed = script("memory_growth.py", "--steps", "5", "--out", str(out))
    results = json.loads(out.read_text())["results"]
    assert len(results) == 10
    assert len(printed.splitlines()) == 11
    assert all(row["tensors"] == 0 for row in results.values())


def fresh(name: str, *words: str) -> subprocess.CompletedProcess:
    """A script that forks, in a process without threads; its own exit code says whether anything was wrong."""
    command = [sys.executable, str(BENCHMARKS / name), *words]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.sweep
def test_damaged_files_are_refused_in_one_line_or_right(tmp_path):
    out = tmp_path / "damaged.json"
    done = fresh("damaged_files.py", "--flips", "12", "--truncations", "6", "--seed", "1000", "--out", str(out))
    content = json.loads(out.read_text())
    assert content["wrong"] == [], content["wrong"]
    assert done.returncode == 0, done.stderr[-2000:]
    assert all(sum(counts.values()) == 18 for counts in content["counts"].values())
    assert content["counts"]["model.safetensors"] == {"refused": 18}


@pytest.mark.sweep
def test_killed_work_is_equal_when_it_is_started_again(tmp_path):
    out = tmp_path / "killed.json"
    words = ("--train", "4", "--compare", "2", "--save", "6", "--seed", "1000", "--out", str(out))
    done = fresh("killed_runs.py", *words)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert json.loads(out.read_text())["lost"] == []


@pytest.mark.sweep
def test_bad_words_are_refused_in_one_line(tmp_path):
    out = tmp_path / "words.json"
    done = fresh("command_words.py", "--share", "0.03", "--seed", "1000", "--out", str(out))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert json.loads(out.read_text())["wrong"] == []
