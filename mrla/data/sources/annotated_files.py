"""What the sources of annotated images in files share: what is left out is said, and too little is refused."""

import logging
from abc import abstractmethod
from dataclasses import dataclass

from ..annotated_images import AnnotatedImages, DataReport
from ..detection_samples import DetectionSamples
from ..samples import ImageFacts
from .contract import DataSource, Split

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class AnnotatedFiles(DataSource):
    """Images in files whose objects are annotated, for detection.

    ``train`` has the targets to learn from, without crowd regions and difficult objects, the other parts those to be
    measured by. With `augment` images are flipped left to right with probability 0.5.

    Attributes:
        kind: As of `DataSource`.
        root: The folder that the other paths start from.
        skip_empty: Whether images with no object to learn from are left out of training, as torchvision's reference
            and MMDetection do. In validation they are kept: what is found in them is wrong.
        workers: Processes that load images.
    """

    root: str = "data"
    skip_empty: bool = True
    workers: int = 4

    task = "detection"
    own_images = True

    @abstractmethod
    def read_part(self, split: Split) -> tuple[AnnotatedImages, DataReport, ImageFacts]:
        """Reads and checks every annotation of one part.

        Args:
            split: Which part.

        Returns:
            The images, what was left out or changed, and the classes.

        Raises:
            ValueError: If something is not as described: the message names the file, and the id in it.
        """

    def _open(self, split: Split, *, seed: int, augment: bool) -> DetectionSamples:
        images, report, facts = self.read_part(split)
        if report.counts:
            _logger.warning("%s", report)
        if not report.images:
            remedy = "set data.skip_empty to false or add objects" if report.images_read else "add images"
            raise ValueError(
                f"{report.source} must have an image to use: of {report.images_read} none is left; {remedy}"
            )
        ignored = report.counts["crowd_ignored"] + report.counts["difficult_ignored"]
        if split != "train" and report.objects == ignored:
            raise ValueError(
                f"{report.source} must have an object to measure by: of {report.objects_read} read, {ignored} do not "
                f"count and the others were left out; add objects, or take other images"
            )
        return DetectionSamples(images, report, facts, seed=seed, augment=augment)
