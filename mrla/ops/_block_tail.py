"""The end of a residual block, relu(norm(branch) + shortcut), left for the mixer behind it to do in one pass."""

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


def apply_norm(tail: BlockTail) -> tuple[Tensor, Tensor, Tensor]:
    """The normed branch, by torch's own operator so that it is the same to the last bit; mean and 1 / deviation.

    The running statistics of a norm in training move on, as by calling it. Of a norm that goes by them the other two
    results hold nothing; `residual_norm` knows.
    """
    norm = tail.norm
    if not isinstance(norm, nn.BatchNorm2d):
        return tail.branch, tail.branch, tail.branch
    return torch.native_batch_norm(
        tail.branch,
        norm.weight,
        norm.bias,
        norm.running_mean,
        norm.running_var,
        takes_batch(norm),
        advance(norm),
        norm.eps,
    )


def residual_norm(tail: BlockTail, mean: Tensor, rstd: Tensor) -> ResidualNorm:
    """What the gradient needs of a tail's norm, after `apply_norm`."""
    norm, channels = tail.norm, tail.branch.shape[1]
    ones, zeros = torch.ones(channels), torch.zeros(channels)
    if not isinstance(norm, nn.BatchNorm2d):
        return ResidualNorm(ones, zeros, zeros, ones, False)
    statistics = kept_statistics(norm)
    if statistics is not None:
        mean, rstd = statistics[0], (statistics[1] + norm.eps).rsqrt()
    weight, bias = ones if norm.weight is None else norm.weight, zeros if norm.bias is None else norm.bias
    return ResidualNorm(weight.float(), bias.float(), mean.float(), rstd.float(), statistics is None)
