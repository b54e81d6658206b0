"""Images: what they are, where they lie, and how they are sampled and loaded.

What a source of one's own takes is here; see `DataSource`.
"""

from .detection_samples import DetectionSamples as DetectionSamples
from .samples import ImageFacts as ImageFacts
from .samples import KeyedSamples as KeyedSamples
from .samples import Samples as Samples
from .samples import TensorSamples as TensorSamples
from .samples import loader as loader
from .sampling import SampleKey as SampleKey
from .sources import DATA_KINDS as DATA_KINDS
from .sources import Cifar10 as Cifar10
from .sources import Cifar100 as Cifar100
from .sources import Coco as Coco
from .sources import DataSource as DataSource
from .sources import Digits as Digits
from .sources import Folder as Folder
from .sources import ResizedImages as ResizedImages
from .sources import Shapes as Shapes
from .sources import Voc as Voc
from .sources import register_source as register_source
