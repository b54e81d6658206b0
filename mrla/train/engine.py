"""How Lightning is set up: devices, threads, checkpoints written whole, and what it need not say."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from mrla.models.atomic_write import written_whole

from .recipes import Machine


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


@contextmanager
def thread_limit(number: int | None) -> Iterator[None]:
    """The body on `number` threads of the CPU, or on as many as there are if it is None."""
    before = torch.get_num_threads()
    if number is not None:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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
