"""Commands that are stopped from outside: the exit code, the one line, and that the same command goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_cli import BENCH, TINY

from mrla.cli import main
from mrla.train.task import Classification

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")
CODES = [(signal.SIGTERM, 143, "stopped by SIGTERM"), (signal.SIGINT, 130, "interrupted")]
ARMS = ("plain", "light")
LONG = [*TINY[:2], "--epochs", "60", *TINY[4:]]


def once(holds: Callable[[], bool], process: subprocess.Popen) -> None:
    end = time.monotonic() + 120
    while not holds():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)


def start(*words: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "mrla.cli", *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def hidden(folder: str) -> list[Path]:
    return [path for path in Path(folder).rglob(".*")]


@pytest.mark.parametrize(("number", "code", "words"), CODES)
def test_train_says_how_to_go_on(number, code, words, monkeypatch, capsys):
    original = Classification.training_step

    def step(self, batch, batch_idx):
        if (self.current_epoch, batch_idx) == (1, 3):
            os.kill(os.getpid(), number)
        return original(self, batch, batch_idx)

    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(Classification, "training_step", step)
        assert main(["train", *TINY, "--out", "run"]) == code
    assert capsys.readouterr() == ("", f"mrla: {words}; run has 1 of 2 epochs; the same command goes on after them\n")
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert main(["train", *TINY, "--out", "run"]) == 0


@pytest.mark.parametrize(("number", "code", "words"), CODES)
def test_a_command_that_writes_at_its_end_has_written_nothing(number, code, words, monkeypatch, capsys):
    monkeypatch.setattr("mrla.analysis.benchmarking.measuring.measure_point", lambda *_: os.kill(os.getpid(), number))
    assert main(BENCH) == code
    assert capsys.readouterr() == ("", f"mrla: {words}; nothing is written\n")
    assert not list(Path().iterdir())


@pytest.mark.sweep
@pytest.mark.parametrize(("number", "code", "words"), CODES)
def test_signals_again_and_again(number, code, words):
    with start("train", *LONG, "--out", "run") as process:
        once(lambda: Path("run/checkpoints/last.ckpt").is_file(), process)
        while process.poll() is None:
            process.send_signal(number)
            time.sleep(0.01)
        told, said = process.communicate()
    assert (process.returncode, told) == (code, "")
    assert said.startswith(f"mrla: {words}; run has ")
    assert said.endswith(" of 60 epochs; the same command goes on after them\n")
    assert said.count("\n") == 1
    assert torch.load("run/checkpoints/last.ckpt", weights_only=True)["epoch"] >= 0
    assert main(["train", *LONG, "--out", "run"]) == 0
    assert not hidden("run")
    assert load_file("run/model.safetensors")


@pytest.mark.sweep
@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="looks for processes in /proc")
def test_a_comparison_and_its_workers():
    words = ["compare", *LONG[:2], "--epochs", "20", *LONG[4:], "--seeds", "1", "--jobs", "2", "--out", "two"]

    def stopped(number: int, arm: str | None) -> tuple[int, str]:
        with start(*words) as process:
            once(lambda: all(Path(f"two/runs/{one}-seed0/checkpoints/last.ckpt").is_file() for one in ARMS), process)
            once(lambda: all(map(worker, ARMS)), process)
            if arm is None:
                os.killpg(process.pid, number)  # as a terminal does
            else:
                os.kill(worker(arm), number)
            _, said = process.communicate()
        assert said.count("\n") == 1
        return process.returncode, said

    code, said = stopped(signal.SIGTERM, "light")
    assert (code, said.split(";")[0]) == (2, "mrla: error: the run light-seed0 was stopped by SIGTERM")
    assert "the same command goes on" in said
    code, said = stopped(signal.SIGKILL, "plain")
    assert code == 2
    assert "the run plain-seed0 was ended by signal 9 (SIGKILL), most likely because memory ran out" in said
    assert "the same command goes on" in said
    code, said = stopped(signal.SIGINT, None)
    assert (code, said.split(";")[0]) == (130, "mrla: interrupted")
    assert "two has 0 of 2 runs; the same command goes on" in said
    assert main([*words, "--progress", "false"]) == 0
    assert set(json.loads(Path("two/compare.json").read_text())["table"]) == {"plain", "light"}
    assert not hidden("two")


def worker(arm: str) -> int:
    """The process that makes an arm's run of a comparison in this folder; 0 if there is none."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes().decode().split("\0")
            here = (entry / "cwd").resolve() == Path.cwd().resolve()
        except OSError:  # gone meanwhile
            continue
        if "mrla.analysis.comparison.worker" in command and f"two/runs/{arm}-seed0" in command and here:
            return int(entry.name)
    return 0
