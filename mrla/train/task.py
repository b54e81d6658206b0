"""Tasks as Lightning sees them, and image classification: one step of training, one of validation, what is counted."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics import Metric

from mrla.data.randomness import derive_seed, seed_generators
from mrla.data.samples import IGNORE_LABEL
from mrla.models import save

from .recipe import Optim
from .schedule import make_optimizer, make_schedule

LOG_EVERY = 10
"""Every tenth step's loss is recorded, as in the notebook; as often it is looked whether the loss is still finite."""


class DivergedError(ValueError):
    """The loss became NaN or infinite."""


def check_labels(labels: Any, classes: int) -> None:
    """Refuses labels that are not one class for each image: a loss may take others, an accuracy would be wrong.

    Args:
        labels: Those of a batch.
        classes: How many classes the network tells apart.

    Raises:
        ValueError: If they are no whole numbers (b,), or not of those classes; on a GPU, which looking would make wait,
            the second is not checked.

    Example:
        >>> check_labels(torch.tensor([0, 2]), classes=3)
    """
    if not isinstance(labels, Tensor) or labels.ndim != 1 or labels.is_floating_point() or labels.dtype == torch.bool:
        found = type(labels).__name__
        if isinstance(labels, Tensor):
            found = f"{str(labels.dtype).removeprefix('torch.')} of shape {tuple(labels.shape)}"
        raise ValueError(
            f"labels must be one class for each image, whole numbers of shape (b,): got {found}; labels of several "
            f"classes at once, or probabilities of classes, are not what this loss and accuracy are for"
        )
    if labels.device.type != "cpu":
        return
    known = (labels >= 0) & (labels < classes) | (labels == IGNORE_LABEL)
    if not known.all():
        raise ValueError(
            f"labels must be from 0 to {classes - 1}, for the network tells {classes} classes apart: got "
            f"{int(labels[~known][0])}; give it a classifier for as many classes as the images have"
        )


class Scores(Metric):
    """Loss and accuracies, each a mean over images, over all processes.

    Args:
        classes: Number of classes; with fewer than six every image is among the five, so that top-5 says nothing.
    """

    full_state_update = False
    loss_sum: Tensor
    counts: Tensor

    def __init__(self, classes: int):
        super().__init__()
        self.top, self.has_top5 = min(5, classes), classes > 5
        self.add_state("loss_sum", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(3, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Counts a batch whose mean loss is `loss`; padding samples do not count."""
        counted = labels != IGNORE_LABEL
        images = counted.sum()
        hits = logits.topk(self.top, dim=1).indices.eq(labels[:, None])
        # Padding alone has the mean loss 0 / 0.
        self.loss_sum += torch.where(images > 0, loss * images, 0.0)
        self.counts += torch.stack((images, hits[:, 0].sum(), hits.sum()))

    def compute(self) -> dict[str, float]:
        """``loss``, ``accuracy``, ``accuracy_top5`` where there are more than five classes, and ``images``."""
        images, top1, top5 = self.counts.tolist()
        return {
            "loss": self.loss_sum.item() / max(images, 1),
            "accuracy": top1 / max(images, 1),
            **({"accuracy_top5": top5 / max(images, 1)} if self.has_top5 else {}),
            "images": images,
        }


class Task(L.LightningModule, ABC):
    """What all tasks share: a network, its optimizer and schedule, seeds, and whether the loss stays finite.

    Args:
        model: The network.
        optim: Optimizer and learning rate.
        epochs: Epochs that the schedule is spread over.
        seed: Decides what is drawn in each step.
        new: Patterns of parameters that count as new to a trained network, beside mixers and classifier.
    """

    metric: str
    """The number of validation that a run is judged by; larger is better."""

    def __init__(
        self, model: nn.Module, *, optim: Optim | None = None, epochs: int = 1, seed: int = 0, new: Sequence[str] = ()
    ):
        super().__init__()
        self.model = model
        self.optim, self.epochs, self.seed, self.new = optim or Optim(), epochs, seed, tuple(new)
        self._never = torch.iinfo(torch.long).max
        self.register_buffer("first_bad_step", torch.tensor(self._never), persistent=False)

    @abstractmethod
    def train_numbers(self) -> dict[str, float]:
        """What this epoch's training gave, over all processes; ``loss`` is there."""

    @abstractmethod
    def val_numbers(self) -> dict[str, float]:
        """What the last validation gave, over all processes; `metric` is there."""

    @abstractmethod
    def save(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Writes the network with other weights to a folder from which it can be rebuilt."""

    def on_train_epoch_start(self) -> None:
        # A loader of the caller's that Lightning has given a sampler, for several processes, draws what it draws now.
        self._seed_step()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self._seed_step()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (batch_idx + 1) % LOG_EVERY == 0 or self.trainer.is_last_batch:
            self.check_finite()

    def note_loss(self, loss: Tensor) -> None:
        """Remembers the first step whose loss is not finite, on the device: looking at every loss makes a GPU wait."""
        assert isinstance(self.first_bad_step, Tensor)
        with torch.no_grad():
            self.first_bad_step.clamp_(max=torch.where(loss.isfinite(), self._never, self.global_step))

    def configure_optimizers(self) -> Any:
        """Optimizer and per-step schedule."""
        optimizer = make_optimizer(self.model, self.optim, new=self.new)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = make_schedule(optimizer, self.optim, epochs=self.epochs, steps_per_epoch=steps // self.epochs)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def check_finite(self) -> None:
        """Stops the run if a loss since the last look was not finite.

        Raises:
            DivergedError: With the first such step.
        """
        assert isinstance(self.first_bad_step, Tensor)
        # All processes stop together: one that went on alone would wait for the others for ever.
        step = int(self.trainer.strategy.reduce(self.first_bad_step.clone(), reduce_op="min"))
        if step != self._never:
            raise DivergedError(f"the loss became NaN or infinite at step {step}")

    def _seed_step(self) -> None:
        seed_generators(derive_seed(self.seed, "step", self.global_step, self.global_rank), self.device)


class Classification(Task):
    """A network, its loss and its optimizer.

    Args:
        model: Network from images to logits.
        classes: Number of its logits.
        optim: Optimizer and learning rate.
        epochs: Epochs that the schedule is spread over.
        label_smoothing: Smoothing of the labels in training.
        smooth_validation: Whether the validation loss is smoothed too.
        seed: Decides what is drawn in each step (dropout, stochastic depth).
        new: Patterns of parameters that count as new to a trained network, beside mixers and classifier.
        saved: What `mrla.save` is told beside the weights, such as the names of the classes.
    """

    metric = "accuracy"

    def __init__(
        self,
        model: nn.Module,
        *,
        classes: int,
        optim: Optim | None = None,
        epochs: int = 1,
        label_smoothing: float = 0.0,
        smooth_validation: bool = False,
        seed: int = 0,
        new: Sequence[str] = (),
        saved: Mapping[str, Any] | None = None,
    ):
        super().__init__(model, optim=optim, epochs=epochs, seed=seed, new=new)
        self.saved = dict(saved or {})
        self.label_smoothing = label_smoothing
        self.val_smoothing = label_smoothing if smooth_validation else 0.0
        self.classes = classes
        self.train_scores, self.val_scores = Scores(classes), Scores(classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        return self.model(images)

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        self.train_scores.reset()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss of one batch."""
        images, labels = batch
        check_labels(labels, self.classes)
        logits = self.model(images)
        loss = cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        with torch.no_grad():
            self.train_scores.update(loss.detach(), logits.detach(), labels)
        self.note_loss(loss)
        return loss

    def on_validation_epoch_start(self) -> None:
        self.val_scores.reset()

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Counts one batch."""
        images, labels = batch
        check_labels(labels, self.classes)
        logits = self.model(images)
        loss = cross_entropy(logits, labels, label_smoothing=self.val_smoothing, ignore_index=IGNORE_LABEL)
        self.val_scores.update(loss, logits, labels)

    def on_validation_epoch_end(self) -> None:
        scores = self.val_scores.compute()
        if self.trainer.state.fn == "fit" and not scores["loss"] < float("inf"):
            raise DivergedError(f"the validation loss became {scores['loss']} after step {self.global_step}")
        self.log_dict({f"val_{name}": float(value) for name, value in scores.items()}, prog_bar=False)

    def train_numbers(self) -> dict[str, float]:
        scores = self.train_scores.compute()
        return {name: scores[name] for name in ("loss", "accuracy")}

    def val_numbers(self) -> dict[str, float]:
        scores = self.val_scores.compute()
        return {name: value for name, value in scores.items() if name != "images"}

    def save(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        save(self.model, folder, state_dict=weights, **self.saved)
