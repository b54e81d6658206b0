"""Loaders as Lightning asks for them, so that a resumed run and several processes have the order of a single one."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader

from .data import Split, loader, open_split
from .randomness import derive_seed, seed_generators
from .recipes import Recipe
from .sampling import EpochSampler


class OwnLoaders(L.LightningDataModule):
    """The caller's loaders, the one for training so that a resumed run has the order that it would have had."""

    def __init__(self, train_loader: DataLoader, val_loader: DataLoader, *, seed: int):
        super().__init__()
        self.train_loader, self.val_loader, self.seed = train_loader, val_loader, seed

    def train_dataloader(self) -> Iterable[Any]:
        """For one process seeded in each epoch; with more Lightning's own sampler takes the place of the loader's."""
        assert self.trainer is not None
        return self.train_loader if self.trainer.world_size > 1 else _SeededEpochs(self.train_loader, self._epoch_seed)

    def val_dataloader(self) -> DataLoader:
        """As it is."""
        return self.val_loader

    def _epoch_seed(self) -> int:
        assert self.trainer is not None
        return derive_seed(self.seed, "loader", self.trainer.current_epoch)


class _SeededEpochs:
    """Seeds the global generator when the first batch of an epoch is asked for.

    A loader draws the order, and its workers' seeds, from that generator partly when it is iterated and partly when its
    first batch is asked for; Lightning iterates once more or once less in the first epoch after a resume.
    """

    def __init__(self, batches: DataLoader, epoch_seed: Callable[[], int]):
        self.batches, self.epoch_seed = batches, epoch_seed

    @property
    def sampler(self) -> Any:
        """Where Lightning calls `set_epoch`, if it has it."""
        return self.batches.sampler

    @property
    def batch_sampler(self) -> Any:
        """Likewise."""
        return self.batches.batch_sampler

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        seed_generators(self.epoch_seed(), torch.device("cpu"))
        yield from self.batches


class RecipeImages(L.LightningDataModule):
    """A recipe's loaders, made when the number of processes is known."""

    def __init__(self, recipe: Recipe):
        super().__init__()
        self.recipe = recipe
        # Opened and sampled here, so that what does not fit is refused before a process is launched.
        self.parts = {part: open_split(recipe.data, part, seed=recipe.seed) for part in ("train", "val")}
        EpochSampler(size=len(self.parts["train"]), batch_size=recipe.batch_size, drop_last=True)

    def train_dataloader(self) -> DataLoader:
        """Shuffled by (seed, epoch); a last, smaller batch is left out."""
        return self._loader("train", shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader:
        """In order, every image once."""
        return self._loader("val", shuffle=False, drop_last=False)

    def _loader(self, part: Split, *, shuffle: bool, drop_last: bool) -> DataLoader:
        assert self.trainer is not None
        return loader(
            self.parts[part],
            batch_size=self.recipe.batch_size,
            seed=derive_seed(self.recipe.seed, part),
            shuffle=shuffle,
            drop_last=drop_last,
            workers=self.recipe.data.workers,
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
            pin_memory=self.trainer.strategy.root_device.type == "cuda",
        )
