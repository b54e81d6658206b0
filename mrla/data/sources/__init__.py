"""A file for each kind of images, and the registry that they stand in."""

# Messages name the kinds in the order of registration, so their order here is not the alphabet's.
# isort: off
from .contract import DATA_KINDS as DATA_KINDS
from .contract import DataSource as DataSource
from .contract import Split as Split
from .contract import kinds_for as kinds_for
from .contract import register_source as register_source
from .contract import source_class as source_class
from .digits import Digits as Digits
from .cifar import Cifar10 as Cifar10
from .cifar import Cifar100 as Cifar100
from .resized import IMAGENET_MEAN as IMAGENET_MEAN
from .resized import IMAGENET_STD as IMAGENET_STD
from .resized import ResizedImages as ResizedImages
from .folder import Folder as Folder
from .annotated_files import AnnotatedFiles as AnnotatedFiles
from .coco import Coco as Coco
from .voc import Voc as Voc
from .shapes import Shapes as Shapes
from .shapes import write_coco as write_coco
