"""What `torch.nn.BatchNorm2d` keeps, for code that does its work without calling it."""

from numbers import Real

import torch
from torch import Tensor, nn


def takes_batch(norm: nn.BatchNorm2d) -> bool:
    """Whether a norm goes by the statistics of its batch, as in training or where it keeps none."""
    return norm.training or (norm.running_mean is None and norm.running_var is None)


def moves_statistics(norm: nn.BatchNorm2d) -> bool:
    """Whether a call changes what the norm keeps; the flag may be set on a norm that has statistics."""
    return norm.training and bool(norm.track_running_stats)


def kept_statistics(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor] | None:
    """The mean and variance that a norm goes by, in float32, packed; None where it takes those of the batch."""
    mean, variance = norm.running_mean, norm.running_var
    if norm.training or mean is None or variance is None:
        return None
    return as_float32(mean), as_float32(variance)


def as_float32(tensor: Tensor) -> Tensor:
    """The numbers in float32, one after the other, as kernels read them."""
    return (tensor if tensor.dtype is torch.float32 else tensor.float()).contiguous()


def _is_real(number: object) -> bool:
    return type(number) is float or isinstance(number, Real)


def norm_fits(norm: nn.BatchNorm2d, x: Tensor) -> bool:
    """Whether `x` goes through a norm without an error of torch's, and the norm's numbers are some that kernels take.

    torch refuses one value per channel with the batch's statistics, an eps of zero with them, one statistic without
    the other, and lengths other than the channels.
    """
    eps, momentum = norm.eps, norm.momentum
    mean, variance = norm.running_mean, norm.running_var
    if (mean is None) != (variance is None) or not _is_real(eps) or eps < 0:
        return False
    if momentum is not None and not _is_real(momentum):
        return False
    by_batch = norm.training or mean is None
    if by_batch and (x.numel() == x.shape[1] or eps == 0):
        return False
    shape, dtype = x.shape[1:2], None
    for one in (norm.weight, norm.bias, mean, variance):
        if one is None:
            continue
        if one.shape != shape or one.dtype is not (dtype := dtype or one.dtype):
            return False
    if mean is None or variance is None:
        return True
    # torch writes into these: parts of larger tensors and expanded ones are left to it
    return not norm.training or (mean.is_contiguous() and variance.is_contiguous())


def advance(norm: nn.BatchNorm2d) -> float:
    """Counts a batch, where a norm in training keeps statistics; the weight of this batch in them."""
    momentum = 0.0 if norm.momentum is None else float(norm.momentum)
    if moves_statistics(norm) and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if norm.momentum is None:
            momentum = 1.0 / float(norm.num_batches_tracked)
    return momentum


@torch.no_grad()
def track(norm: nn.BatchNorm2d, mean: Tensor, variance: Tensor, count: int) -> None:
    """Moves a norm's running statistics on by a batch's mean and biased variance, where it is in training."""
    if not moves_statistics(norm):
        return
    momentum = advance(norm)
    if norm.running_mean is None or norm.running_var is None:
        return
    # Through `data`: torch's own BatchNorm, called before this in the same graph, has saved the statistics, and changes
    # them itself without a word to autograd.
    norm.running_mean.data.lerp_(mean.to(norm.running_mean.dtype), momentum)
    norm.running_var.data.lerp_((variance * (count / (count - 1))).to(norm.running_var.dtype), momentum)
