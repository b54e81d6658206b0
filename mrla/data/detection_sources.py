"""Descriptions of data for detection and instance segmentation; `open_detection_split` opens them."""

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, Protocol

from torch import Tensor
from torch.utils.data import Dataset

from mrla.files.atomic_write import make_folder, scratch_folder

from .annotated_images import AnnotatedImages
from .annotated_images import DataReport as DataReport
from .coco_files import read_categories, read_instances
from .coco_masks import encode_mask
from .randomness import derive_seed, seeded
from .sampling import PADDING, SampleKey
from .shapes import SHAPE_NAMES, DrawnShapes
from .sources import Split, check_workers
from .voc_files import read_voc, voc_class_names

Target = dict[str, Any]
"""What is in an image, as torchvision's detectors and torchmetrics' `MeanAveragePrecision` take it: `DetectionSamples`
says what is in it."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Coco:
    """Images and annotations as COCO has them: boxes, and masks as polygons or run lengths.

    Attributes:
        kind: ``coco``.
        root: The folder that the other paths start from.
        train_images: Folder of the images to train on.
        train_annotations: Their instances file.
        val_images: Folder of the images to validate on.
        val_annotations: Their instances file.
        masks: Whether masks are read; without, an object needs no segmentation, and loading is faster.
        skip_empty: Whether images with no object to learn from are left out of training, as torchvision's reference
            and MMDetection do. In validation they are kept: what is found in them is wrong.
        workers: Processes that load images.
    """

    kind: Literal["coco"] = "coco"
    root: str = "data/coco"
    train_images: str = "train2017"
    train_annotations: str = "annotations/instances_train2017.json"
    val_images: str = "val2017"
    val_annotations: str = "annotations/instances_val2017.json"
    masks: bool = True
    skip_empty: bool = True
    workers: int = 4

    def __post_init__(self):
        check_workers(self.workers)


@dataclass(frozen=True, kw_only=True)
class Voc:
    """Pascal VOC's detection part, boxes alone: ``root/VOCdevkit/VOC2012`` as the archive unpacks.

    Attributes:
        kind: ``voc``.
        root: The folder that holds ``VOCdevkit``.
        year: Which ``VOC`` folder, ``2007`` to ``2012``.
        train_set: Name of the list in ``ImageSets/Main`` to train on.
        val_set: Name of the list to validate on.
        skip_empty: As in `Coco`; also an image of difficult objects alone has none to learn from.
        workers: Processes that load images.
    """

    kind: Literal["voc"] = "voc"
    root: str = "data"
    year: str = "2012"
    train_set: str = "train"
    val_set: str = "val"
    skip_empty: bool = True
    workers: int = 4

    def __post_init__(self):
        check_workers(self.workers)
        if self.year not in (years := tuple(str(year) for year in range(2007, 2013))):
            raise ValueError(f"data.year must be one of {', '.join(years)}: got {self.year!r}")


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """Drawn images of overlapping coloured shapes on a textured ground, with boxes and masks of what is visible.

    Image i of a part is a function of (seed, part, i) alone. Colour and size say nothing about the class. ``test`` is
    a third stream, as long as ``val``.

    Attributes:
        kind: ``shapes``.
        images: Number of images to train on.
        val_images: Number of images to validate on.
        image_size: Height and width in pixels, or one number for both; 16 at least.
        max_objects: The most shapes in an image, 1 to 255.
        seed: Which images; a run's seed decides on flips only, so that its arms and seeds share the images.
        workers: Processes that draw; at 96x96 an image takes about a millisecond.
    """

    kind: Literal["shapes"] = "shapes"
    images: int = 1000
    val_images: int = 200
    image_size: int | tuple[int, int] = 96
    max_objects: int = 5
    seed: int = 0
    workers: int = 0

    def __post_init__(self):
        check_workers(self.workers)
        for name in ("images", "val_images"):
            if getattr(self, name) < 1:
                raise ValueError(f"data.{name} must be a positive number: got {getattr(self, name)}")
        if min(self.height_and_width) < 16:
            raise ValueError(f"data.image_size must be 16 pixels or more: got {self.image_size}")
        if not 1 <= self.max_objects <= 255:
            raise ValueError(f"data.max_objects must be from 1 to 255: got {self.max_objects}")

    @property
    def height_and_width(self) -> tuple[int, int]:
        """Height and width of an image, in pixels."""
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size


DetectionData = Coco | Voc | Shapes
DETECTION_KINDS: dict[str, type[DetectionData]] = {"coco": Coco, "voc": Voc, "shapes": Shapes}


def has_masks(data: Any) -> bool:
    """Whether the objects of such data have masks."""
    return isinstance(data, Shapes) or (isinstance(data, Coco) and data.masks)


@dataclass(frozen=True, kw_only=True)
class DetectionFacts:
    """What a detector must know of its data.

    Attributes:
        class_names: Names of the classes; that of label n is at n - 1, for label 0 is the background.
        category_ids: The data's own id of each class, likewise; results in COCO's form are written with them.
        has_masks: Whether objects have masks.
    """

    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    has_masks: bool

    @property
    def num_classes(self) -> int:
        """Number of classes with the background, as torchvision's detectors count."""
        return len(self.class_names) + 1


def detection_facts(data: DetectionData) -> DetectionFacts:
    """What a detector must know of these data; no image is opened.

    Args:
        data: The description. Of a `Coco` the validation file is read, which is the smaller one, if it is there; of a
            `Voc` the annotations, for their names.

    Returns:
        Class names, category ids and whether there are masks.

    Raises:
        ValueError: If the data are not there or not as described.

    Example:
        >>> facts = detection_facts(Shapes())
        >>> facts.class_names, facts.num_classes
        (('ellipse', 'ring', 'rectangle', 'triangle', 'star'), 6)
    """
    if isinstance(data, Coco):
        files = [Path(data.root) / name for name in (data.val_annotations, data.train_annotations)]
        categories = read_categories(files[0] if files[0].is_file() else files[1])
        return DetectionFacts(
            class_names=tuple(categories.values()), category_ids=tuple(categories), has_masks=data.masks
        )
    names = voc_class_names(_voc_folder(data), (data.train_set, data.val_set)) if isinstance(data, Voc) else SHAPE_NAMES
    ids = tuple(range(1, len(names) + 1))
    return DetectionFacts(class_names=names, category_ids=ids, has_masks=isinstance(data, Shapes))


def open_detection_split(
    data: DetectionData, split: Split, *, seed: int = 0, augment: bool | None = None
) -> "DetectionSamples":
    """Opens one part of the data and checks every annotation in it; what it leaves out or changes it logs.

    Args:
        data: The description.
        split: ``train``, ``val`` or ``test``; ``train`` has the targets to learn from, without crowd regions and
            difficult objects, the others those to be measured by. A `Coco` has no ``test``.
        seed: Decides the flips, together with epoch and index.
        augment: Whether images are flipped left to right with probability 0.5; None means so for ``train`` alone.

    Returns:
        The samples, asked by `SampleKey`; their `report` counts what was left out or changed.

    Raises:
        ValueError: If the data are not there or not as described: the message names the file, and the id in it.

    Example:
        >>> samples = open_detection_split(Shapes(image_size=(48, 64)), "val")
        >>> image, target = samples[SampleKey(epoch=0, index=3)]
        >>> image.shape, target["boxes"].shape == (len(target["labels"]), 4)
        (torch.Size([3, 48, 64]), True)
    """
    if split not in ("train", "val", "test"):
        raise ValueError(f"split must be 'train', 'val' or 'test': got {split!r}")
    augment = split == "train" if augment is None else augment
    if isinstance(data, Shapes):
        return DetectionSamples(*_open_shapes(data, split), detection_facts(data), seed=seed, augment=augment)
    source, report, facts = _open_coco(data, split) if isinstance(data, Coco) else _open_voc(data, split)
    if report.counts:
        _logger.warning("%s", report)
    if not report.images:
        remedy = "set data.skip_empty to false or add objects" if report.images_read else "add images"
        raise ValueError(f"{report.source} must have an image to use: of {report.images_read} none is left; {remedy}")
    ignored = report.counts["crowd_ignored"] + report.counts["difficult_ignored"]
    if split != "train" and report.objects == ignored:
        raise ValueError(
            f"{report.source} must have an object to measure by: of {report.objects_read} read, {ignored} do not count "
            f"and the others were left out; add objects, or take other images"
        )
    return DetectionSamples(source, report, facts, seed=seed, augment=augment)


class Source(Protocol):
    """Images (3, h, w) uint8 and their targets, by index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Tensor, Target]: ...


class DetectionSamples(Dataset[tuple[Tensor, Target]]):
    """One part of a data set, asked by key, so that a flip is a function of seed, epoch and index.

    A sample is an image (3, h, w), float32 from 0 to 1, and a target:

    | entry | what it is |
    |---|---|
    | ``boxes`` | (n, 4) float32: x1, y1, x2, y2 in pixels from the image's corner |
    | ``labels`` | (n,) int64, from 1: 0 is the background |
    | ``masks`` | (n, h, w) uint8, where the data have masks |
    | ``image_id`` | the image's id in the data |
    | ``area`` | (n,) float32: the object's, as the data give it, in pixels |
    | ``iscrowd`` | (n,) int64: 1 where finding the object, or not, does not count |

    A key of `PADDING` gives the first image and a target of no object whose ``image_id`` is `PADDING`: what a network
    finds there must not be counted.

    Args:
        source: The images and targets.
        report: What was left out or changed.
        facts: Class names and category ids.
        seed: Decides the flips.
        augment: Whether there are any.
    """

    def __init__(self, source: Source, report: DataReport, facts: DetectionFacts, *, seed: int, augment: bool):
        self.source, self.report, self.facts, self.seed, self.augment = source, report, facts, seed, augment

    def __len__(self) -> int:
        return len(self.source)

    def fingerprint(self) -> str | None:
        """A hash of all annotations, the files' names with them; None for images that are drawn."""
        return sha256(self.source.pickled.data).hexdigest() if isinstance(self.source, AnnotatedImages) else None

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


def collate_detection(batch: Sequence[tuple[Tensor, Target]]) -> tuple[list[Tensor], list[Target]]:
    """A batch as torchvision's detectors take it: lists, for images differ in size.

    Args:
        batch: Samples.

    Returns:
        The images, and the targets.

    Example:
        >>> samples = open_detection_split(Shapes(), "train")
        >>> images, targets = collate_detection([samples[SampleKey(0, index)] for index in range(2)])
        >>> len(images), len(targets)
        (2, 2)
    """
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


def _open_shapes(data: Shapes, split: Split) -> tuple[DrawnShapes, DataReport]:
    height, width = data.height_and_width
    images = data.images if split == "train" else data.val_images
    report = DataReport("drawn shapes")
    report.images_read = report.images = images
    drawn = DrawnShapes(
        images=images, height=height, width=width, max_objects=data.max_objects, seed=data.seed, split=split
    )
    return drawn, report


def _open_coco(data: Coco, split: Split) -> tuple[AnnotatedImages, DataReport, DetectionFacts]:
    root, train = Path(data.root), split == "train"
    if split == "test":
        raise ValueError("a COCO folder has annotations for 'train' and 'val' alone: got split='test'; use 'val'")
    annotations = root / (data.train_annotations if train else data.val_annotations)
    records, categories, report = read_instances(
        annotations,
        root / (data.train_images if train else data.val_images),
        training=train,
        masks=data.masks,
        skip_empty=train and data.skip_empty,
    )
    other = root / data.val_annotations
    # Asked of train alone: for val a file of half a gigabyte would be read for its list of categories.
    if train and other.is_file() and (others := read_categories(other)) != categories:
        differing = sorted({number for number, _ in categories.items() ^ others.items()})
        raise ValueError(
            f"train and val must have the same categories: {annotations} and {other} differ in the ids "
            f"{', '.join(map(str, differing[:5]))}{', ...' if len(differing) > 5 else ''}; give both one list"
        )
    facts = DetectionFacts(class_names=tuple(categories.values()), category_ids=tuple(categories), has_masks=data.masks)
    return AnnotatedImages(records, masks=data.masks), report, facts


def _open_voc(data: Voc, split: Split) -> tuple[AnnotatedImages, DataReport, DetectionFacts]:
    name = {"train": data.train_set, "val": data.val_set, "test": "test"}[split]
    train, facts = split == "train", detection_facts(data)
    records, report = read_voc(
        _voc_folder(data), name, facts.class_names, training=train, skip_empty=train and data.skip_empty
    )
    return AnnotatedImages(records, masks=False), report, facts


def _voc_folder(data: Voc) -> Path:
    return Path(data.root) / "VOCdevkit" / f"VOC{data.year}"


def write_coco(data: Shapes, folder: str | Path) -> Coco:
    """Writes drawn images out as a COCO folder, ``train2017`` and ``val2017``, whole or not at all.

    Args:
        data: Which images.
        folder: The folder to make; it must not exist, or be empty.

    Returns:
        The description that opens it again, with the same samples.

    Raises:
        ValueError: If there is something in the folder, or it cannot be written to.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp()) / "shapes"
        >>> written = write_coco(Shapes(images=2, val_images=1), folder)
        >>> sorted(path.name for path in folder.rglob("*.png"))
        ['000000000001.png', '000000000001.png', '000000000002.png']
        >>> len(open_detection_split(written, "train"))
        2
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"the folder to write to must be new or empty: {folder} is not; choose another")
    written = Coco(root=str(folder), workers=data.workers)
    # Beside it, so that one rename brings it to its place.
    with scratch_folder(folder) as beside:
        made = make_folder(beside / folder.name)
        _write_part(data, "train", made / written.train_images, made / written.train_annotations)
        _write_part(data, "val", made / written.val_images, made / written.val_annotations)
        try:
            os.rename(made, folder)
        except OSError as error:
            raise ValueError(f"the folder to write to must be new or empty: {folder} ({error.strerror})") from error
    return written


def _write_part(data: Shapes, split: Split, images: Path, annotations: Path) -> None:
    from PIL import Image

    make_folder(images)
    make_folder(annotations.parent)
    source, _ = _open_shapes(data, split)
    categories = [{"id": label, "name": name} for label, name in enumerate(SHAPE_NAMES, start=1)]
    content: dict[str, Any] = {"info": {"description": repr(data)}, "images": [], "annotations": []}
    for index in range(len(source)):
        image, target = source[index]
        number, (height, width) = target["image_id"], image.shape[-2:]
        file_name = f"{number:012d}.png"
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(images / file_name)
        content["images"].append({"id": number, "file_name": file_name, "height": height, "width": width})
        for box, label, mask in zip(target["boxes"].tolist(), target["labels"].tolist(), target["masks"], strict=True):
            left, top, right, bottom = box
            content["annotations"].append(
                {
                    "id": len(content["annotations"]) + 1,  # COCO tools take an id of 0 for none
                    "image_id": number,
                    "category_id": label,
                    "bbox": [left, top, right - left, bottom - top],
                    "area": int(mask.sum()),
                    "iscrowd": 0,
                    "segmentation": encode_mask(mask.numpy()),
                }
            )
    annotations.write_text(json.dumps(content | {"categories": categories}))
