"""Looking at a network in eval mode without leaving a trace."""

from collections.abc import Iterator
from contextlib import contextmanager

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
