"""The end of a residual block on a CPU: what torch's norm has to do first, and whether the kernels round as it does."""

import copy
import functools
from typing import Any

import torch
from torch import Tensor, nn

from ...batch_norm import advance, kept_statistics
from ...calls import Begun, ResidualEpilogue
from ..residual_epilogue import begin_by_torch, norm_numbers, tracked_statistics
from .fused_maps import epilogue_fields


def begin(epilogue: ResidualEpilogue) -> Begun:
    """A epilogue whose norm is left to the kernels, where they round as torch does; else `begin_by_torch`.

    The running statistics of a norm in training move on, as by calling it.
    """
    norm, branch = epilogue.norm, epilogue.branch
    if isinstance(norm, nn.BatchNorm2d) and _is_float32(branch, norm) and kernels_norm_as_torch():
        numbers = norm_numbers(norm, kept_statistics(norm) or _batch_statistics(norm, branch))
        return Begun(branch, numbers, numbers, epilogue.owned)
    return begin_by_torch(epilogue)


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
    from . import launch, norms

    b, c, h, w = branch.shape
    mean, rstd = (torch.empty(c, dtype=torch.float32, device=branch.device) for _ in range(2))
    running_mean, running_var = tracked_statistics(norm, None)
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
