"""The end of a residual block on a CPU: what torch's norm has to do first, and whether the kernels round as it does."""

import copy
import functools
from typing import Any

import torch
from torch import Tensor, nn

from ...batch_norm import advance, kept_statistics
from ...calls import Begun, ResidualEpilogue, ResidualNorm
from ..residual_epilogue import begin_by_torch, norm_numbers, tracked_statistics


def rest_of(tail: ResidualNorm | None) -> int:
    """What is left of a tail, as `_kernels.norms.line_of_branch` counts."""
    if tail is None:
        return 0
    return 1 if tail.mean is None else 3 if tail.training else 2


def fields_of(tail: ResidualNorm | None) -> tuple[Tensor | float | None, ...]:
    """Weight, bias, mean, spread and eps of a tail's norm as kernels find them in their table."""
    weight, bias, mean, spread, eps, _ = tail or ResidualNorm()
    return weight, bias, mean, spread, float(eps)


def begin(tail: ResidualEpilogue) -> Begun:
    """A tail whose norm is left to the kernels, where they round as torch does; else `begin_by_torch`.

    The running statistics of a norm in training move on, as by calling it.
    """
    norm, branch = tail.norm, tail.branch
    if isinstance(norm, nn.BatchNorm2d) and _is_float32(branch, norm) and kernels_norm_as_torch():
        numbers = norm_numbers(norm, kept_statistics(norm) or _batch_statistics(norm, branch))
        return Begun(branch, numbers, numbers, tail.owned)
    return begin_by_torch(tail)


@functools.cache
def kernels_norm_as_torch() -> bool:
    """Whether torch's BatchNorm on this machine rounds as the kernels do: sums in float64, one rounding at the end.

    torch's own depends on the instructions that it was built for, so both are run once on a small map.
    """
    from . import launch, norms

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
        numbers = norm_numbers(ours, kept_statistics(ours) or _batch_statistics(ours, x))
        launch.run(
            norms.finish(), b * c, 0, c, h * w, 0, 0, 0, rest_of(numbers), x, shortcut, found, *fields_of(numbers)
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
    from . import launch, norms

    b, c, h, w = branch.shape
    mean, rstd = (torch.empty(c, dtype=torch.float32, device=branch.device) for _ in range(2))
    tracked = tracked_statistics(norm, None)
    launch.run(
        norms.statistics(), c, branch.numel(), b, c, h * w, branch, mean, rstd, *tracked, advance(norm), float(norm.eps)
    )
    return mean, rstd
