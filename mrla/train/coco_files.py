"""Annotated images in files: what is checked of every object, and COCO's own form, read and written."""

import json
import math
import pickle
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from os import listdir
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .data import UndecodableImageError, open_image

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
    "area_computed": "areas computed, for none was given",
    "empty_images": "images left out of training, they have no object to learn from",
}
OBJECTS_LEFT_OUT = ("crowd_left_out", "difficult_left_out", "zero_area", "outside", "below_a_pixel", "no_mask")
"""The counts of a `DataReport` that together with its `objects` make its `objects_read`."""

_EXAMPLES = 3
_PRECISION = 1e-3  # of a coordinate, in pixels: float32 has no more where an image is 10,000 pixels wide
_FARTHEST = 10  # times the image's size: pycocotools takes memory in proportion to a polygon's extent


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
        width: Its width, likewise.
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
        pixels = np.array(_opened(record))
        target: dict[str, Any] = {
            "boxes": torch.tensor(record.boxes, dtype=torch.float32).reshape(-1, 4),
            "labels": torch.tensor(record.labels, dtype=torch.int64),
            "image_id": record.image_id,
            "area": torch.tensor(record.areas, dtype=torch.float32),
            "iscrowd": torch.tensor(record.crowd, dtype=torch.int64),
        }
        if self.masks:
            decoded = [decode_mask(entry, record.height, record.width) for entry in record.segmentations]
            masks = np.stack(decoded) if decoded else np.zeros((0, record.height, record.width), np.uint8)
            target["masks"] = torch.from_numpy(masks)
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous(), target

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


def read_categories(annotations: Path) -> dict[int, str]:
    """The categories of an instances file.

    Args:
        annotations: The file.

    Returns:
        Name of each category id, in the order of the ids, which is that of the labels from 1.

    Raises:
        ValueError: If it is not such a file.
    """
    return _categories(_content(annotations), annotations)


def read_instances(
    annotations: Path, images: Path, *, training: bool, masks: bool, skip_empty: bool
) -> tuple[list[ImageRecord], dict[int, str], DataReport]:
    """Reads and checks an instances file.

    Args:
        annotations: The file.
        images: Folder of the images.
        training: Whether the objects are to learn from.
        masks: Whether segmentations are read.
        skip_empty: Whether images without an object are left out.

    Returns:
        The images in the order of their ids, the categories as `read_categories` has them, and what was left out or
        changed.

    Raises:
        ValueError: If something is not as COCO has it: the message names file and id.
    """
    content = _content(annotations)
    categories = _categories(content, annotations)
    labels = {category: label for label, category in enumerate(categories, start=1)}
    records = _images(content, annotations, images)
    report = DataReport(str(annotations))
    seen: set[int] = set()
    for entry in _entries(content, "annotations", annotations):
        number = _whole(entry, "id", f"an annotation in {annotations}")
        where = f"annotation {number} in {annotations}"
        if number in seen:
            raise ValueError(f"annotation ids must differ: {annotations} has {number} twice; number them anew")
        seen.add(number)
        record = records.get(_whole(entry, "image_id", where))
        if record is None:
            raise ValueError(
                f"image_id must be one of the images: {where} has {entry['image_id']}; add the image or remove the "
                f"annotation"
            )
        label = labels.get(_whole(entry, "category_id", where))
        if label is None:
            raise ValueError(
                f"category_id must be one of the categories: {where} has {entry['category_id']}; add the category or "
                f"remove the annotation"
            )
        report.objects_read += 1
        _add_object(record, entry, label, where, f"annotation {number}", training, masks, report)
    check_images_are_there(images, list(records.values()))
    in_order = [records[number] for number in sorted(records)]
    return kept_records(in_order, report, skip_empty=skip_empty), categories, report


def _add_object(
    record: ImageRecord,
    entry: dict[str, Any],
    label: int,
    where: str,
    place: str,
    training: bool,
    masks: bool,
    report: DataReport,
) -> None:
    crowd = entry.get("iscrowd", 0)  # COCO tools take an object without it for no crowd
    if crowd not in (0, 1):
        raise ValueError(f"iscrowd must be 0 or 1: {where} has {crowd!r}")
    left, top, width, height = _numbers(entry, "bbox", where)
    if width < 0 or height < 0:
        raise ValueError(
            f"bbox must be [x, y, width, height] with no negative size: {where} has {entry['bbox']}; corners are not "
            f"COCO's form"
        )
    area = _area(entry, where)
    size = record.height, record.width
    segmentation, short = _checked_segmentation(entry, size, where) if masks else (None, 0)
    if training and crowd:
        report.note("crowd_left_out", place)
        return
    corners = (left, top, left + width, top + height)
    box = settled_box(corners, size, training=training, report=report, place=place)
    if box is None:
        return
    for _ in range(short):
        report.note("short_polygons", place)
    if masks and segmentation == []:
        report.note("no_mask", place)
        return
    if crowd:
        report.note("crowd_ignored", place)
    if area is None:
        report.note("area_computed", place)
        area = float(decode_mask(segmentation, *size).sum()) if masks else width * height
    record.add(box, label, area, int(crowd), segmentation)


def decode_mask(segmentation: Any, height: int, width: int) -> np.ndarray:
    """A mask from COCO's polygons or run lengths, which were checked before, exactly as pycocotools makes it.

    Args:
        segmentation: A list of polygons, or ``size`` and ``counts``, a list or a string.
        height: Height of the image, in pixels.
        width: Its width, likewise.

    Returns:
        (h, w) uint8, 1 where the object is.

    Example:
        >>> int(decode_mask({"size": [2, 3], "counts": [1, 2, 3]}, 2, 3).sum())
        2
    """
    tools = _mask_tools()
    compressed = segmentation
    if isinstance(segmentation, list):
        compressed = tools.merge(tools.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation["counts"], list):
        compressed = tools.frPyObjects(segmentation, height, width)
    with warnings.catch_warnings():
        # Each call of pycocotools 2.0.11 makes numpy 2 warn of how it hands over an array.
        warnings.filterwarnings("ignore", message="__array__ implementation", category=DeprecationWarning)
        return tools.decode(compressed)


def encode_mask(mask: np.ndarray) -> dict[str, Any]:
    """A mask as compressed run lengths, fit for JSON.

    Args:
        mask: (h, w) uint8.

    Returns:
        ``size`` and ``counts``.

    Example:
        >>> encode_mask(np.ones((2, 3), np.uint8))
        {'size': [2, 3], 'counts': '06'}
    """
    encoded = _mask_tools().encode(np.asfortranarray(mask))
    return {"size": list(map(int, encoded["size"])), "counts": encoded["counts"].decode("ascii")}


def run_lengths(counts: str) -> list[int]:
    """The run lengths in COCO's compressed string, for a check: pycocotools leaves what they do not reach unset.

    Five bits a character, lowest first, 32 says that more follow, and the sign is in the last; from the fourth on a
    length is told as its difference from the one two before.

    Args:
        counts: The string.

    Returns:
        The lengths, of what does not belong to the object first.

    Raises:
        ValueError: If it is no such string.

    Example:
        >>> run_lengths("06")
        [0, 6]
    """
    lengths: list[int] = []
    value = shift = 0
    for character in counts:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 30:
            raise ValueError(f"{character!r} is not expected")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        lengths.append(value + (lengths[-2] if len(lengths) > 2 else 0))
        value = shift = 0
    if shift:
        raise ValueError("it ends within a number")
    return lengths


def _opened(record: ImageRecord) -> Any:
    """The image as it is stored: like COCO's tools it does not heed EXIF's orientation, and neither do annotations."""
    try:
        image = open_image([record.path], 0)
    except UndecodableImageError as error:
        raise UndecodableImageError(f"{error} [{record.place}]") from error
    if image.size != (record.width, record.height):
        raise UndecodableImageError(
            f"{record.path} ({record.place}) must have the size that its annotations say, {record.width}x"
            f"{record.height} (width x height): it has {image.size[0]}x{image.size[1]}; repair one of them"
        )
    return image


def _mask_tools() -> Any:
    try:
        from pycocotools import mask
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "masks in COCO's form need pycocotools, which is not installed: pip install 'mrla[dense]'", name=error.name
        ) from error
    return mask


def _content(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise ValueError(f"the annotations must be a file: {path} cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be JSON: {error}; it may be damaged, fetch or write it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object with images, annotations and categories: it is another thing")
    return content


def _entries(content: dict[str, Any], key: str, path: Path) -> list[dict[str, Any]]:
    entries = content.get(key)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        found = "something else there" if key in content else f"only {', '.join(map(repr, content)) or 'nothing'}"
        raise ValueError(f"{path} must have a list of objects {key!r}, as COCO's instances files do: it has {found}")
    return entries


def _categories(content: dict[str, Any], path: Path) -> dict[int, str]:
    names: dict[int, str] = {}
    for entry in _entries(content, "categories", path):
        number = _whole(entry, "id", f"a category in {path}")
        if number in names:
            raise ValueError(f"category ids must differ: {path} has {number} twice; number them anew")
        names[number] = _text(entry, "name", f"category {number} in {path}")
    if not names:
        raise ValueError(f"{path} must have a category: it has none")
    return dict(sorted(names.items()))


def _images(content: dict[str, Any], path: Path, folder: Path) -> dict[int, ImageRecord]:
    records: dict[int, ImageRecord] = {}
    for entry in _entries(content, "images", path):
        number = _whole(entry, "id", f"an image in {path}")
        where = f"image {number} in {path}"
        if number in records:
            raise ValueError(f"image ids must differ: {path} has {number} twice; number them anew")
        records[number] = ImageRecord(
            path=str(folder / _text(entry, "file_name", where)),
            place=where,
            image_id=number,
            height=_whole(entry, "height", where, least=1),
            width=_whole(entry, "width", where, least=1),
        )
    return records


def _needed(entry: dict[str, Any], key: str, where: str) -> Any:
    if key not in entry:
        raise ValueError(f"{where} must have {key!r}: it has only {', '.join(map(repr, entry)) or 'nothing'}")
    return entry[key]


def _whole(entry: dict[str, Any], key: str, where: str, least: int = 0) -> int:
    value = _needed(entry, key, where)
    if type(value) is not int or value < least:  # True is an int too
        raise ValueError(f"{key} must be a whole number, {least} or more: {where} has {value!r}")
    return value


def _text(entry: dict[str, Any], key: str, where: str) -> str:
    value = _needed(entry, key, where)
    if not isinstance(value, str) or not value:
        raise ValueError(f"{key} must be a text: {where} has {value!r}")
    return value


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _numbers(entry: dict[str, Any], key: str, where: str) -> list[float]:
    values = _needed(entry, key, where)
    if not isinstance(values, list) or len(values) != 4 or not all(map(_is_number, values)):
        raise ValueError(f"{key} must be four finite numbers: {where} has {values!r}")
    return values


def _area(entry: dict[str, Any], where: str) -> float | None:
    value = entry.get("area")
    if value is not None and (not _is_number(value) or value < 0):
        raise ValueError(f"area must be a finite number, zero or more: {where} has {value!r}")
    return value


def _checked_segmentation(entry: dict[str, Any], size: tuple[int, int], where: str) -> tuple[Any, int]:
    """The segmentation, and how many polygons were left out of it for having fewer than 3 points."""
    segmentation = entry.get("segmentation")
    if isinstance(segmentation, dict):
        _check_run_lengths(segmentation, size, where)
        return {"size": list(size), "counts": segmentation["counts"]}, 0
    if not isinstance(segmentation, list):
        raise ValueError(
            f"segmentation must be a list of polygons or run lengths: {where} has {segmentation!r}; for boxes alone "
            f"set data.masks to false"
        )
    farthest = _FARTHEST * max(size)
    for polygon in segmentation:
        if not isinstance(polygon, list) or len(polygon) % 2 or not all(map(_is_number, polygon)):
            raise ValueError(
                f"a polygon must be a list of finite numbers, x and y in turn: {where} has {polygon!r:.80}"
            )
        if any(abs(value) > farthest for value in polygon):
            raise ValueError(f"a polygon must lie near its image: {where} has coordinates above {farthest}")
    # pycocotools would take four numbers for a box, and refuse two.
    polygons = [polygon for polygon in segmentation if len(polygon) >= 6]
    return polygons, len(segmentation) - len(polygons)


def _check_run_lengths(segmentation: dict[str, Any], size: tuple[int, int], where: str) -> None:
    if segmentation.get("size") != list(size):
        raise ValueError(
            f"run lengths must be of the image's size, {list(size)} (height, width): {where} has "
            f"{segmentation.get('size')!r}"
        )
    counts = segmentation.get("counts")
    if isinstance(counts, str):
        try:
            counts = run_lengths(counts)
        except ValueError as error:
            raise ValueError(f"counts must be COCO's compressed run lengths: in {where} {error}") from error
    if not isinstance(counts, list) or not all(type(count) is int and count >= 0 for count in counts):
        raise ValueError(f"counts must be a text or a list of whole numbers, zero or more: {where} has {counts!r:.80}")
    if sum(counts) != size[0] * size[1]:
        raise ValueError(
            f"run lengths must fill the image, {size[0] * size[1]} pixels: those of {where} add up to {sum(counts)}"
        )
