"""scikit-learn's scans of handwritten digits."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from ..samples import ImageFacts, TensorSamples
from .contract import DataSource, Split, register_source

# Mean and standard deviation of the training half, grey values from 0 to 1; a test measures them again.
_MEAN, _STD = 0.3056, 0.3765
_SPLIT_SEED = 2302_03985
_NAMES = tuple(map(str, range(10)))


@register_source
@dataclass(frozen=True, kw_only=True)
class Digits(DataSource):
    """scikit-learn's 1,797 scans of handwritten digits, 8x8, grey: real images that come with the installation.

    Split once, fixed and stratified: half for training, a quarter for validation, a quarter (``test``) for a last look
    that is never used to choose anything. They are never changed at random.

    Attributes:
        kind: ``digits``.
        workers: Processes that load images; the images are in memory, so none is fastest.
    """

    kind: Literal["digits"] = "digits"
    workers: int = 0

    task = "classification"
    packages = ("sklearn",)

    def facts(self) -> ImageFacts:
        return ImageFacts(in_chans=1, size=8, mean=(_MEAN,), std=(_STD,), class_names=_NAMES)

    def _open(self, split: Split, *, seed: int, augment: bool) -> TensorSamples:
        images, labels, parts = _digits()
        index = torch.tensor(parts[split])
        return TensorSamples(images[index], labels[index], _NAMES)


@lru_cache(maxsize=1)
def _digits() -> tuple[Tensor, Tensor, dict[str, list[int]]]:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits: Any = load_digits()
    everything: Any = list(range(len(digits.target)))
    train, rest = train_test_split(everything, train_size=0.5, stratify=digits.target, random_state=_SPLIT_SEED)
    val, test = train_test_split(rest, train_size=0.5, stratify=digits.target[rest], random_state=_SPLIT_SEED)
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    parts: dict[str, Any] = {"train": train, "val": val, "test": test}
    return (images - _MEAN) / _STD, torch.tensor(digits.target), parts
