"""The comparison end to end, on networks of eight channels."""

import csv
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from conftest import one_process

from mrla.analysis.comparison import runs as comparison_runs
from mrla.analysis.comparison.comparing import Comparison, compare
from mrla.analysis.statistics import compare_arms, summary
from mrla.train import MixerOptions, Optim, Recipe, get_recipe
from mrla.train.recipe import as_dict, from_dict

ARMS, SEEDS, EPOCHS = ("plain", "light"), (0, 1), 3
OPTIM = Optim(lr=1.0, schedule="constant")
FILES = {"report.html", "compare.json", "table.csv", "history.csv", "curves.png", "curves.svg", "run.json"}

START = """
import json, sys
from mrla.analysis.comparison.comparing import compare
from mrla.train.recipe import from_dict
compare(from_dict(json.loads(sys.argv[1])), seeds=2, out=sys.argv[2], jobs=2)
"""


def tiny(**changes: Any) -> Recipe:
    # With so high a learning rate the last epoch is not the best one in every run.
    tiniest = {"model_args": {"channels": [8, 8, 8, 8]}, "epochs": EPOCHS, "optim": OPTIM}
    return replace(get_recipe("digits_resnet18"), **{**tiniest, **changes})


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Comparison:
    """Uninterrupted, one run at a time; test_killed_and_started_again has a process for each."""
    progress: list[tuple[int, int]] = []
    with one_process():
        out = tmp_path_factory.mktemp("whole")
        result = compare(tiny(), seeds=2, out=out, jobs=1, on_progress=lambda *done: progress.append(done))
    assert progress == sorted(progress)
    assert progress[-1] == (4 * EPOCHS, 4 * EPOCHS)
    assert {total for _, total in progress} == {4 * EPOCHS}
    return result


def run_folder(folder: Path, arm: str, seed: int) -> Path:
    return folder / "runs" / f"{arm}-seed{seed}"


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def same_numbers(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether all is equal but what a clock says."""

    def untimed(content: Mapping[str, Any]) -> dict[str, Any]:
        table = {
            arm: {key: value for key, value in entry.items() if key not in ("images_per_second", "train_seconds")}
            for arm, entry in content["table"].items()
        }
        return {**content, "table": table, "seconds": None}

    return untimed(one) == untimed(other)


def test_content(whole):
    content = whole.content
    assert content == read(whole.folder / "compare.json")
    assert {path.name for path in whole.folder.iterdir()} == FILES | {"runs"}
    assert list(content) == [
        "recipe",
        "arms",
        "seeds",
        "figure",
        "table",
        "differences",
        "note",
        "notes",
        "versions",
        "epochs",
        "seconds",
    ]
    assert from_dict(content["recipe"]) == tiny(arm="plain")
    assert content["arms"] == list(ARMS)
    assert content["seeds"] == list(SEEDS)
    assert content["seconds"] > 0
    assert {"mrla", "torch", "torchvision", "timm", "lightning", "python", "machine"} == set(content["versions"])
    assert "one fixed validation part" in content["note"]
    assert content["notes"] == []


def test_it_is_shown_in_a_few_words(whole):
    mean = 100 * whole.content["table"]["light"]["val_accuracy"]["mean"]
    assert len(repr(whole)) < 500
    assert re.search(rf"light='{mean:.2f} ± [\d.]+ %, {whole.verdicts['light']}'", repr(whole))
    assert "<th" in whole._repr_html_()


def test_table_is_that_of_the_runs(whole):
    for arm in ARMS:
        results = [read(run_folder(whole.folder, arm, seed) / "result.json") for seed in SEEDS]
        entry = whole.content["table"][arm]
        for name in ("train_loss", "train_accuracy", "val_loss", "val_accuracy", "val_accuracy_top5"):
            values = [result["last"][name] for result in results]
            mean, sd = summary(values)
            assert entry[name] == {"mean": mean, "sd": sd, "values": values}, name
        assert entry["best_val_accuracy"]["values"] == [result["best"]["val_accuracy"] for result in results]
        assert entry["best_val_accuracy"]["epochs"] == [result["best"]["epoch"] for result in results]
        assert entry["train_seconds"]["values"] == [result["seconds"] for result in results]
        assert whole.content["epochs"][arm] == [result["epochs"] for result in results]
        assert entry["images_per_second"]["batch_size"] == 64
        assert entry["images_per_second"]["threads"] == 1
    plain, light = (whole.content["table"][arm] for arm in ARMS)
    assert 0 < plain["macs"] < light["macs"]
    assert plain["parameters"]["trainable"] < light["parameters"]["trainable"]
    assert all(entry["parameters"]["trainable"] < entry["parameters"]["with_statistics"] for entry in (plain, light))


def test_scores_are_those_of_the_last_epoch(whole):
    lasts, bests = [], []
    for arm in ARMS:
        values = whole.content["table"][arm]["val_accuracy"]["values"]
        for seed, value in zip(SEEDS, values, strict=True):
            history = rows(run_folder(whole.folder, arm, seed) / "history.csv")
            assert [int(row["epoch"]) for row in history] == list(range(1, EPOCHS + 1))
            assert value == float(history[-1]["val_accuracy"])
            lasts.append(value)
            bests.append(max(float(row["val_accuracy"]) for row in history))
    assert lasts != bests, "no run tells the last epoch from the best one; choose another recipe"
    table = whole.content["table"]
    assert bests == [value for arm in ARMS for value in table[arm]["best_val_accuracy"]["values"]]


def test_differences_are_paired_by_seed(whole):
    values = {
        arm: [read(run_folder(whole.folder, arm, seed) / "result.json")["last"]["val_accuracy"] for seed in SEEDS]
        for arm in ARMS
    }
    expected = compare_arms(values, baseline="plain")["light"]
    assert whole.content["differences"] == {"light": asdict(expected)}
    assert whole.verdicts == {"light": expected.verdict}
    # Accuracies of two seeds may be equal and then tell nothing of their order; losses are not.
    losses = {
        arm: [read(run_folder(whole.folder, arm, seed) / "result.json")["last"]["val_loss"] for seed in SEEDS]
        for arm in ARMS
    }
    assert {arm: whole.content["table"][arm]["val_loss"]["values"] for arm in ARMS} == losses
    assert len({loss for arm in ARMS for loss in losses[arm]}) == len(ARMS) * len(SEEDS)


def test_runs_are_those_of_their_arm_and_seed(whole):
    for arm, seed in itertools.product(ARMS, SEEDS):
        assert read(run_folder(whole.folder, arm, seed) / "run.json")["settings"] == as_dict(tiny(arm=arm, seed=seed))


def test_files_agree_with_the_json(whole):
    table = {row["arm"]: row for row in rows(whole.folder / "table.csv")}
    assert list(table) == list(ARMS)
    for arm, row in table.items():
        entry = whole.content["table"][arm]
        for name in ("train_accuracy", "val_accuracy", "best_val_accuracy", "val_loss", "train_seconds"):
            assert float(row[f"{name}_mean"]) == entry[name]["mean"]
            assert float(row[f"{name}_sd"]) == entry[name]["sd"]
        assert int(row["macs"]) == entry["macs"]
        assert int(row["parameters_trainable"]) == entry["parameters"]["trainable"]
        assert float(row["images_per_second_median"]) == entry["images_per_second"]["median"]
    difference = whole.content["differences"]["light"]
    assert {row["difference_verdict"] for row in table.values()} == {"", difference["verdict"]}
    for name in ("mean", "low", "high", "sd", "p_value", "p_holm", "detectable"):
        assert table["plain"][f"difference_{name}"] == ""
        assert float(table["light"][f"difference_{name}"]) == difference[name]
    expected = [
        {"arm": arm, "seed": str(seed), **{name: str(value) for name, value in epoch.items()}}
        for arm in ARMS
        for seed, run in zip(SEEDS, whole.content["epochs"][arm], strict=True)
        for epoch in run
    ]
    assert rows(whole.folder / "history.csv") == expected
    assert (whole.folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    svg = (whole.folder / "curves.svg").read_text()
    assert "digits_resnet18: resnet18_cifar" in svg
    assert all(arm in svg for arm in ARMS)


def wait_until(holds: Callable[[], Any], seconds: float) -> Any:
    end = time.monotonic() + seconds
    while not (value := holds()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
    return value


def workers(folder: Path) -> list[int]:
    """Processes that work in a folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:  # gone meanwhile
            continue
        if b"mrla.analysis.comparison.worker" in command and any(str(folder).encode() in word for word in command):
            found.append(int(entry.name))
    return found


@pytest.mark.sweep
@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="looks for processes in /proc")
def test_killed_and_started_again(whole, tmp_path):
    folder = tmp_path / "killed"
    command = [sys.executable, "-c", START, json.dumps(as_dict(tiny())), str(folder)]
    with subprocess.Popen(command) as process:

        def signal_all(number: int) -> None:
            for process_id in (process.pid, *workers(folder)):
                with suppress(ProcessLookupError):  # gone meanwhile
                    os.kill(process_id, number)

        try:

            def in_the_middle() -> bool:
                assert process.poll() is None, "it ended before it could be killed"
                finished = {path.parent for path in folder.glob("runs/*/result.json")}
                begun = {path.parent.parent for path in folder.glob("runs/*/checkpoints/last.ckpt")}
                return bool(finished) and bool(begun - finished)

            def stopped_in_the_middle() -> bool:
                if not in_the_middle():
                    return False
                signal_all(signal.SIGSTOP)  # so that nothing ends while we look
                still = in_the_middle()
                if not still:
                    signal_all(signal.SIGCONT)
                return still

            wait_until(stopped_in_the_middle, 60)
            assert workers(folder)
            # The folder is taken as long as it runs; nothing that is in it changes.
            with pytest.raises(
                ValueError, match=f"another command is running in {folder}: process {process.pid} .* since 20.*; wait"
            ):
                compare(tiny(), seeds=2, out=folder)
        finally:
            process.send_signal(signal.SIGKILL)
            signal_all(signal.SIGCONT)
    wait_until(lambda: not workers(folder), 5)
    assert not (folder / "compare.json").exists()
    finished = {path: path.stat().st_mtime_ns for path in folder.glob("runs/*/result.json")}
    assert 1 <= len(finished) < 4
    begun = [path for path in folder.glob("runs/*/checkpoints/last.ckpt") if not finished.get(path)]
    assert len(begun) > len(finished)

    (folder / "seconds.json").write_text('{"seconds": 1000.0}')  # as if it had worked for so long before
    again = compare(tiny(), seeds=2, out=folder, jobs=2)
    assert again.content["seconds"] > 1000
    assert not (folder / "seconds.json").exists()
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert same_numbers(again.content, whole.content)
    for arm, seed in itertools.product(ARMS, SEEDS):
        weights = "model.safetensors"
        one, other = (run_folder(place, arm, seed) / weights for place in (folder, whole.folder))
        assert one.read_bytes() == other.read_bytes()
    assert not workers(folder)


def test_finished_is_not_repeated(whole, monkeypatch):
    monkeypatch.setattr(comparison_runs, "_start", lambda *_: pytest.fail("a finished run was started again"))
    before = {path: path.stat().st_mtime_ns for path in whole.folder.glob("runs/**/*")}
    # The recipe's own arm decides nothing.
    monkeypatch.setattr("mrla.analysis.comparison.comparing.measure_throughput", lambda *_: pytest.fail("timed again"))
    again = compare(tiny(arm="dw"), seeds=2, out=whole.folder, jobs=2)
    assert again.content == whole.content
    assert {path: path.stat().st_mtime_ns for path in whole.folder.glob("runs/**/*")} == before


@pytest.mark.parametrize(
    ("changes", "options", "named"),
    [
        ({"epochs": 4}, {}, "compare.recipe.epochs is 3 there, 4 here"),
        ({"optim": replace(OPTIM, lr=0.2)}, {}, "compare.recipe.optim.lr is 1.0 there, 0.2"),
        ({"seed": 1}, {}, "compare.recipe.seed is 0 there, 1 here"),
        ({}, {"seeds": 3}, r"compare.seeds is \[0, 1\] there, \[0, 1, 2\] here"),
        ({}, {"arms": ("plain", "dw")}, r"compare.arms is \['plain', 'light'\] there, \['plain', 'dw'\] here"),
    ],
    ids=["epochs", "lr", "seed", "seeds", "arms"],
)
def test_folder_of_another_comparison(whole, changes, options, named):
    before = {path: path.stat().st_mtime_ns for path in whole.folder.rglob("*")}
    with pytest.raises(ValueError, match=f"{whole.folder} belongs to a run with other settings .*{named}") as error:
        compare(tiny(**changes), **{"seeds": 2, "out": whole.folder, **options})
    assert "\n" not in str(error.value)
    assert {path: path.stat().st_mtime_ns for path in whole.folder.rglob("*")} == before


def test_folder_of_a_run(whole):
    folder = run_folder(whole.folder, "plain", 0)
    before = set(folder.rglob("*"))
    with pytest.raises(ValueError, match="belongs to a run with other settings"):
        compare(tiny(), seeds=2, out=folder)
    assert set(folder.rglob("*")) == before


def test_a_run_that_fails(tmp_path):
    diverging = tiny(optim=Optim(lr=1e20, schedule="constant"))
    with pytest.raises(ValueError, match=r"the run plain-seed0 failed: .*infinite at step \d+; .*smaller") as error:
        compare(diverging, seeds=1, out=tmp_path / "out", jobs=1)
    assert "\n" not in str(error.value)
    assert str(tmp_path / "out" / "runs") in str(error.value)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"run.json", "runs", "seconds.json"}
    assert not workers(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recipe": "digits_resnet81"}, "did you mean 'digits_resnet18'"),
        (
            {"arms": ("plain", "ligth")},
            "arm must be one of plain, light, base, exact, dw, eca, se: got 'ligth'; did you mean 'light'",
        ),
        ({"arms": ("plain",)}, "arms must be at least two different ones: got plain"),
        ({"arms": ()}, "at least two different ones: got none"),
        ({"arms": ("plain", "light", "plain")}, "at least two different ones: got plain, light, plain"),
        ({"seeds": 0}, "seeds must be from 1 to 1000: got 0"),
        ({"seeds": 10**400}, "seeds must be from 1 to 1000: got 1000"),
        ({"seeds": -3}, "seeds must be .* got -3"),
        ({"jobs": 0}, "jobs must be from 1 to 1024 runs at once: got 0"),
        ({"jobs": 2000}, "jobs must be from 1 to 1024 runs at once: got 2000"),
        ({"recipe": tiny(mixer=MixerOptions(head_dim=3))}, "head_dim .*divide .*got .*3"),
        ({"recipe": tiny(model="resnet18_cifer")}, "did you mean 'resnet18_cifar'"),
        ({"recipe": tiny(model="test_resnet_basic_cifar_mrla_light", model_args={})}, "must be a plain network"),
        ({"recipe": tiny(batch_size=1000)}, "at least one batch: got 898 samples, 1000 are needed"),
    ],
    ids=[
        "recipe",
        "arm",
        "one arm",
        "no arm",
        "repeated",
        "no seed",
        "many seeds",
        "seeds",
        "jobs",
        "many jobs",
        "heads",
        "model",
        "mixers",
        "batch",
    ],
)
def test_refused_before_anything_is_written(options, message, tmp_path, monkeypatch):
    monkeypatch.setattr(comparison_runs, "_start", lambda *_: pytest.fail("a run was started"))
    with pytest.raises(ValueError, match=message) as error:
        compare(**{"recipe": tiny(), "seeds": 2, "out": tmp_path / "out", **options})
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_all_arms_are_built_before_the_first_run(tmp_path, monkeypatch):
    class Reached(Exception):
        pass

    def stop(self: comparison_runs.RecipeRuns, folders: Mapping[tuple[str, int], Path], on_progress: Any) -> None:
        raise Reached([(folder.name, arm, seed) for (arm, seed), folder in folders.items()], self._jobs)

    monkeypatch.setattr(comparison_runs.RecipeRuns, "make", stop)
    arms = ("plain", "light", "dw", "eca", "se")
    with pytest.raises(Reached) as reached:
        compare(tiny(seed=7), arms=arms, seeds=2, out=tmp_path / "out", jobs=3)
    # Seed by seed, so that the arms of one seed are made about the same time.
    assert reached.value.args == ([(f"{arm}-seed{seed}", arm, seed) for seed in (7, 8) for arm in arms], 3)


def test_jobs_by_default(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    machine = tiny().machine
    jobs = [
        comparison_runs._default_jobs(tiny(machine=replace(machine, **changes)))
        for changes in ({}, {"threads": 3}, {"threads": 16}, {"threads": None}, {"accelerator": "auto"})
    ]
    assert jobs == [8, 2, 1, 1, 1]
