"""Looking at a network without leaving a trace: its mode, and what it draws."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy
import torch
from torch import nn


@contextmanager
def in_eval_mode(*models: nn.Module) -> Iterator[None]:
    """The body with the networks in eval mode; afterwards every module is in its own mode again, frozen norms too.

    Args:
        models: The networks.

    Example:
        >>> norm = nn.BatchNorm2d(3)
        >>> with in_eval_mode(norm):
        ...     norm.training
        False
        >>> norm.training
        True
    """
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def random_states_kept() -> Iterator[None]:
    """The body may draw from torch's CPU generator, `random` and numpy, or seed them; afterwards they are as before.

    Example:
        >>> before = torch.get_rng_state()
        >>> with random_states_kept():
        ...     _ = torch.manual_seed(5)
        >>> torch.equal(torch.get_rng_state(), before)
        True
    """
    states = torch.get_rng_state(), random.getstate(), numpy.random.get_state()
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        numpy.random.set_state(states[2])
