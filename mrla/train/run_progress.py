"""What is seen of a run while it works: a bar on a terminal, lines elsewhere, and ``log.txt`` in its folder."""

import sys
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, RichProgressBar

from .history import History
from .progress_lines import Lines, left
from .task import LOG_EVERY, Task

LOG = "log.txt"


def epoch_in_words(row: Mapping[str, float], epochs: int) -> str:
    """One epoch's numbers as a line.

    Args:
        row: A row of ``history.csv``.
        epochs: How many there are in all.

    Returns:
        The line.

    Example:
        >>> epoch_in_words({"epoch": 2, "lr": 0.1, "train_loss": 0.51234, "val_accuracy": 0.9}, 30)
        'epoch 2 of 30: train_loss 0.5123, val_accuracy 0.9000'
    """
    numbers = ", ".join(f"{name} {value:.4f}" for name, value in row.items() if name not in ("epoch", "lr"))
    return f"epoch {row['epoch']} of {epochs}: {numbers}"


class EpochLines(Callback):
    """A line for an epoch, with the time that is left; a line a minute where epochs are shorter.

    Args:
        history: That of the run, called before this.
    """

    def __init__(self, history: History):
        self.history, self.lines = history, Lines()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            done = self.history.epochs
            assert isinstance(pl_module, Task)
            rest = self.history.seconds / len(done) * (pl_module.epochs - len(done))
            self.lines.say(f"{epoch_in_words(done[-1], pl_module.epochs)}{left(rest)}")


class Bar(RichProgressBar):
    """Lightning's bar over the batches of an epoch, on standard error, with the loss and the last validation."""

    def __init__(self, history: History):
        super().__init__(console_kwargs={"stderr": True})
        self.history = history
        self._loss = float("nan")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx % LOG_EVERY == 0:  # to read every loss makes a GPU wait
            self._loss = float(outputs["loss"])
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def configure_columns(self, trainer: L.Trainer) -> list:
        """Lightning's columns but the last, batches a second: the loss is to fit into 80 columns."""
        return super().configure_columns(trainer)[:-1]

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """What stands beside the bar."""
        assert isinstance(pl_module, Task)
        metric = f"val_{pl_module.metric}"
        known = {"val": self.history.epochs[-1][metric]} if self.history.epochs else {}
        return {"loss": self._loss, **known}


class RunLog(Callback):
    """Says in a run's ``log.txt`` what runs, each epoch and how it ended; a run that goes on adds to it.

    Args:
        folder: The run's.
        history: Its history, called before this.
        said: What is said at its start, each on a line of its own.
    """

    def __init__(self, folder: Path, history: History, said: Mapping[str, str]):
        self.path, self.history, self.said = folder / LOG, history, said

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            done = len(self.history.epochs)
            self.write(f"start{f' again, after epoch {done}' if done else ''}")
            for name, text in self.said.items():
                self.write(f"{name}: {text}")

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            assert isinstance(pl_module, Task)
            self.write(epoch_in_words(self.history.epochs[-1], pl_module.epochs))

    def write(self, text: str) -> None:
        """Adds a line with the time.

        Args:
            text: The line.
        """
        # What else is written says so where nothing can be written; a log must not hide that, nor stop a run.
        with suppress(OSError), self.path.open("a") as file:
            file.write(f"{datetime.now().astimezone().isoformat(sep=' ', timespec='seconds')} {text}\n")


def shown_progress(history: History) -> Callback:
    """A bar on a terminal, lines where standard error is a file, a pipe or a notebook's."""
    return Bar(history) if sys.stderr.isatty() else EpochLines(history)
