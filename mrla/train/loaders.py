"""Loaders as Lightning asks for them, so that a resumed run and several processes have the order of a single one."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader

from mrla.data.randomness import derive_seed, seed_generators
from mrla.data.samples import KeyedSamples, loader
from mrla.data.sampling import EpochSampler
from mrla.data.sources import Split

from .recipe import Recipe


class Batches:
    """A loader whose workers can be ended, also where its iterator was left in the middle of an epoch.

    An error's traceback keeps such an iterator, and so its workers, until the garbage collector comes by; and Lightning
    ends those of training neither after an error in validation nor where they are not persistent.

    Args:
        loader: A DataLoader, or what else gives batches.
    """

    def __init__(self, loader: DataLoader):
        self.loader = loader
        self.iterator: Any = None

    @property
    def sampler(self) -> Any:
        """Where Lightning calls `set_epoch`, if it has it."""
        return self.loader.sampler

    @property
    def batch_sampler(self) -> Any:
        """Where Lightning calls `set_epoch` of a sampler of batches, if it has it."""
        return self.loader.batch_sampler

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        self.iterator = iter(self.loader)
        return self.iterator

    def close(self) -> None:
        """Ends the workers; iterated again, the loader starts others."""
        if hasattr(self.iterator, "_shutdown_workers"):
            self.iterator._shutdown_workers()
            self.loader._iterator = None  # where a loader keeps persistent workers
        self.iterator = None


class _SeededEpochs(Batches):
    """Seeds the global generator when the first batch of an epoch is asked for.

    A loader draws the order, and its workers' seeds, from that generator partly when it is iterated and partly when its
    first batch is asked for; Lightning iterates once more or once less in the first epoch after a resume.
    """

    def __init__(self, loader: DataLoader, epoch_seed: Callable[[], int]):
        super().__init__(loader)
        self.epoch_seed = epoch_seed

    def __iter__(self) -> Iterator[Any]:
        seed_generators(self.epoch_seed(), torch.device("cpu"))
        yield from super().__iter__()


def first_batch(loader: DataLoader) -> Any:
    """The first batch, or None if there is none; no worker is left.

    Args:
        loader: As for `Batches`.

    Returns:
        What the loader gives first.
    """
    with closing(Batches(loader)) as batches:
        return next(iter(batches), None)


class OwnLoaders(L.LightningDataModule):
    """The caller's loaders, the one for training so that a resumed run has the order that it would have had."""

    def __init__(self, train_loader: DataLoader, val_loader: DataLoader, *, seed: int):
        super().__init__()
        self.contents = None  # what a caller's loaders give is not known
        self.train, self.val, self.seed = _SeededEpochs(train_loader, self._epoch_seed), Batches(val_loader), seed

    def train_dataloader(self) -> Iterable[Any]:
        """For one process seeded in each epoch; with more Lightning's own sampler takes the place of the loader's."""
        return self._for_processes(self.train)

    def val_dataloader(self) -> Iterable[Any]:
        """As it is, but for that sampler."""
        return self._for_processes(self.val)

    def close(self) -> None:
        """Ends the workers."""
        self.train.close()
        self.val.close()

    def _for_processes(self, batches: Batches) -> Iterable[Any]:
        assert self.trainer is not None
        return batches.loader if self.trainer.world_size > 1 else batches

    def _epoch_seed(self) -> int:
        assert self.trainer is not None
        return derive_seed(self.seed, "loader", self.trainer.current_epoch)


class RecipeImages(L.LightningDataModule):
    """A recipe's loaders, made when the number of processes is known."""

    def __init__(self, recipe: Recipe):
        super().__init__()
        self.recipe = recipe
        # Opened and sampled here, so that what does not fit is refused before a process is launched.
        self.parts: dict[str, KeyedSamples] = {
            "train": recipe.data.open("train", seed=recipe.seed),
            "val": recipe.data.open("val", seed=recipe.seed),
        }
        EpochSampler(size=len(self.parts["train"]), batch_size=recipe.batch_size, drop_last=True)
        self.made: list[Batches] = []

    @property
    def contents(self) -> dict[str, Any] | None:
        """How many images the parts have, and a hash of their names, labels and sizes; None if they never change."""
        prints = {part: samples.fingerprint() for part, samples in self.parts.items()}
        if None in prints.values():
            return None
        return {part: {"images": len(self.parts[part]), "sha256": found} for part, found in prints.items()}

    def train_dataloader(self) -> Batches:
        """Shuffled by (seed, epoch); a last, smaller batch is left out."""
        return self._loader("train", shuffle=True, drop_last=True)

    def val_dataloader(self) -> Batches:
        """In order, every image once."""
        return self._loader("val", shuffle=False, drop_last=False)

    def close(self) -> None:
        """Ends the workers."""
        for batches in self.made:
            batches.close()

    def _loader(self, part: Split, *, shuffle: bool, drop_last: bool) -> Batches:
        assert self.trainer is not None
        of_part = loader(
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
        self.made.append(Batches(of_part))
        return self.made[-1]
