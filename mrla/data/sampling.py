"""Which sample comes when: a function of seed and epoch, whatever the number of processes."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch.utils.data import Sampler

from .randomness import derive_seed

PADDING = -1
"""The index of a key that stands for no sample; its label is one that losses and scores ignore."""


class SampleKey(NamedTuple):
    """What a data set is asked for: which sample, and in which epoch, for its augmentation is a function of both."""

    epoch: int
    index: int


class EpochSampler(Sampler[SampleKey]):
    """Keys of one process's part of every batch.

    Every `batch_size` consecutive samples of the epoch's order are one batch; each process takes an equal part of it.
    So the batches of all processes together are exactly those of a single one.

    Args:
        size: Number of samples.
        batch_size: Samples in one batch over all processes; a multiple of `world_size`.
        seed: Decides the order together with the epoch.
        shuffle: Whether the order is drawn anew each epoch.
        drop_last: Whether a last, smaller batch is left out.
        pad: What to do with a last batch that does not divide by `world_size`: fill it up with keys of `PADDING`, for
            evaluation, or cut it, for training.
        rank: This process.
        world_size: Number of processes.

    Raises:
        ValueError: If the batch does not divide by the processes, or there is no batch at all.

    Example:
        >>> [key.index for key in EpochSampler(size=5, batch_size=4, rank=1, world_size=2, pad=True)]
        [2, 3, -1]
    """

    def __init__(
        self,
        *,
        size: int,
        batch_size: int,
        seed: int = 0,
        shuffle: bool = False,
        drop_last: bool = False,
        pad: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ):
        if batch_size < 1 or batch_size % world_size:
            raise ValueError(
                f"batch_size must be a positive multiple of the number of processes: got batch_size={batch_size} for "
                f"{world_size} processes; try {max(1, batch_size // world_size) * world_size}"
            )
        smallest = batch_size if drop_last else 1 if pad else world_size
        if size < smallest:
            raise ValueError(
                f"the data must fill at least one batch: got {size} samples, {smallest} are needed; take a smaller "
                f"batch_size or more images"
            )
        self.size, self.batch_size, self.seed, self.shuffle = size, batch_size, seed, shuffle
        self.drop_last, self.pad, self.rank, self.world_size = drop_last, pad, rank, world_size
        self.epoch = 0

    @property
    def local_batch_size(self) -> int:
        """Samples of one batch that this process takes."""
        return self.batch_size // self.world_size

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning at the start of each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        full, rest = divmod(self.size, self.batch_size)
        return full * self.local_batch_size + self._rest_of_each(rest)

    def __iter__(self) -> Iterator[SampleKey]:
        order = self._order()
        for start in range(0, self.size, self.batch_size):
            batch = order[start : start + self.batch_size]
            share = self.local_batch_size if len(batch) == self.batch_size else self._rest_of_each(len(batch))
            own = batch[self.rank * share : (self.rank + 1) * share]
            yield from (SampleKey(self.epoch, index) for index in own)
            yield from [SampleKey(self.epoch, PADDING)] * (share - len(own))

    def _order(self) -> list[int]:
        if not self.shuffle:
            return list(range(self.size))
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "order", self.epoch))
        return torch.randperm(self.size, generator=generator).tolist()

    def _rest_of_each(self, rest: int) -> int:
        """How many of a last batch of `rest` samples each process takes."""
        if self.drop_last:
            return 0
        return -(-rest // self.world_size) if self.pad else rest // self.world_size
