"""What is recorded of a run, and its files: every epoch's scores and every tenth step's loss."""

import csv
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from mrla.files.atomic_write import written_whole

from .task import LOG_EVERY, Task

EPOCHS, STEPS = "history.csv", "steps.csv"


class History(Callback):
    """Keeps a run's numbers in its checkpoint, so that a resumed run's files have every row once.

    Args:
        folder: Where ``history.csv`` and ``steps.csv`` are written anew after each epoch.

    `seconds` is the time of all finished epochs, those before a resume too.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.epochs: list[dict[str, float]] = []
        self.steps: list[dict[str, float]] = []
        self.seconds = 0.0
        self._lr, self._since = float("nan"), time.monotonic()

    def state_dict(self) -> dict[str, Any]:
        return {"epochs": self.epochs, "steps": self.steps, "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.epochs, self.steps = list(state_dict["epochs"]), list(state_dict["steps"])
        self.seconds = state_dict["seconds"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._since = time.monotonic()

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._lr = trainer.optimizers[0].param_groups[0]["lr"]  # at the epoch's end it is the next epoch's already

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % LOG_EVERY == 0:
            # Reducing overwrites what it is given.
            loss = trainer.strategy.reduce(outputs["loss"].detach().clone(), reduce_op="mean")
            row = {"step": trainer.global_step, "epoch": trainer.current_epoch + 1, "loss": float(loss)}
            self.steps.append(row)
            _to_loggers(trainer, {"train_loss_step": row["loss"]})

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, Task)
        row: dict[str, float] = {"epoch": trainer.current_epoch + 1, "lr": self._lr}
        row |= {f"train_{name}": value for name, value in pl_module.train_numbers().items()}
        row |= {f"val_{name}": value for name, value in pl_module.val_numbers().items()}
        now = time.monotonic()
        self.seconds, self._since = self.seconds + now - self._since, now
        self.epochs.append(row)
        _to_loggers(trainer, row)
        if trainer.is_global_zero:
            write_csv(self.folder / EPOCHS, self.epochs)
            write_csv(self.folder / STEPS, self.steps)


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes rows as CSV, whole or not at all; what a row lacks, such as one of another version, is an empty cell.

    Args:
        path: The file.
        rows: Its rows; none makes an empty file.
    """
    with written_whole(path) as beside, beside.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)


def _to_loggers(trainer: L.Trainer, row: Mapping[str, float]) -> None:
    for logger in trainer.loggers:
        logger.log_metrics(dict(row), step=trainer.global_step)
