"""Pascal VOC's detection annotations, read and checked."""

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from .annotated_images import MOST_PIXELS, DataReport, ImageRecord, check_images_are_there, kept_records, settled_box

VOC_NAMES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
"""VOC's classes, in the order of their labels, which begin at 1."""


def voc_class_names(folder: Path, lists: Sequence[str]) -> tuple[str, ...]:
    """The classes of a folder in VOC's form: VOC's twenty, or those that the annotations name where they name others.

    Args:
        folder: The folder with ``Annotations`` and ``ImageSets``.
        lists: Names of the lists in ``ImageSets/Main`` whose images count; one that is not there has none.

    Returns:
        The names, in the order of the labels, which begin at 1: that of the alphabet for those of one's own.

    Raises:
        ValueError: If an annotation is missing or not as VOC has it.
    """
    files = [path for name in lists if (path := folder / "ImageSets" / "Main" / f"{name}.txt").is_file()]
    changed = tuple(path.stat().st_mtime_ns for path in (*files, folder / "Annotations") if path.exists())
    return _class_names(folder, tuple(files), changed)


@lru_cache(maxsize=4)
def _class_names(folder: Path, files: tuple[Path, ...], changed: tuple[int, ...]) -> tuple[str, ...]:
    # Asked for by every part of a run: of VOC 2012 it takes some seconds.
    found: set[str] = set()
    for image in dict.fromkeys(name for path in files for name in _names(path)):
        root = _parsed(folder / "Annotations" / f"{image}.xml")
        found.update(_class_name(entry) for entry in root.findall("object"))
    found.discard("")  # refused where it stands
    return VOC_NAMES if found <= set(VOC_NAMES) else tuple(sorted(found))


def read_voc(
    folder: Path, name: str, class_names: Sequence[str], *, training: bool, skip_empty: bool
) -> tuple[list[ImageRecord], DataReport]:
    """Reads and checks the annotations of one list of images.

    VOC counts pixels from 1 and its corners are the first and the last pixel of an object; boxes here are from the near
    edge of the first to the far edge of the last. A difficult object is left out of training, and else marked as one
    whose detections do not count, which VOC wants too.

    Args:
        folder: The folder with ``JPEGImages``, ``Annotations`` and ``ImageSets``.
        name: Name of the list in ``ImageSets/Main``.
        class_names: As `voc_class_names` gives them.
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
    labels = {class_name: label for label, class_name in enumerate(class_names, start=1)}
    records = [
        _record(folder, name, number, labels, training=training, report=report)
        for number, name in enumerate(names, start=1)
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
    if outside := next((name for name in names if "/" in name or "\\" in name or name in (".", "..")), None):
        raise ValueError(f"a list must name images of JPEGImages: {listed} has {outside!r:.80}; name them alone")
    if twice:
        raise ValueError(f"a list of images must have each once: {listed} has {min(twice)} twice; remove one")
    return names


def _record(
    folder: Path, name: str, number: int, labels: Mapping[str, int], *, training: bool, report: DataReport
) -> ImageRecord:
    path = folder / "Annotations" / f"{name}.xml"
    root = _parsed(path)
    height, width = (_number(root, f"size/{side}", path) for side in ("height", "width"))
    if min(height, width) < 1 or max(height, width) > MOST_PIXELS or height % 1 or width % 1:
        raise ValueError(
            f"an image's size must be whole, from 1 to {MOST_PIXELS} pixels: {path} has {width:g}x{height:g}"
        )
    image = folder / "JPEGImages" / f"{name}.jpg"
    record = ImageRecord(path=str(image), place=str(path), image_id=number, height=int(height), width=int(width))
    for place, entry in enumerate(root.findall("object"), start=1):
        _add_object(record, entry, labels, f"object {place} in {path}", training, report)
    return record


def _class_name(entry: Any) -> str:
    return (entry.findtext("name") or "").strip()


def _add_object(
    record: ImageRecord, entry: Any, labels: Mapping[str, int], where: str, training: bool, report: DataReport
) -> None:
    report.objects_read += 1
    name = _class_name(entry)
    if not name or name not in labels:
        raise ValueError(f"an object's name must be one of {', '.join(labels)}: {where} has {name!r}")
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
    record.add(box, labels[name], width * height, int(difficult))


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
