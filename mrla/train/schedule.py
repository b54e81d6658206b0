"""Learning rate and parameter groups, from a recipe's `Optim`."""

import math
from collections.abc import Sequence
from functools import partial

from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from mrla.models import param_groups

from .recipe import Optim

WARMUP_START = 0.01


def lr_factor(step: int, *, optim: Optim, epochs: int, steps_per_epoch: int) -> float:
    r"""The learning rate of a step as a multiple of `optim.lr`.

    Linear from a hundredth to 1 over the warm-up; then `gamma` to the number of milestones passed, or
    :math:`m + (1 - m)(1 + \cos \pi p) / 2` with p the part of the epochs after the warm-up that has passed and
    m = `min_lr` / `lr`.

    Args:
        step: Number of steps made so far.
        optim: The schedule and its numbers.
        epochs: Epochs in all.
        steps_per_epoch: Steps in each.

    Returns:
        The factor, a function of the step alone, so that a resumed run goes on as it would have.

    Example:
        >>> optim = Optim(schedule="multistep", milestones=(2, 3))
        >>> [round(lr_factor(step, optim=optim, epochs=4, steps_per_epoch=1), 3) for step in range(4)]
        [1.0, 1.0, 0.1, 0.01]
    """
    warmup = optim.warmup_epochs * steps_per_epoch
    if step < warmup:
        return WARMUP_START + (1 - WARMUP_START) * step / warmup
    if optim.schedule == "constant":
        return 1.0
    if optim.schedule == "multistep":
        return optim.gamma ** sum(step >= milestone * steps_per_epoch for milestone in optim.milestones)
    part = min(1.0, (step - warmup) / max(1, epochs * steps_per_epoch - warmup))
    lowest = optim.min_lr / optim.lr
    return lowest + (1 - lowest) * (1 + math.cos(math.pi * part)) / 2


def make_optimizer(model: nn.Module, optim: Optim, *, new: Sequence[str] = ()) -> Optimizer:
    """SGD or AdamW over `mrla.param_groups`: the parameters that are to be trained.

    Args:
        model: The network.
        optim: The optimizer's numbers.
        new: Patterns of names that count as new beside mixers and classifier.

    Returns:
        The optimizer.
    """
    groups = param_groups(
        model,
        lr=optim.lr,
        weight_decay=optim.weight_decay,
        old_lr_scale=optim.old_lr_scale,
        decay_vectors=optim.decay_vectors,
        new=new,
    )
    if optim.name == "sgd":
        return SGD(groups, lr=optim.lr, momentum=optim.momentum)
    return AdamW(groups, lr=optim.lr, betas=optim.betas)


def make_schedule(optimizer: Optimizer, optim: Optim, *, epochs: int, steps_per_epoch: int) -> LambdaLR:
    """`lr_factor` as torch's scheduler, to be stepped after every step."""
    return LambdaLR(optimizer, partial(lr_factor, optim=optim, epochs=epochs, steps_per_epoch=steps_per_epoch))
