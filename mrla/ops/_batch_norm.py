"""What `torch.nn.BatchNorm2d` keeps, for code that does its work without calling it."""

import torch
from torch import Tensor, nn


def takes_batch(norm: nn.BatchNorm2d) -> bool:
    """Whether a norm goes by the statistics of its batch, as in training or where it keeps none."""
    return norm.training or norm.running_mean is None


def kept_statistics(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor] | None:
    """The mean and variance that a norm goes by, in float32; None where it takes those of the batch."""
    if takes_batch(norm) or norm.running_mean is None or norm.running_var is None:
        return None
    return norm.running_mean.float(), norm.running_var.float()


def advance(norm: nn.BatchNorm2d) -> float:
    """Counts a batch, where a norm in training keeps statistics; the weight of this batch in them."""
    if not norm.training or norm.num_batches_tracked is None:
        return norm.momentum or 0.0
    norm.num_batches_tracked.add_(1)
    return 1.0 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum


@torch.no_grad()
def track(norm: nn.BatchNorm2d, mean: Tensor, variance: Tensor, count: int) -> None:
    """Moves a norm's running statistics on by a batch's mean and biased variance, where it is in training."""
    if not norm.training or norm.running_mean is None or norm.running_var is None:
        return
    momentum = advance(norm)
    norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), momentum)
    norm.running_var.lerp_((variance * (count / (count - 1))).to(norm.running_var.dtype), momentum)
