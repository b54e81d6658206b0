"""Detection as Lightning sees it: one step of training, one of validation, and average precision as COCO counts it."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

from mrla.data.sampling import PADDING
from mrla.dense import save

from .recipe import Optim
from .task import Task

MASK_THRESHOLD = 0.5
"""From what probability on a pixel belongs to a predicted mask, as in torchvision's and MMDetection's evaluation."""

PRECISIONS = {"ap": "map", "ap50": "map_50", "ap75": "map_75", "ap_small": "map_small", "ap_medium": "map_medium"}
PRECISIONS |= {"ap_large": "map_large"}
"""Our names of COCO's numbers, and torchmetrics'."""


class AveragePrecision:
    """AP of boxes and, where there are any, of masks, over all processes, by pycocotools through torchmetrics.

    Args:
        masks: Whether the predictions and targets have masks.
    """

    def __init__(self, *, masks: bool):
        from torchmetrics.detection import MeanAveragePrecision

        self.kinds = {"box": "bbox", **({"mask": "segm"} if masks else {})}
        with _quiet_coco_tools():
            self.metric: Any = MeanAveragePrecision(
                iou_type=tuple(self.kinds.values()),  # type: ignore[arg-type]
                # COCO's own, in float64: those of torchmetrics are float32, and a recall of 1 / 5 lies below its 0.2.
                iou_thresholds=np.linspace(0.5, 0.95, 10).tolist(),
                rec_thresholds=np.linspace(0.0, 1.0, 101).tolist(),
                backend="pycocotools",
            )
        self.metric.warn_on_many_detections = False  # torchvision's detectors keep 100, or what they were told

    def reset(self) -> None:
        """Forgets all images."""
        self.metric.reset()

    def update(self, predictions: Sequence[Mapping[str, Tensor]], targets: Sequence[Mapping[str, Any]]) -> None:
        """Counts images; padding counts as an image in which nothing is, and nothing was found: it changes no number.

        Args:
            predictions: What a detector of torchvision's returns.
            targets: What `DetectionSamples` gives for evaluation.
        """
        names = ("boxes", "labels", "iscrowd", "area", *(("masks",) if "mask" in self.kinds else ()))
        found, there = [], []
        for prediction, target in zip(predictions, targets, strict=True):
            # Left out, the processes would hold unlike numbers of images, which torchmetrics does not gather.
            number = 0 if target["image_id"] == PADDING else None
            found.append({name: entry[:number] for name, entry in self._prediction(prediction).items()})
            there.append({name: _as_mask(name, target[name])[:number] for name in names})
        with _quiet_coco_tools():
            self.metric.update(found, there)

    def compute(self) -> dict[str, float]:
        """``box_ap``, ``box_ap50`` and so on, and the same of ``mask_ap``, as fractions.

        A size that no object has gives -1, as COCO's tools do.
        """
        with _quiet_coco_tools():
            found = self.metric.compute()
        several = len(self.kinds) > 1
        return {
            f"{kind}_{name}": float(found[f"{theirs}_{number}" if several else number])
            for kind, theirs in self.kinds.items()
            for name, number in PRECISIONS.items()
        }

    def _prediction(self, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        kept = {name: found[name] for name in ("boxes", "labels", "scores")}
        if "mask" in self.kinds:
            kept["masks"] = found["masks"][:, 0] > MASK_THRESHOLD
        return kept


class Detection(Task):
    """A detector of torchvision's, its losses, its optimizer and its average precision.

    Args:
        model: From images and targets to losses in training, from images to predictions in eval mode.
        masks: Whether masks are measured too.
        class_names: Names of the classes without the background.
        optim: Optimizer and learning rate.
        epochs: Epochs that the schedule is spread over.
        seed: Decides what is drawn in each step: proposals, dropout, stochastic depth.
        new: As of `Task`.
    """

    metric = "box_ap"

    def __init__(
        self,
        model: nn.Module,
        *,
        masks: bool,
        class_names: Sequence[str],
        optim: Optim | None = None,
        epochs: int = 1,
        seed: int = 0,
        new: Sequence[str] = (),
    ):
        super().__init__(model, optim=optim, epochs=epochs, seed=seed, new=new)
        self.class_names = tuple(class_names)
        self.train_loss = MeanMetric(nan_strategy="disable")  # a loss that is not finite stops the run, see Task
        self.precision = AveragePrecision(masks=masks)
        self._found: dict[str, float] = {}

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        self.train_loss.reset()

    def training_step(self, batch: tuple[list[Tensor], list[dict[str, Any]]], batch_idx: int) -> Tensor:
        """The sum of a detector's losses over one batch."""
        images, targets = batch
        losses = self.model(images, targets)
        loss = torch.stack(list(losses.values())).sum()
        self.train_loss.update(loss.detach(), len(images))
        self.note_loss(loss)
        return loss

    def on_validation_epoch_start(self) -> None:
        self.precision.metric.to(self.device)
        self.precision.reset()

    def validation_step(self, batch: tuple[list[Tensor], list[dict[str, Any]]], batch_idx: int) -> None:
        """Counts one batch."""
        images, targets = batch
        self.precision.update(self.model(images), targets)

    def on_validation_epoch_end(self) -> None:
        self._found = self.precision.compute()
        self.precision.reset()  # the images' masks need not be kept until the next validation
        self.log_dict({f"val_{name}": value for name, value in self._found.items()}, prog_bar=False)

    def train_numbers(self) -> dict[str, float]:
        return {"loss": float(self.train_loss.compute())}

    def val_numbers(self) -> dict[str, float]:
        return dict(self._found)

    def save(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        save(self.model, folder, state_dict=weights, class_names=self.class_names)


def _as_mask(name: str, entry: Tensor) -> Tensor:
    return entry.bool() if name == "masks" else entry


@contextmanager
def _quiet_coco_tools() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)  # pycocotools under numpy 2
        yield
