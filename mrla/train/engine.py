"""How Lightning is set up: devices, threads, checkpoints written whole, and which warnings are silenced."""

import logging
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO

from mrla.files.atomic_write import written_whole

from .recipe import Machine
from .stopping import StopOnce


def trainer_arguments(machine: Machine) -> dict[str, Any]:
    """Where a run is computed, as arguments of Lightning's Trainer."""
    return {
        "accelerator": machine.accelerator,
        "devices": machine.devices,
        "num_nodes": machine.nodes,
        "strategy": machine.strategy,
        "precision": machine.precision,
        "sync_batchnorm": machine.sync_batchnorm,
    }


def keep_checkpoint(folder: Path, name: str, *, monitor: str | None) -> ModelCheckpoint:
    """Writes ``NAME.ckpt`` after each epoch, or after each that is the best so far by `monitor`."""
    return _Checkpoint(
        dirpath=folder,
        filename=name,
        monitor=monitor,
        mode="max",
        save_top_k=1,
        save_on_train_epoch_end=True,
        enable_version_counter=False,
    )


class _Checkpoint(ModelCheckpoint):
    """Knows the best epoch so far also where the run's folder has been moved."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict({**state_dict, "dirpath": self.dirpath})


class WholeFiles(TorchCheckpointIO):
    """Checkpoints written beside and renamed; Lightning moves a file over from the system's temporary folder."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        with written_whole(Path(path)) as beside:
            torch.save(checkpoint, beside)


class QuietEnd(TensorBoardLogger):
    """TensorBoard's files; where they cannot be written, closing them does not hide the error that ended the run."""

    def finalize(self, status: str) -> None:
        with suppress(OSError) if status == "failed" else nullcontext():
            super().finalize(status)


class Stops(Callback):
    """Ends a run when a signal has come, in place of Lightning, which waits for the batch's end and exits with 0.

    Args:
        handler: The handler of `mrla.train.stopping`.
    """

    def __init__(self, handler: StopOnce):
        self.handler = handler
        self._before = signal.getsignal(signal.SIGTERM)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Lightning has just put its own in place, which may not be called in the middle of a collective.
        if threading.current_thread() is threading.main_thread() and self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def on_train_batch_start(self, *_: Any) -> None:
        self.handler.check()

    def on_validation_batch_start(self, *_: Any) -> None:
        self.handler.check()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        end_other_processes(trainer)


def end_other_processes(trainer: L.Trainer) -> None:
    """Ends the processes that Lightning has started for a run: they write nothing, and would wait for ever."""
    processes = getattr(trainer.strategy.launcher, "procs", [])
    for process in (ended := list(processes)):
        process.kill()
    processes.clear()  # Lightning kills this process when it sees that one of those has ended
    for process in ended:
        process.wait()


@contextmanager
def quiet_threads() -> Iterator[None]:
    """No traceback of TensorBoard's thread where its file cannot be written: the error is raised in the run as well."""
    before = threading.excepthook

    def hook(told: threading.ExceptHookArgs) -> None:
        if not (isinstance(told.exc_value, OSError) and type(told.thread).__module__.startswith("tensorboard")):
            before(told)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Without Lightning's lines on devices and its advice on workers and log intervals, which a recipe has decided."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*is smaller than the logging interval.*")
        warnings.filterwarnings("ignore", message=".*Checkpoint directory .* exists and is not empty.*")
        # Scores are already those of all processes.
        warnings.filterwarnings("ignore", message=".*sync_dist=True.*")
        warnings.filterwarnings("ignore", message=".*GPU available but not used.*")
        # A frozen backbone is meant to be so.
        warnings.filterwarnings("ignore", message=".*in eval mode at the start of training.*")
        warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.*")  # Lightning 2.6 under torch 2.14
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
