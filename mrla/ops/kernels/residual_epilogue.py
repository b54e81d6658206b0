"""The end of a residual block, relu(norm(branch) + shortcut), left for the mixer behind it to do in one pass."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..batch_norm import advance, as_float32, kept_statistics, moves_statistics, norm_fits, takes_batch
from ..calls import Begun, ResidualEpilogue, ResidualNorm


def epilogue_parameters(epilogue: ResidualEpilogue) -> tuple[Tensor | None, ...] | None:
    """What kernels read of the norm; None where it is none that they know, or does not take the branch."""
    norm = epilogue.norm
    if type(norm) is nn.Identity:
        return ()
    if type(norm) is not nn.BatchNorm2d or epilogue.branch.ndim != 4 or not norm_fits(norm, epilogue.branch):
        return None
    return norm.weight, norm.bias, norm.running_mean, norm.running_var


def finish(epilogue: ResidualEpilogue) -> Tensor:
    """The block's output, by torch's operators; added in place as the block does, which keeps the branch's type."""
    normed = epilogue.norm(epilogue.branch)
    normed += epilogue.shortcut
    return torch.relu(normed)


def affine_of(epilogue: ResidualEpilogue) -> tuple[Tensor | None, Tensor | None]:
    """Weight and bias of a epilogue's norm, where it has them."""
    return getattr(epilogue.norm, "weight", None), getattr(epilogue.norm, "bias", None)


def begin_by_torch(epilogue: ResidualEpilogue) -> Begun:
    """A epilogue whose norm torch's own operator has applied; the running statistics of a norm in training move on."""
    norm, branch = epilogue.norm, epilogue.branch
    if not isinstance(norm, nn.BatchNorm2d):
        return Begun(branch, ResidualNorm(), ResidualNorm(), epilogue.owned)
    statistics = kept_statistics(norm)
    normed, *of_batch = torch.native_batch_norm(
        branch,
        norm.weight,
        norm.bias,
        *tracked_statistics(norm, statistics),
        takes_batch(norm),
        advance(norm),
        float(norm.eps),
    )
    return Begun(normed, ResidualNorm(), norm_numbers(norm, statistics or of_batch), owned=True)


def tracked_statistics(
    norm: nn.BatchNorm2d, statistics: Sequence[Tensor] | None
) -> tuple[Tensor | None, Tensor | None]:
    """The running statistics that torch's operator is given: those the norm goes by, or that the batch moves on."""
    if statistics is None and not moves_statistics(norm):
        return None, None
    return norm.running_mean, norm.running_var


def norm_numbers(norm: nn.BatchNorm2d, statistics: Sequence[Tensor]) -> ResidualNorm:
    """A norm as backends read it, of the mean and variance (in training 1 / deviation) that it goes by."""
    weight, bias = (None if one is None else as_float32(one.detach()) for one in (norm.weight, norm.bias))
    mean, spread = (as_float32(one) for one in statistics)
    return ResidualNorm(weight, bias, mean, spread, float(norm.eps), takes_batch(norm))
