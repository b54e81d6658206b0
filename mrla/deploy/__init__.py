"""Networks made ready to be used: norms folded away, and files that other engines run."""

from .fusing import foldable as foldable
from .fusing import fuse as fuse
