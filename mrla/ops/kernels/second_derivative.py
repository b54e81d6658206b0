"""The error of whoever differentiates the gradient of a fused operator once more."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

MESSAGE = (
    'mrla\'s fused operators have no second derivative: run the forward pass inside `with mrla.ops.use("reference"):`'
)


class _Refuse(torch.autograd.Function):
    """Hands gradients on, which depend on what they were made of; raises where they are differentiated."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        return tuple(one.detach() for one in tensors[:count] if one is not None)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:  # type: ignore[override]
        raise RuntimeError(MESSAGE)


def _refuse_second(gradients: Sequence[Tensor | None], sources: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Gradients that say so where they are differentiated by what they were made of."""
    found = iter(_Refuse.apply(len(gradients), *gradients, *sources))
    return tuple(None if one is None else next(found) for one in gradients)


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Like torch's, whose error names no remedy, and which lets a gradient that is constant pass for a derivative."""

    @functools.wraps(backward)
    def wrapped(ctx: Any, *gradients: Tensor | None) -> Any:
        with torch.no_grad():
            found = backward(ctx, *gradients)
        return _refuse_second(found, (*gradients, *ctx.saved_tensors)) if torch.is_grad_enabled() else found

    return wrapped
