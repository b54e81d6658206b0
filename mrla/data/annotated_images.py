"""Annotated images in files, of whatever form: what is checked of every object, and what was left out, counted."""

import pickle
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from os import listdir
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .coco_masks import decode_mask
from .images import Photo, UndecodableImageError, read_photo, read_sizes
from .orientation import upright_boxes, upright_masks

_SAID = {
    "crowd_ignored": "crowd regions in which detections are not counted",
    "crowd_left_out": "crowd regions left out of training",
    "difficult_ignored": "difficult objects of which detections are not counted",
    "difficult_left_out": "difficult objects left out of training",
    "zero_area": "objects left out, their box has no area",
    "outside": "objects left out, their box is outside the image",
    "below_a_pixel": "objects left out of training, their box is less than a pixel wide or high",
    "no_mask": "objects left out, their segmentation has no polygon of 3 points or more",
    "clipped": "boxes clipped to the image",
    "short_polygons": "polygons of fewer than 3 points left out of a segmentation",
    "area_computed": "areas computed, for none was given, or 0",
    "empty_images": "images left out of training, they have no object to learn from",
}
OBJECTS_LEFT_OUT = ("crowd_left_out", "difficult_left_out", "zero_area", "outside", "below_a_pixel", "no_mask")
"""The counts of a `DataReport` that together with its `objects` make its `objects_read`."""

MOST_PIXELS = 65_500
"""The longest side of an image that annotations may say: JPEG has no longer one."""

_EXAMPLES = 3
_PRECISION = 1e-3  # of a coordinate, in pixels: float32 has no more where an image is 10,000 pixels wide


class DataReport:
    """How much was read, and what was left out or changed, with the first few places of each.

    Args:
        source: Where the data are from.

    Attributes:
        images_read: Images in the data.
        images: Images kept.
        objects_read: Objects in the data; of drawn images they are not counted, and this is 0.
        objects: Objects kept.
        counts: How often something was left out or changed, by a short name.
        examples: File and id of the first few of each.

    Example:
        >>> report = DataReport("instances.json")
        >>> report.note("clipped", "annotation 7")
        >>> print(report)
        instances.json: 0 of 0 images and 0 of 0 objects are used
          1 boxes clipped to the image: annotation 7
    """

    def __init__(self, source: str):
        self.source = source
        self.images_read = self.images = self.objects_read = self.objects = 0
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}

    def note(self, name: str, place: str) -> None:
        """Counts one case.

        Args:
            name: Which of the counts.
            place: File or id.
        """
        assert name in _SAID
        self.counts[name] += 1
        if self.counts[name] <= _EXAMPLES:
            self.examples.setdefault(name, []).append(place)

    def __str__(self) -> str:
        lines = [
            f"{self.source}: {self.images} of {self.images_read} images and {self.objects} of {self.objects_read} "
            f"objects are used"
        ]
        for name, said in _SAID.items():
            if count := self.counts[name]:
                more = ", ..." if count > _EXAMPLES else ""
                lines.append(f"  {count} {said}: {', '.join(self.examples[name])}{more}")
        return "\n".join(lines)


@dataclass
class ImageRecord:
    """One image's annotations, checked.

    Attributes:
        path: The image's file.
        place: What messages call the image.
        image_id: Its id.
        height: Its height as described, in pixels.
        width: Its width as described, in pixels.
        boxes: x1, y1, x2, y2 of each object, in pixels from the image's corner, inside it.
        labels: Label of each object, from 1.
        areas: Area of each, in square pixels.
        crowd: Whether finding it does not count, 0 or 1.
        segmentations: Its polygons or run lengths, in COCO's form; empty where there are no masks.
    """

    path: str
    place: str
    image_id: int
    height: int
    width: int
    boxes: list[tuple[float, ...]] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    areas: list[float] = field(default_factory=list)
    crowd: list[int] = field(default_factory=list)
    segmentations: list[Any] = field(default_factory=list)

    def add(self, box: tuple[float, ...], label: int, area: float, crowd: int, segmentation: Any = None) -> None:
        """Adds an object; the arguments are those of the attributes."""
        self.boxes.append(box)
        self.labels.append(label)
        self.areas.append(area)
        self.crowd.append(crowd)
        if segmentation is not None:
            self.segmentations.append(segmentation)


class AnnotatedImages:
    """Images in files and their targets, by index.

    Args:
        records: What is known of each image.
        masks: Whether targets have masks.
    """

    def __init__(self, records: Sequence[ImageRecord], *, masks: bool):
        # As one piece of memory: a worker that looks at a Python object writes its reference count, and so would come
        # to own a copy of each page of the many small objects that annotations are.
        pickled = [pickle.dumps(record, protocol=pickle.HIGHEST_PROTOCOL) for record in records]
        self.ends = np.cumsum([0, *map(len, pickled)])
        self.pickled = np.frombuffer(b"".join(pickled), np.uint8)
        self.masks = masks

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Any]]:
        record = self.record(index)
        photo = _opened(record)
        pixels, orientation = np.array(photo.image), _orientation_of_annotations(photo, record)
        boxes = torch.tensor(record.boxes, dtype=torch.float32).reshape(-1, 4)
        target: dict[str, Any] = {
            "boxes": upright_boxes(boxes, (record.width, record.height), orientation),
            "labels": torch.tensor(record.labels, dtype=torch.int64),
            "image_id": record.image_id,
            "area": torch.tensor(record.areas, dtype=torch.float32),
            "iscrowd": torch.tensor(record.crowd, dtype=torch.int64),
        }
        if self.masks:
            decoded = [decode_mask(entry, record.height, record.width) for entry in record.segmentations]
            masks = np.stack(decoded) if decoded else np.zeros((0, record.height, record.width), np.uint8)
            target["masks"] = torch.from_numpy(upright_masks(masks, orientation))
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous(), target

    def fingerprint(self) -> str:
        """A hash of all annotations, the files' names with them."""
        return sha256(self.pickled.data).hexdigest()

    def record(self, index: int) -> ImageRecord:
        """What is known of the image of an index, from 0."""
        if not 0 <= index < len(self):
            raise IndexError(f"there are {len(self)} images: got index {index}")
        return pickle.loads(self.pickled[self.ends[index] : self.ends[index + 1]].data)


def settled_box(
    corners: tuple[float, float, float, float],
    size: tuple[int, int],
    *,
    training: bool,
    report: DataReport,
    place: str,
) -> tuple[float, ...] | None:
    """A box as it is used: clipped to the image, or None where nothing of it can be; either is noted.

    Boxes less than a pixel wide or high are left out of training, as MMDetection does: a flip's rounding could bring
    them to nothing, which torchvision's detectors refuse.

    Args:
        corners: x1, y1, x2, y2, in pixels from the image's corner.
        size: Height and width of the image.
        training: Whether the box is to learn from.
        report: Counts it.
        place: What the report calls the object.

    Returns:
        The corners, or None.

    Example:
        >>> settled_box((-5, 2, 8, 20), (10, 10), training=True, report=(report := DataReport("file")), place="7")
        (0, 2, 8, 10)
        >>> report.counts
        Counter({'clipped': 1})
    """
    height, width = size
    left, top, right, bottom = corners
    if right - left < _PRECISION or bottom - top < _PRECISION:
        report.note("zero_area", place)
        return None
    inside = (max(0, left), max(0, top), min(width, right), min(height, bottom))
    shorter = min(inside[2] - inside[0], inside[3] - inside[1])
    if shorter < _PRECISION:
        report.note("outside", place)
        return None
    if training and shorter < 1:
        report.note("below_a_pixel", place)
        return None
    if any(abs(new - old) > _PRECISION for new, old in zip(inside, corners, strict=True)):
        report.note("clipped", place)
    return inside


def check_images_are_there(folder: Path, records: Sequence[ImageRecord]) -> None:
    """Checks that each image has its file.

    Args:
        folder: Where most of them are.
        records: The images.

    Raises:
        ValueError: If a file is missing; the message names the first.
    """
    if not folder.is_dir():
        raise ValueError(f"the images must be in a folder: there is no folder {folder}")
    there = {str(folder / name) for name in listdir(folder)}  # one question instead of 100,000
    missing = [record for record in records if record.path not in there and not Path(record.path).is_file()]
    if missing:
        more = f", nor are those of {len(missing) - 1} other images" if len(missing) > 1 else ""
        raise ValueError(
            f"every image must have its file: {missing[0].path} ({missing[0].place}) is not there{more}; add the files "
            f"or take the images out of the list"
        )


def kept_records(records: Sequence[ImageRecord], report: DataReport, *, skip_empty: bool) -> list[ImageRecord]:
    """The images that are used, and their number in the report.

    Args:
        records: All images.
        report: Counts those left out, and what is kept.
        skip_empty: Whether images without an object are left out.

    Returns:
        The records.
    """
    kept = [record for record in records if record.boxes or not skip_empty]
    for record in records:
        if skip_empty and not record.boxes:
            report.note("empty_images", record.place)
    report.images_read, report.images = len(records), len(kept)
    report.objects = sum(len(record.boxes) for record in kept)
    return kept


def _orientation_of_annotations(photo: Photo, record: ImageRecord) -> int:
    """The orientation that annotations lie in: 1 where the size that they say is that of the upright image."""
    return 1 if photo.image.size == (record.width, record.height) else photo.orientation


def _opened(record: ImageRecord) -> Photo:
    """The image, upright; its annotations may be in pixels of the upright or of the stored image, by their size."""
    try:
        photo = read_photo(record.path)
    except UndecodableImageError as error:
        raise UndecodableImageError(f"{error} [{record.place}]") from error
    _check_size(record, photo.image.size, photo.stored_size)
    return photo


def check_size(record: ImageRecord) -> None:
    """Checks that an image has the size that its annotations say, upright or as it is stored; it is not decoded.

    Args:
        record: What is known of it.

    Raises:
        UndecodableImageError: If it has another size, or is no image.
    """
    _check_size(record, *read_sizes(record.path))


def _check_size(record: ImageRecord, upright: tuple[int, int], stored: tuple[int, int]) -> None:
    if (record.width, record.height) not in (upright, stored):
        raise UndecodableImageError(
            f"{record.path} ({record.place}) must have the size that its annotations say, {record.width}x"
            f"{record.height} (width x height): it has {upright[0]}x{upright[1]}; repair one of them"
        )
