"""The end of a residual block, relu(norm(branch) + shortcut), left for the mixer behind it to do in one pass."""

import copy
import functools
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ._batch_norm import advance, kept_statistics, takes_batch


class BlockTail(NamedTuple):
    """What a residual block still has to do: relu(norm(branch) + shortcut).

    Attributes:
        branch: The output of the block's last convolution.
        norm: A BatchNorm, or the identity where it has been folded into the convolution.
        shortcut: What the block adds.
        owned: Whether nobody else holds `branch`, so that it may be overwritten where no gradient is wanted.
    """

    branch: Tensor
    norm: nn.Module
    shortcut: Tensor
    owned: bool


class ResidualNorm(NamedTuple):
    """The norm of a tail as numbers for each channel, in float32: weight * (branch - mean) * rstd + bias."""

    weight: Tensor
    bias: Tensor
    mean: Tensor
    rstd: Tensor
    training: bool


def finish(tail: BlockTail) -> Tensor:
    """The block's output, by torch's operators; added in place as the block does, which keeps the branch's type."""
    normed = tail.norm(tail.branch)
    normed += tail.shortcut
    return torch.relu(normed)


def affine_of(tail: BlockTail) -> tuple[Tensor | None, Tensor | None]:
    """Weight and bias of a tail's norm, where it has them."""
    return getattr(tail.norm, "weight", None), getattr(tail.norm, "bias", None)


class Begun(NamedTuple):
    """A tail as far as torch has to compute it before the kernels go on.

    Attributes:
        map: What the kernels read: the branch, or what torch's norm has made of it.
        rest: The norm that is still to be applied to that.
        norm: The norm behind the branch.
        owned: Whether nobody else holds `map`, see `BlockTail`.
    """

    map: Tensor
    rest: ResidualNorm
    norm: ResidualNorm
    owned: bool


def begin(tail: BlockTail) -> Begun:
    """Finds the numbers of a tail's norm, and applies it where only torch's operator gives the same to the last bit.

    The running statistics of a norm in training move on, as by calling it.
    """
    norm, branch = tail.norm, tail.branch
    if not isinstance(norm, nn.BatchNorm2d):
        nothing = without_norm(branch.shape[1])
        return Begun(branch, nothing, nothing, tail.owned)
    statistics = kept_statistics(norm)
    if _is_float32(branch, norm) and kernels_norm_as_torch():
        mean, rstd = _batch_statistics(norm, branch) if statistics is None else _by_running(*statistics, norm.eps)
        numbers = _numbers(norm, mean, rstd)
        return Begun(branch, numbers, numbers, tail.owned)
    normed, mean, rstd = torch.native_batch_norm(
        branch,
        norm.weight,
        norm.bias,
        norm.running_mean,
        norm.running_var,
        takes_batch(norm),
        advance(norm),
        norm.eps,
    )
    if statistics is not None:
        mean, rstd = _by_running(*statistics, norm.eps)
    return Begun(normed, without_norm(branch.shape[1]), _numbers(norm, mean, rstd), owned=True)


def without_norm(channels: int) -> ResidualNorm:
    """A norm that changes nothing."""
    ones, zeros = torch.ones(channels), torch.zeros(channels)
    return ResidualNorm(ones, zeros, zeros, ones, training=False)


@functools.cache
def kernels_norm_as_torch() -> bool:
    """Whether torch's BatchNorm on this machine rounds as the kernels do: sums in float64, one rounding at the end.

    torch's own depends on the instructions that it was built for, so both are run once on a small map.
    """
    generator = torch.Generator().manual_seed(0)
    channels = 64  # enough for a difference in rounding to show
    x = torch.randn((3, channels, 5, 7), generator=generator) * 3 + 1
    theirs = nn.BatchNorm2d(channels).requires_grad_(False)
    for one in (theirs.weight, theirs.bias, theirs.running_mean, theirs.running_var):
        torch.nn.init.uniform_(one, 0.5, 2, generator=generator)
    ours = copy.deepcopy(theirs)
    for training in (True, False):
        normed, mean, rstd = torch.native_batch_norm(
            x, theirs.weight, theirs.bias, theirs.running_mean, theirs.running_var, training, 0.1, theirs.eps
        )
        statistics = kept_statistics(ours.train(training))
        if statistics is None:
            found = _batch_statistics(ours, x)
            if not (torch.equal(found[0], mean) and torch.equal(found[1], rstd)):
                return False
            same = torch.equal(ours.running_mean, theirs.running_mean)
            if not (same and torch.equal(ours.running_var, theirs.running_var)):
                return False
        else:
            found = _by_running(*statistics, ours.eps)
        alpha, beta = as_line(_numbers(ours, *found))
        once = x.double() * alpha.double()[:, None, None] + beta.double()[:, None, None]
        if not torch.equal(once.float(), normed):
            return False
    return True


def as_line(norm: ResidualNorm) -> tuple[Tensor, Tensor]:
    """Alpha and beta of a norm as alpha * branch + beta, rounded as by torch."""
    alpha = norm.rstd * norm.weight
    return alpha, (norm.bias.double() - norm.mean.double() * alpha.double()).float()


def _is_float32(branch: Tensor, norm: nn.BatchNorm2d) -> bool:
    parts = (branch, norm.weight, norm.bias, norm.running_mean, norm.running_var)
    return all(one is None or (one.dtype == torch.float32 and one.is_contiguous()) for one in parts)


def _by_running(mean: Tensor, variance: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    # 1 / deviation as torch's norm rounds it, which is not as its square root does: the norm of a one.
    one, zero = variance.new_ones(1, len(variance)), torch.zeros_like(variance)
    return mean, torch.native_batch_norm(one, None, None, zero, variance, False, 0.0, eps)[0][0]


def _batch_statistics(norm: nn.BatchNorm2d, branch: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and 1 / deviation of a batch, by kernel; moves the running statistics on."""
    from ._kernels import launch, norms

    b, c, h, w = branch.shape
    mean, rstd = torch.empty(c), torch.empty(c)
    numbers = torch.tensor((advance(norm), norm.eps), dtype=torch.float64)
    tracked = (norm.running_mean, norm.running_var) if norm.training else (None, None)
    launch.run(norms.statistics(), c, branch.numel(), b, c, h * w, branch, mean, rstd, *tracked, numbers)
    return mean, rstd


def _numbers(norm: nn.BatchNorm2d, mean: Tensor, rstd: Tensor) -> ResidualNorm:
    weight, bias = norm.weight, norm.bias
    weight = torch.ones_like(mean) if weight is None else weight.detach().float()
    bias = torch.zeros_like(mean) if bias is None else bias.detach().float()
    return ResidualNorm(weight, bias, mean.float(), rstd.float(), takes_batch(norm))
