"""Detectors and segmenters on any backbone with `feature_info`, with or without mixers."""

from .backbones import FeatureBackbone as FeatureBackbone
from .checkpoints import load as load
from .checkpoints import save as save
from .detectors import DETECTORS as DETECTORS
from .detectors import detector as detector
from .segmenters import SEGMENTERS as SEGMENTERS
from .segmenters import segmenter as segmenter
