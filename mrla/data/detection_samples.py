"""Samples of detection and instance segmentation: images, and targets that say what is in them."""

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from .annotated_images import DataReport
from .randomness import derive_seed, seeded
from .samples import ImageFacts, KeyedSamples
from .sampling import PADDING, SampleKey

Target = dict[str, Any]
"""What is in an image, as torchvision's detectors and torchmetrics' `MeanAveragePrecision` take it: `DetectionSamples`
says what is in it."""


class ImagesWithTargets(Protocol):
    """Images (3, h, w) uint8 and their targets, by index."""

    def fingerprint(self) -> str | None: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Tensor, Target]: ...


class DetectionSamples(KeyedSamples):
    """Images with objects in them; a flip is a function of seed, epoch and index.

    A sample is an image (3, h, w), float32 from 0 to 1, and a target:

    - ``boxes``: (n, 4) float32: x1, y1, x2, y2 in pixels from the image's corner
    - ``labels``: (n,) int64, from 1: 0 is the background
    - ``masks``: (n, h, w) uint8, where the data have masks
    - ``image_id``: the image's id in the data
    - ``area``: (n,) float32: the object's, as the data give it, in pixels
    - ``iscrowd``: (n,) int64: 1 where finding the object, or not, does not count

    A key of `PADDING` gives the first image and a target of no object whose ``image_id`` is `PADDING`: what a network
    finds there must not be counted.

    Args:
        source: The images and targets.
        report: What was left out or changed.
        facts: Class names and category ids.
        seed: Decides the flips.
        augment: Whether there are any.
    """

    def __init__(self, source: ImagesWithTargets, report: DataReport, facts: ImageFacts, *, seed: int, augment: bool):
        self.source, self.report, self.facts, self.seed, self.augment = source, report, facts, seed, augment

    def __len__(self) -> int:
        return len(self.source)

    def fingerprint(self) -> str | None:
        """A hash of all annotations, the files' names with them; None for images that are drawn."""
        return self.source.fingerprint()

    def __getitem__(self, key: SampleKey) -> tuple[Tensor, Target]:
        epoch, index = key
        place = 0 if index == PADDING else index
        image, target = self.source[place]
        if self.augment:
            with seeded(derive_seed(self.seed, "sample", epoch, place)):
                image, target = _flipped_or_not(image, target)
        if index == PADDING:
            nothing = {name: entry[:0] for name, entry in target.items() if isinstance(entry, Tensor)}
            target = nothing | {"image_id": PADDING}
        return image.float() / 255, target

    @staticmethod
    def collate(batch: Sequence[tuple[Tensor, Target]]) -> tuple[list[Tensor], list[Target]]:
        """A batch as torchvision's detectors take it: lists of images and of targets, for images differ in size."""
        return [image for image, _ in batch], [target for _, target in batch]


def _flipped_or_not(image: Tensor, target: Target) -> tuple[Tensor, Target]:
    from torchvision import tv_tensors
    from torchvision.transforms import v2

    size: Any = tuple(image.shape[-2:])
    typed: Target = {
        "image": tv_tensors.Image(image),
        "boxes": tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=size),  # pyright: ignore
    }
    if "masks" in target:
        typed["masks"] = tv_tensors.Mask(target["masks"])
    changed = {name: entry.as_subclass(Tensor) for name, entry in v2.RandomHorizontalFlip(p=0.5)(typed).items()}
    return changed.pop("image"), target | changed
