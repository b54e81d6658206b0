"""The CPU's threads that torch computes with."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def thread_limit(number: int | None) -> Iterator[None]:
    """The body on `number` threads of the CPU, or on as many as there are if it is None."""
    before = torch.get_num_threads()
    if number is not None:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
