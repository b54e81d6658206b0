"""Random numbers as a function of what they are for, so that a resumed run draws the ones it would have drawn."""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from mrla.models.modes import random_states_kept


def derive_seed(seed: int, *parts: int | str) -> int:
    """A seed for one purpose, from a run's seed and what tells the purpose from all others.

    Args:
        seed: The run's seed.
        parts: For example ``"sample", epoch, index``.

    Returns:
        A number below 2**63, the same in every process and on every machine.

    Example:
        >>> derive_seed(0, "order", 3) == derive_seed(0, "order", 3) != derive_seed(0, "order", 4)
        True
    """
    text = "/".join(str(part) for part in (seed, *parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def seed_generators(seed: int, device: torch.device) -> None:
    """Seeds torch's CPU generator and the device's own.

    `torch.manual_seed` would do, but where there is no GPU it files each call, with a traceback, for the day that CUDA
    is initialised: a tenth of a millisecond and some memory for every step of a run.

    Args:
        seed: As `derive_seed` gives it.
        device: The device that draws.
    """
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        getattr(torch, device.type).manual_seed(seed)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds torch's CPU generator, `random` and numpy for the body, and gives all three back as they were.

    Augmentations of torchvision and timm draw from all three.

    Args:
        seed: As `derive_seed` gives it.
    """
    with random_states_kept():
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        yield
