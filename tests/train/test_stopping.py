"""Ctrl-C and SIGTERM: what is finished stays, what leaves the run, and that it ends once."""

import os
import signal
import sys
import threading
from pathlib import Path

import pytest
import timm
import torch
from tiny_runs import assert_same_run, content, tiny
from torch.utils.data import DataLoader, TensorDataset

import mrla
from mrla.train import engine
from mrla.train.fitting import train
from mrla.train.stopping import StopOnce, Terminated, stopped_in_order
from mrla.train.task import Classification

DEFAULTS = (signal.default_int_handler, signal.SIG_DFL)


def handlers() -> tuple:
    return signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)


@pytest.fixture(autouse=True)
def _handlers_are_put_back():
    assert handlers() == DEFAULTS
    yield
    assert handlers() == DEFAULTS


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    train(tiny(), folder, progress=False)
    return folder


def signal_in_step(monkeypatch, number: int, at: tuple[int, int], *, times: int = 1) -> None:
    original = Classification.training_step

    def step(self, batch, batch_idx):
        if (self.current_epoch, batch_idx) == at:
            os.kill(os.getpid(), number)
        return original(self, batch, batch_idx)

    monkeypatch.setattr(Classification, "training_step", step)
    clean_up = engine.end_other_processes

    def again(trainer):  # what runs first when a run ends
        for _ in range(times - 1):
            os.kill(os.getpid(), number)
        clean_up(trainer)

    monkeypatch.setattr(engine, "end_other_processes", again)


STOPS = [(signal.SIGTERM, Terminated, 1), (signal.SIGINT, KeyboardInterrupt, 1)]
TWICE = [(signal.SIGTERM, Terminated, 3), (signal.SIGINT, KeyboardInterrupt, 3)]


@pytest.mark.parametrize(("number", "stop", "times"), STOPS + TWICE)
def test_a_stopped_run_goes_on_to_the_same_end(whole, tmp_path, number, stop, times, capsys):
    folder = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        signal_in_step(patch, number, (2, 3), times=times)
        with pytest.raises(stop) as caught:
            train(tiny(), folder, progress=False)
    words = f"{folder} has 2 of 3 epochs; the same command goes on after them"
    told = capsys.readouterr()
    assert told.out == ""
    if stop is Terminated:
        assert (caught.value.code, caught.value.left) == (143, words)
        assert told.err == f"mrla: stopped by SIGTERM; {words}\n"
    else:
        assert str(caught.value) == words  # Python shows it; a command says it
        assert told.err == ""
    assert handlers() == DEFAULTS
    assert not [name for name in content(folder) if Path(name).name.startswith(".")]
    train(tiny(), folder, progress=False)
    assert_same_run(whole, folder)


@pytest.mark.parametrize(("number", "stop"), [(signal.SIGTERM, Terminated), (signal.SIGINT, KeyboardInterrupt)])
def test_an_evaluation(monkeypatch, number, stop):
    monkeypatch.setattr(Classification, "validation_step", lambda *_: os.kill(os.getpid(), number))
    model = timm.create_model("test_resnet_basic_cifar_mrla_light", num_classes=4)
    batches = DataLoader(TensorDataset(torch.randn(4, 3, 32, 32), torch.arange(4)), batch_size=2)
    with pytest.raises(stop):
        mrla.evaluate(model, batches)


def test_before_the_first_epochs_end(tmp_path, monkeypatch):
    signal_in_step(monkeypatch, signal.SIGTERM, (0, 3))
    with pytest.raises(Terminated) as caught:
        train(tiny(), tmp_path / "run", progress=False)
    assert caught.value.left == f"{tmp_path / 'run'} has no finished epoch; the same command starts it anew"


def test_the_callers_own_handler_is_called_and_nothing_else(tmp_path, monkeypatch):
    came = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))
    try:
        own = signal.getsignal(signal.SIGTERM)
        signal_in_step(monkeypatch, signal.SIGTERM, (1, 3))
        run = train(tiny(), tmp_path / "run", progress=False)
        assert signal.getsignal(signal.SIGTERM) is own
    finally:
        signal.signal(signal.SIGTERM, before)
    assert came == [signal.SIGTERM]
    assert len(run.epochs) == 3


def test_a_stop_that_python_loses_ends_the_run_at_the_next_batch(tmp_path, monkeypatch):
    original = Classification.training_step

    def step(self, batch, batch_idx):
        if batch_idx == 3:
            try:
                os.kill(os.getpid(), signal.SIGTERM)
            except Terminated:
                pass  # as Python does in a `__del__`
        assert batch_idx < 4
        return original(self, batch, batch_idx)

    monkeypatch.setattr(Classification, "training_step", step)
    with pytest.raises(Terminated):
        train(tiny(), tmp_path / "run", progress=False)


def test_in_another_thread_a_run_works_as_ever(tmp_path):
    runs = []
    thread = threading.Thread(target=lambda: runs.append(train(tiny(epochs=2), tmp_path / "run", progress=False)))
    thread.start()
    thread.join()
    assert len(runs[0].epochs) == 2


def test_the_innermost_body_says_what_is_left_and_it_is_told_once(capsys):
    with pytest.raises(Terminated) as caught:
        with stopped_in_order(lambda: "outer"), stopped_in_order(lambda: "inner"):
            os.kill(os.getpid(), signal.SIGTERM)
    assert caught.value.left == "inner"
    assert capsys.readouterr().err == "mrla: stopped by SIGTERM; inner\n"


def a_lost_connection() -> None:
    try:
        os.kill(os.getpid(), signal.SIGINT)
    except KeyboardInterrupt:
        raise RuntimeError("connection closed by peer") from None


def lightnings_exit() -> None:
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        sys.exit(1)


@pytest.mark.parametrize("end", [a_lost_connection, lightnings_exit])
def test_whatever_is_made_of_a_stop_it_is_what_leaves(end):
    with pytest.raises(KeyboardInterrupt, match="left"), stopped_in_order(lambda: "left"):
        end()


def test_an_exit_that_is_no_stop_stays_one():
    with pytest.raises(SystemExit) as other, stopped_in_order(lambda: "left"):
        sys.exit(3)
    assert other.value.code == 3


def test_signals_are_ignored_for_good_where_the_process_ends():
    try:
        with pytest.raises(Terminated), stopped_in_order(lambda: "", for_good=True):
            os.kill(os.getpid(), signal.SIGTERM)
        assert handlers() == (signal.SIG_IGN, signal.SIG_IGN)
        with stopped_in_order(lambda: "", for_good=True):
            os.kill(os.getpid(), signal.SIGTERM)  # ignored, as who has ignored it wants
    finally:
        signal.signal(signal.SIGINT, DEFAULTS[0])
        signal.signal(signal.SIGTERM, DEFAULTS[1])


def test_only_the_first_of_several_processes_tells(monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(Terminated), stopped_in_order(lambda: "x"):
        os.kill(os.getpid(), signal.SIGTERM)
    assert capsys.readouterr().err == ""


def test_a_handler_raises_once():
    handler = StopOnce()
    handler.check()
    with pytest.raises(Terminated):
        handler(signal.SIGTERM, None)
    handler(signal.SIGINT, None)
    with pytest.raises(Terminated):
        handler.check()
