"""COCO's images and annotations."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..annotated_images import AnnotatedImages, DataReport
from ..coco_files import read_categories, read_instances
from ..samples import ImageFacts
from .annotated_files import AnnotatedFiles
from .contract import Split, register_source


@register_source
@dataclass(frozen=True, kw_only=True)
class Coco(AnnotatedFiles):
    """Images and annotations as COCO has them: boxes, and masks as polygons or run lengths.

    There is no ``test``. Further as of `AnnotatedFiles`.

    Attributes:
        kind: ``coco``.
        train_images: Folder of the images to train on.
        train_annotations: Their instances file.
        val_images: Folder of the images to validate on.
        val_annotations: Their instances file.
        masks: Whether masks are read; without, an object needs no segmentation, and loading is faster.
    """

    kind: Literal["coco"] = "coco"
    root: str = "data/coco"
    train_images: str = "train2017"
    train_annotations: str = "annotations/instances_train2017.json"
    val_images: str = "val2017"
    val_annotations: str = "annotations/instances_val2017.json"
    masks: bool = True

    @property
    def has_masks(self) -> bool:
        return self.masks

    def facts(self) -> ImageFacts:
        # The validation file is the smaller one.
        files = [Path(self.root) / name for name in (self.val_annotations, self.train_annotations)]
        return _facts(read_categories(files[0] if files[0].is_file() else files[1]))

    def read_part(self, split: Split) -> tuple[AnnotatedImages, DataReport, ImageFacts]:
        root, train = Path(self.root), split == "train"
        if split == "test":
            raise ValueError("a COCO folder has annotations for 'train' and 'val' alone: got split='test'; use 'val'")
        annotations = root / (self.train_annotations if train else self.val_annotations)
        records, categories, report = read_instances(
            annotations,
            root / (self.train_images if train else self.val_images),
            training=train,
            masks=self.masks,
            skip_empty=train and self.skip_empty,
        )
        other = root / self.val_annotations
        # Asked of train alone: for val a file of half a gigabyte would be read for its list of categories.
        if train and other.is_file() and (others := read_categories(other)) != categories:
            differing = sorted({number for number, _ in categories.items() ^ others.items()})
            raise ValueError(
                f"train and val must have the same categories: {annotations} and {other} differ in the ids "
                f"{', '.join(map(str, differing[:5]))}{', ...' if len(differing) > 5 else ''}; give both one list"
            )
        return AnnotatedImages(records, masks=self.masks), report, _facts(categories)


def _facts(categories: dict[int, str]) -> ImageFacts:
    return ImageFacts(class_names=tuple(categories.values()), category_ids=tuple(categories))
