"""What is seen of a run while it works, and what its log says afterwards."""

import re
import sys

import pytest
from lightning.pytorch.callbacks import Callback
from tiny_runs import tiny

from mrla.train import progress_lines
from mrla.train.fitting import train
from mrla.train.history import History
from mrla.train.progress_lines import CountedLines, Lines


class Crash(Callback):
    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 2:
            raise RuntimeError("the machine is gone")


def test_the_log_of_a_run_that_was_stopped_and_gone_on_with(tmp_path, monkeypatch):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("mrla.train.fitting.shown_progress", lambda history: Crash())
        with pytest.raises(RuntimeError):
            train(tiny(), out, command="mrla train --out 'a run'")
    run = train(tiny(), out, progress=False)
    lines = (out / "log.txt").read_text().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d\d:\d\d ", line) for line in lines)
    said = [line.split(" ", 2)[2] for line in lines]
    assert [line.split(":")[0] for line in said] == [
        *("start", "command", "recipe", "versions", "epoch 1 of 3", "epoch 2 of 3", "stopped"),
        *("start again, after epoch 2", "recipe", "versions", "epoch 3 of 3", said[-1]),
    ]
    assert "command: mrla train --out 'a run'" in said
    assert said[2] == "recipe: digits_resnet18: resnet18_cifar, arm light, seed 0, digits, 3 epochs, batches of 64"
    assert "torch 2." in said[3]
    assert f"val_accuracy {run.epochs[2]['val_accuracy']:.4f}" in said[10]
    assert said[6] == "stopped: the machine is gone"
    assert said[-1].startswith("end, after ")
    before = (out / "log.txt").read_bytes()
    train(tiny(), out, progress=False)  # finished: nothing runs
    assert (out / "log.txt").read_bytes() == before


def test_a_line_and_no_control_characters_where_there_is_no_terminal(tmp_path, capsys):
    run = train(tiny(), tmp_path / "run")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.fullmatch(
        rf"mrla: epoch 1 of 3: train_loss [\d.]+, .*val_accuracy {run.epochs[0]['val_accuracy']:.4f}.*"
        r", about [\d.]+ s left\n",
        captured.err,
    )
    assert captured.err[:-1].isprintable()


def test_lines_are_a_minute_apart(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr(progress_lines.time, "monotonic", lambda: now[0])
    lines = Lines()
    for _ in range(20):
        lines.say(f"at {now[0]:.0f}")
        now[0] += 25
    assert capsys.readouterr().err.split() == [word for at in range(100, 600, 75) for word in ("mrla:", "at", str(at))]


def test_counted_lines_say_how_much_time_is_left(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(progress_lines.time, "monotonic", lambda: now[0])
    lines = CountedLines("rounds")
    for done in (0, 4, 8):  # 4 were done in a run before this
        now[0] += 60
        lines.say(done, 8)
    said = capsys.readouterr().err.splitlines()
    assert said == ["mrla: 4 of 8 rounds, about 1 min 0 s left", "mrla: 8 of 8 rounds"]


def test_the_bar_shows_the_loss(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    run = train(tiny(epochs=2), tmp_path / "run")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.search(r"loss: +\d\.\d{3}", captured.err)
    assert f"val: {run.epochs[0]['val_accuracy']:.3f}" in captured.err


def test_seconds_add_up(tmp_path, monkeypatch):
    """Those of the epochs before a stop are in the result."""
    found = []

    class Note(Crash):
        def __init__(self, history: History):
            self.history = history

        def on_train_epoch_start(self, trainer, pl_module):
            found.append(self.history.seconds)
            super().on_train_epoch_start(trainer, pl_module)

    with monkeypatch.context() as patch:
        patch.setattr("mrla.train.fitting.shown_progress", Note)
        with pytest.raises(RuntimeError):
            train(tiny(), tmp_path)
    run = train(tiny(), tmp_path, progress=False)
    assert 0 < found[2] < run.result["seconds"]
