"""Pascal VOC's images and annotations."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..annotated_images import AnnotatedImages, DataReport
from ..samples import ImageFacts
from ..voc_files import read_voc, voc_class_names
from .annotated_files import AnnotatedFiles
from .contract import Split, register_source


@register_source
@dataclass(frozen=True, kw_only=True)
class Voc(AnnotatedFiles):
    """Pascal VOC's detection part, boxes alone: ``root/VOCdevkit/VOC2012`` as the archive unpacks.

    Attributes:
        kind: ``voc``.
        root: The folder that holds ``VOCdevkit``.
        year: Which ``VOC`` folder, ``2007`` to ``2012``.
        train_set: Name of the list in ``ImageSets/Main`` to train on.
        val_set: Name of the list to validate on.
        skip_empty: As in `Coco`; also an image of difficult objects alone has none to learn from.
    """

    kind: Literal["voc"] = "voc"
    year: str = "2012"
    train_set: str = "train"
    val_set: str = "val"

    def __post_init__(self):
        super().__post_init__()
        if self.year not in (years := tuple(str(year) for year in range(2007, 2013))):
            raise ValueError(f"data.year must be one of {', '.join(years)}: got {self.year!r}")

    def facts(self) -> ImageFacts:
        names = voc_class_names(self._folder, (self.train_set, self.val_set))
        return ImageFacts(class_names=names, category_ids=tuple(range(1, len(names) + 1)))

    def read_part(self, split: Split) -> tuple[AnnotatedImages, DataReport, ImageFacts]:
        name = {"train": self.train_set, "val": self.val_set, "test": "test"}[split]
        train, facts = split == "train", self.facts()
        records, report = read_voc(
            self._folder, name, facts.class_names, training=train, skip_empty=train and self.skip_empty
        )
        return AnnotatedImages(records, masks=False), report, facts

    @property
    def _folder(self) -> Path:
        return Path(self.root) / "VOCdevkit" / f"VOC{self.year}"
