"""COCO's instances files, read and checked."""

import json
import math
from pathlib import Path
from typing import Any

from .annotated_images import (
    MOST_PIXELS,
    DataReport,
    ImageRecord,
    check_images_are_there,
    check_size,
    kept_records,
    settled_box,
)
from .coco_masks import decode_mask, run_lengths

_LARGEST = 2**53  # a whole number that float64 has exactly
_FARTHEST = 10  # times the image's size: pycocotools takes memory in proportion to a polygon's extent


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
    check_images_are_there(images, list(records.values()))
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
    if not area:  # some tools write 0 where they know none
        report.note("area_computed", place)
        if masks:
            check_size(record)  # before memory is taken for a mask of that size
        area = float(decode_mask(segmentation, *size).sum()) if masks else width * height
    record.add(box, label, area, int(crowd), segmentation)


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
        name = _text(entry, "file_name", where)
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"file_name must be of a file in {folder}: {where} has {name!r:.80}; name it from there")
        records[number] = ImageRecord(
            path=str(folder / name),
            place=where,
            image_id=number,
            height=_whole(entry, "height", where, least=1, most=MOST_PIXELS),
            width=_whole(entry, "width", where, least=1, most=MOST_PIXELS),
        )
    return records


def _needed(entry: dict[str, Any], key: str, where: str) -> Any:
    if key not in entry:
        raise ValueError(f"{where} must have {key!r}: it has only {', '.join(map(repr, entry)) or 'nothing'}")
    return entry[key]


def _whole(entry: dict[str, Any], key: str, where: str, least: int = 0, most: int = _LARGEST) -> int:
    value = _needed(entry, key, where)
    if type(value) is not int or not least <= value <= most:  # True is an int too
        above = " or more" if most == _LARGEST else f" to {most}"
        raise ValueError(f"{key} must be a whole number, {least}{above}: {where} has {value!r:.80}")
    return value


def _text(entry: dict[str, Any], key: str, where: str) -> str:
    value = _needed(entry, key, where)
    if not isinstance(value, str) or not value:
        raise ValueError(f"{key} must be a text: {where} has {value!r}")
    return value


def _is_number(value: Any) -> bool:
    # Not math.isfinite alone: it has no answer for a whole number of 400 digits.
    return (type(value) is int and abs(value) <= _LARGEST) or (type(value) is float and math.isfinite(value))


def _numbers(entry: dict[str, Any], key: str, where: str) -> list[float]:
    values = _needed(entry, key, where)
    if not isinstance(values, list) or len(values) != 4 or not all(map(_is_number, values)):
        raise ValueError(f"{key} must be four finite numbers: {where} has {values!r:.80}")
    return values


def _area(entry: dict[str, Any], where: str) -> float | None:
    value = entry.get("area")
    if value is not None and (not _is_number(value) or value < 0):
        raise ValueError(f"area must be a finite number, zero or more: {where} has {value!r:.80}")
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
