"""Counting passes over batches for whoever watches."""

from collections.abc import Callable
from typing import Any

OnProgress = Callable[[int, int], None]


class Passes:
    """The passes over batches that are done, and those in all as far as the loader tells.

    Args:
        loader: Batches; how many there are is asked of it.
        max_images: How many of its images are used; None for all.
        states: How often each batch is passed.
        on_progress: Called with the passes done and those in all.
    """

    def __init__(self, loader: Any, max_images: int | None, states: int, on_progress: OnProgress | None):
        self._done, self._on_progress = 0, on_progress
        batches = len(loader) if hasattr(loader, "__len__") else 1
        size = getattr(loader, "batch_size", None)
        if max_images is not None and size:
            batches = min(batches, -(-max_images // size))
        self._total = batches * states

    def step(self, images: int = 0) -> None:
        """A pass over a batch is done."""
        self._done += 1
        if self._on_progress is not None:
            self._on_progress(self._done, max(self._done, self._total))

    def end(self) -> None:
        """All are done, however many the loader gave."""
        if self._on_progress is not None:
            self._on_progress(self._done, self._done)
