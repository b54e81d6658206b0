"""The end of a residual block, relu(norm(branch) + shortcut), left for the mixer behind it to do in one pass."""

import copy
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..batch_norm import advance, as_float32, kept_statistics, moves_statistics, norm_fits, takes_batch


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
    """The norm of a tail as kernels read it: weight * (branch - mean) / deviation + bias, in float32.

    Attributes:
        weight: Per channel; None for ones.
        bias: Per channel; None for zeros.
        mean: Per channel; None where there is no norm.
        spread: The norm's variance; with `training` one over the batch's deviation.
        eps: The norm's.
        training: Whether mean and deviation are those of the batch.
    """

    weight: Tensor | None = None
    bias: Tensor | None = None
    mean: Tensor | None = None
    spread: Tensor | None = None
    eps: float = 0.0
    training: bool = False


def tail_parameters(tail: BlockTail) -> tuple[Tensor | None, ...] | None:
    """What kernels read of a tail's norm; None where the norm is none that they know, or does not take the branch."""
    norm = tail.norm
    if type(norm) is nn.Identity:
        return ()
    if type(norm) is not nn.BatchNorm2d or tail.branch.ndim != 4 or not norm_fits(norm, tail.branch):
        return None
    return norm.weight, norm.bias, norm.running_mean, norm.running_var


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
        return Begun(branch, ResidualNorm(), ResidualNorm(), tail.owned)
    statistics = kept_statistics(norm)
    if _is_float32(branch, norm) and kernels_norm_as_torch():
        numbers = _numbers(norm, statistics or _batch_statistics(norm, branch))
        return Begun(branch, numbers, numbers, tail.owned)
    normed, *of_batch = torch.native_batch_norm(
        branch,
        norm.weight,
        norm.bias,
        *_moved(norm, statistics),
        takes_batch(norm),
        advance(norm),
        float(norm.eps),
    )
    return Begun(normed, ResidualNorm(), _numbers(norm, statistics or of_batch), owned=True)


@functools.cache
def kernels_norm_as_torch() -> bool:
    """Whether torch's BatchNorm on this machine rounds as the kernels do: sums in float64, one rounding at the end.

    torch's own depends on the instructions that it was built for, so both are run once on a small map.
    """
    from .cpu import launch, norms
    from .cpu.fused_maps import epilogue_fields

    # said aloud: a program may have set other defaults
    factory: Any = {"dtype": torch.float32, "device": "cpu"}
    generator = torch.Generator("cpu").manual_seed(0)
    b, c, h, w = 3, 64, 5, 7  # enough channels for a difference in rounding to show
    x = torch.randn((b, c, h, w), generator=generator, **factory) * 3 + 1
    shortcut, found = torch.randn((b, c, h, w), generator=generator, **factory), torch.empty_like(x)
    theirs = nn.BatchNorm2d(c, **factory).requires_grad_(False)
    for one in theirs.state_dict().values():
        if one.is_floating_point():
            one.uniform_(0.5, 2, generator=generator)
    ours = copy.deepcopy(theirs)
    for training in (True, False):
        ours.train(training)
        normed, *_ = torch.native_batch_norm(
            x, theirs.weight, theirs.bias, theirs.running_mean, theirs.running_var, training, 0.1, theirs.eps
        )
        numbers = _numbers(ours, kept_statistics(ours) or _batch_statistics(ours, x))
        launch.run(
            norms.finish(),
            items=b * c,
            work=0,
            **epilogue_fields(numbers),
            channels=c,
            pixels=h * w,
            branch=x,
            shortcut=shortcut,
            out=found,
        )
        if not torch.equal(found, torch.relu(normed + shortcut)):
            return False
    tracked = theirs.state_dict()
    return all(torch.equal(one, tracked[name]) for name, one in ours.state_dict().items() if one.is_floating_point())


def _is_float32(branch: Tensor, norm: nn.BatchNorm2d) -> bool:
    if branch.is_contiguous(memory_format=torch.channels_last):
        return False  # maps of one pixel or one channel are, and torch then sums in float32
    parts = (branch, norm.weight, norm.bias, norm.running_mean, norm.running_var)
    return all(one is None or (one.dtype == torch.float32 and one.is_contiguous()) for one in parts)


def _batch_statistics(norm: nn.BatchNorm2d, branch: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and 1 / deviation of a batch, by kernel; moves the running statistics on."""
    from .cpu import launch, norms

    b, c, h, w = branch.shape
    mean, rstd = (torch.empty(c, dtype=torch.float32, device=branch.device) for _ in range(2))
    running_mean, running_var = _moved(norm, None)
    launch.run(
        norms.statistics(),
        items=c,
        work=branch.numel(),
        images=b,
        channels=c,
        pixels=h * w,
        momentum=advance(norm),
        eps=norm.eps,
        branch=branch,
        mean=mean,
        rstd=rstd,
        running_mean=running_mean,
        running_var=running_var,
    )
    return mean, rstd


def _moved(norm: nn.BatchNorm2d, statistics: Sequence[Tensor] | None) -> tuple[Tensor | None, Tensor | None]:
    """The running statistics that torch's operator is given: those the norm goes by, or that the batch moves on."""
    if statistics is None and not moves_statistics(norm):
        return None, None
    return norm.running_mean, norm.running_var


def _numbers(norm: nn.BatchNorm2d, statistics: Sequence[Tensor]) -> ResidualNorm:
    weight, bias = (None if one is None else as_float32(one.detach()) for one in (norm.weight, norm.bias))
    mean, spread = (as_float32(one) for one in statistics)
    return ResidualNorm(weight, bias, mean, spread, float(norm.eps), takes_batch(norm))
