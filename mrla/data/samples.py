"""Samples that are read by key, what is known of their images, and loaders over them."""

import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from .randomness import derive_seed, seeded
from .sampling import PADDING, EpochSampler, SampleKey

_MOST_SIZES = 100_000
IGNORE_LABEL = -100
"""The label of a padding sample, which `torch.nn.functional.cross_entropy` ignores."""


@dataclass(frozen=True, kw_only=True)
class ImageFacts:
    """What a network must know of its images.

    Attributes:
        class_names: Names of the classes, in the order of the labels; of objects that of label n is at n - 1, for
            label 0 is the background.
        in_chans: Channels of an image.
        size: Its height and width, in pixels; None where images differ and the network brings them to its size.
        mean: Mean of each channel that it is normalised with; empty where the network normalises.
        std: Standard deviation of each channel; empty where the network normalises.
        category_ids: Of objects, the data's own id of each class; results in COCO's form are written with them.
    """

    class_names: tuple[str, ...]
    in_chans: int = 3
    size: int | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    category_ids: tuple[int, ...] = ()


class KeyedSamples(Dataset[Any], ABC):
    """One part of a source's images, read by `SampleKey`.

    What a key gives is a function of the key and the seed that the part was opened with, so that a resumed run and any
    number of workers see the same. A key of `PADDING` gives a sample that losses and scores do not count.
    """

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, key: SampleKey) -> Any: ...

    def fingerprint(self) -> str | None:
        """A hash by which a resumed run knows that its images have changed; None for images that never do."""
        return None

    def by_turns(self) -> "KeyedSamples":
        """The same samples with the classes in turn, where each has one class."""
        return self

    @staticmethod
    def collate(batch: Any) -> Any:
        """Makes a batch of samples, as the network takes it."""
        return default_collate(batch)


class Samples(KeyedSamples):
    """Images with one label each; an augmentation is a function of seed, epoch and index.

    Args:
        images: Opens the image of an index.
        labels: Label of each index.
        transform: Makes a tensor of an opened image.
        class_names: Names of the classes, in the order of the labels.
        seed: Decides the augmentations.
        files: The file of each index, where there are some.
    """

    def __init__(
        self,
        images: Callable[[int], Any],
        labels: Sequence[int],
        transform: Callable[[Any], Tensor],
        class_names: Sequence[str],
        seed: int = 0,
        files: Sequence[str] | None = None,
    ):
        self.images, self.labels, self.transform, self.seed = images, labels, transform, seed
        self.class_names, self.files = tuple(class_names), files

    def fingerprint(self) -> str | None:
        """A hash of the files' names, labels and sizes; None for images that are always the same.

        Of more than 100,000 files the sizes are left out: to ask for each would take minutes on a file server.
        """
        if self.files is None:
            return None
        digest, sized = sha256(), len(self.files) <= _MOST_SIZES
        for file, label in zip(self.files, self.labels, strict=True):
            size = os.stat(file).st_size if sized else ""
            digest.update(f"{file}\0{label}\0{size}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()

    def by_turns(self) -> "Samples":
        """The same samples with the classes in turn, so that the first ones are of as many classes as there are."""
        order = turns(self.labels)
        labels = [self.labels[place] for place in order]
        return Samples(partial(_image_at, self.images, order), labels, self.transform, self.class_names, self.seed)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: SampleKey) -> tuple[Tensor, int]:
        epoch, index = key
        place = 0 if index == PADDING else index
        with seeded(derive_seed(self.seed, "sample", epoch, place)):
            image = self.transform(self.images(place))
        return image, IGNORE_LABEL if index == PADDING else int(self.labels[place])


class TensorSamples(Samples):
    """Samples that are tensors in memory and not augmented: a batch is one indexing operation."""

    def __init__(self, images: Tensor, labels: Tensor, class_names: Sequence[str]):
        super().__init__(images.__getitem__, labels.tolist(), _unchanged, class_names)
        self.tensors = images, labels

    def by_turns(self) -> "TensorSamples":
        images, labels = self.tensors
        order = torch.tensor(turns(self.labels))
        return TensorSamples(images[order], labels[order], self.class_names)

    def __getitems__(self, keys: Sequence[SampleKey]) -> tuple[Tensor, Tensor]:
        places = torch.tensor([key.index for key in keys])
        images, labels = self.tensors
        padding = places == PADDING
        places = places.clamp(min=0)
        return images[places], labels[places].masked_fill(padding, IGNORE_LABEL)

    @staticmethod
    def collate(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The batch as it is: `__getitems__` gives whole ones."""
        return batch


def loader(
    samples: KeyedSamples,
    *,
    batch_size: int,
    seed: int = 0,
    shuffle: bool = False,
    drop_last: bool = False,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    pin_memory: bool = False,
) -> DataLoader:
    """A DataLoader over this process's part of every batch.

    Args:
        samples: What to load.
        batch_size: Samples in one batch over all processes.
        seed: Decides the order.
        shuffle: Whether the order is drawn anew each epoch: for training.
        drop_last: Whether a last, smaller batch is left out.
        workers: Processes that load images.
        rank: This process.
        world_size: Number of processes.
        pin_memory: Whether batches are put in page-locked memory, for a GPU.

    Returns:
        The loader; its sampler has `set_epoch`.

    Raises:
        ValueError: If there is not one batch, or it does not divide by the processes.

    Example:
        >>> from mrla.data import Digits
        >>> batches = loader(Digits().open("val"), batch_size=8)
        >>> images, labels = next(iter(batches))
        >>> tuple(images.shape), tuple(labels.shape)
        ((8, 1, 8, 8), (8,))
    """
    sampler = EpochSampler(
        size=len(samples),
        batch_size=batch_size,
        seed=seed,
        shuffle=shuffle,
        drop_last=drop_last,
        pad=not shuffle,
        rank=rank,
        world_size=world_size,
    )
    return _Loader(
        samples,
        batch_size=sampler.local_batch_size,
        sampler=sampler,
        num_workers=workers,
        collate_fn=samples.collate,
        persistent_workers=workers > 0,
        pin_memory=pin_memory,
    )


class _Loader(DataLoader):
    def check_worker_number_rationality(self) -> None:
        """Torch warns of more workers than cores, when it is made and read; a recipe for larger machines has them."""


def turns(labels: Sequence[int]) -> list[int]:
    """The places of the first of every class, then of the second of every class, and so on.

    Args:
        labels: The classes.

    Returns:
        The places in `labels`.

    Example:
        >>> turns([0, 0, 0, 1, 2, 2])
        [0, 3, 4, 1, 5, 2]
    """
    seen: Counter[int] = Counter()
    keys = []
    for place, label in enumerate(map(int, labels)):
        keys.append((seen[label], label, place))
        seen[label] += 1
    return [place for _, _, place in sorted(keys)]


def _image_at(images: Callable[[int], Any], order: Sequence[int], index: int) -> Any:
    return images(order[index])


def _unchanged(image: Tensor) -> Tensor:
    return image
