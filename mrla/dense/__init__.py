"""Detectors and segmenters on any backbone with `feature_info`, with or without mixers."""

from .backbones import FeatureBackbone as FeatureBackbone
from .detectors import DETECTORS as DETECTORS
from .detectors import detector as detector
from .segmenters import SEGMENTERS as SEGMENTERS
from .segmenters import segmenter as segmenter
from .tasks import count_objects as count_objects
from .tasks import finds_masks as finds_masks
from .tasks import load as load
from .tasks import save as save
