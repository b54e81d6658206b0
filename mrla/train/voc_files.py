"""Pascal VOC's detection annotations, read and checked."""

import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from .annotated_images import DataReport, ImageRecord, check_images_are_there, kept_records, settled_box

VOC_NAMES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
"""VOC's classes, in the order of their labels, which begin at 1."""


def read_voc(folder: Path, name: str, *, training: bool, skip_empty: bool) -> tuple[list[ImageRecord], DataReport]:
    """Reads and checks the annotations of one list of images.

    VOC counts pixels from 1 and its corners are the first and the last pixel of an object; boxes here are from the near
    edge of the first to the far edge of the last. A difficult object is left out of training, and else marked as one
    whose detections do not count, which VOC wants too.

    Args:
        folder: The folder with ``JPEGImages``, ``Annotations`` and ``ImageSets``.
        name: Name of the list in ``ImageSets/Main``.
        training: Whether the objects are to learn from.
        skip_empty: Whether images without an object are left out.

    Returns:
        The images in the order of the list, whose ids are their places in it from 1, and what was left out or changed.

    Raises:
        ValueError: If something is not as VOC has it: the message names the file.
    """
    listed = folder / "ImageSets" / "Main" / f"{name}.txt"
    report = DataReport(str(listed))
    names = _names(listed)
    records = [
        _record(folder, name, number, training=training, report=report) for number, name in enumerate(names, start=1)
    ]
    check_images_are_there(folder / "JPEGImages", records)
    return kept_records(records, report, skip_empty=skip_empty), report


def _names(listed: Path) -> list[str]:
    """The first word of each line: lists of one class have a second, whether it is in the image."""
    try:
        names = [line.split()[0] for line in listed.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        there = sorted(path.stem for path in listed.parent.glob("*.txt") if "_" not in path.stem)
        raise ValueError(
            f"VOC's list of images must be a file: {listed} cannot be read ({error}); there is {there or 'none'}"
        ) from error
    twice = {name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else set()
    if twice:
        raise ValueError(f"a list of images must have each once: {listed} has {min(twice)} twice; remove one")
    return names


def _record(folder: Path, name: str, number: int, *, training: bool, report: DataReport) -> ImageRecord:
    path = folder / "Annotations" / f"{name}.xml"
    root = _parsed(path)
    height, width = (_number(root, f"size/{side}", path) for side in ("height", "width"))
    if min(height, width) < 1 or height % 1 or width % 1:
        raise ValueError(f"an image's size must be whole and positive: {path} has {width:g}x{height:g}")
    image = folder / "JPEGImages" / f"{name}.jpg"
    record = ImageRecord(path=str(image), place=str(path), image_id=number, height=int(height), width=int(width))
    for place, entry in enumerate(root.findall("object"), start=1):
        _add_object(record, entry, f"object {place} in {path}", training, report)
    return record


def _add_object(record: ImageRecord, entry: Any, where: str, training: bool, report: DataReport) -> None:
    report.objects_read += 1
    name = (entry.findtext("name") or "").strip()
    if name not in VOC_NAMES:
        raise ValueError(f"an object's name must be one of VOC's 20 classes: {where} has {name!r}")
    difficult = (entry.findtext("difficult") or "0").strip()
    if difficult not in ("0", "1"):
        raise ValueError(f"difficult must be 0 or 1: {where} has {difficult!r}")
    left, top, right, bottom = (_number(entry, f"bndbox/{side}", where) for side in ("xmin", "ymin", "xmax", "ymax"))
    corners = (left - 1, top - 1, right, bottom)
    width, height = right - left + 1, bottom - top + 1
    if min(width, height) < 0:
        raise ValueError(
            f"a box must not have a negative size: {where} has xmin {left:g}, ymin {top:g}, xmax {right:g}, ymax "
            f"{bottom:g}"
        )
    if training and difficult == "1":
        report.note("difficult_left_out", where)
        return
    box = settled_box(corners, (record.height, record.width), training=training, report=report, place=where)
    if box is None:
        return
    if difficult == "1":
        report.note("difficult_ignored", where)
    record.add(box, VOC_NAMES.index(name) + 1, width * height, int(difficult))


def _number(entry: Any, path: str, where: object) -> float:
    text = entry.findtext(path)
    try:
        value = float(text)
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{path} must be a finite number: {where} has {text!r}")
    return value


class _NoDocumentType(ElementTree.TreeBuilder):
    """Refuses a document type before it is read: it can define texts that grow without bound, or fetch files."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise ValueError(f"it declares a document type {name!r}, which VOC's files do not")


def _parsed(path: Path) -> Any:
    try:
        root = ElementTree.fromstring(path.read_bytes(), parser=ElementTree.XMLParser(target=_NoDocumentType()))
    except OSError as error:
        raise ValueError(
            f"every image in the list must have its annotations: {path} cannot be read ({error.strerror})"
        ) from error
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise ValueError(f"{path} must be XML as VOC has it: {error}") from error
    if root.tag != "annotation":
        raise ValueError(f"{path} must hold an 'annotation': it holds {root.tag!r}")
    return root
