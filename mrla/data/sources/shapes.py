"""Drawn images for detection, and the same images written out as a COCO folder."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mrla.files.atomic_write import make_folder, written_folder

from ..annotated_images import DataReport
from ..coco_masks import encode_mask
from ..detection_samples import DetectionSamples
from ..drawn_shapes import SHAPE_NAMES, DrawnShapes
from ..samples import ImageFacts
from .coco import Coco
from .contract import DataSource, Split, register_source


@register_source
@dataclass(frozen=True, kw_only=True)
class Shapes(DataSource):
    """Drawn images of overlapping coloured shapes on a textured ground, with boxes and masks of what is visible.

    Image i of a part is a function of (seed, part, i) alone. Colour and size say nothing about the class. ``test`` is
    a third stream, as long as ``val``. In training images are flipped left to right with probability 0.5.

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

    task = "detection"

    def __post_init__(self):
        super().__post_init__()
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

    @property
    def has_masks(self) -> bool:
        return True

    def facts(self) -> ImageFacts:
        return ImageFacts(class_names=SHAPE_NAMES, category_ids=tuple(range(1, len(SHAPE_NAMES) + 1)))

    def drawn(self, split: Split) -> DrawnShapes:
        """The images of one part, by index."""
        height, width = self.height_and_width
        return DrawnShapes(
            images=self.images if split == "train" else self.val_images,
            height=height,
            width=width,
            max_objects=self.max_objects,
            seed=self.seed,
            split=split,
        )

    def _open(self, split: Split, *, seed: int, augment: bool) -> DetectionSamples:
        images, report = self.drawn(split), DataReport("drawn shapes")
        report.images_read = report.images = len(images)
        return DetectionSamples(images, report, self.facts(), seed=seed, augment=augment)


def write_coco(source: Shapes, folder: str | Path) -> Coco:
    """Writes drawn images out as a COCO folder, ``train2017`` and ``val2017``, whole or not at all.

    Args:
        source: Which images.
        folder: The folder to make; it must not exist, or be empty.

    Returns:
        The source that opens it again, with the same samples.

    Raises:
        ValueError: If there is something in the folder, or it cannot be written to.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp()) / "shapes"
        >>> written = write_coco(Shapes(images=2, val_images=1), folder)
        >>> sorted(path.name for path in folder.rglob("*.png"))
        ['000000000001.png', '000000000001.png', '000000000002.png']
        >>> len(written.open("train"))
        2
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"the folder to write to must be new or empty: {folder} is not; choose another")
    written = Coco(root=str(folder), workers=source.workers)
    with written_folder(folder, record=written.train_annotations) as beside:
        _write_part(source, "train", beside / written.train_images, beside / written.train_annotations)
        _write_part(source, "val", beside / written.val_images, beside / written.val_annotations)
    return written


def _write_part(source: Shapes, split: Split, images: Path, annotations: Path) -> None:
    from PIL import Image

    make_folder(images)
    make_folder(annotations.parent)
    drawn = source.drawn(split)
    categories = [{"id": label, "name": name} for label, name in enumerate(SHAPE_NAMES, start=1)]
    content: dict[str, Any] = {"info": {"description": repr(source)}, "images": [], "annotations": []}
    for index in range(len(drawn)):
        image, target = drawn[index]
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
