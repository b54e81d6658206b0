"""MRLA-light as torch's operator `mrla::light`, and as a function of the tail of a residual block."""

from typing import Any

import torch
from torch import Tensor

from .cpu.fused_light import LightState, LightWeights, backward, forward
from .cpu.fused_maps import own
from .residual_epilogue import BlockTail, ResidualNorm, affine_of, begin
from .second_derivative import once_differentiable


@torch.library.custom_op("mrla::light", mutates_args=())
def _light(
    x: Tensor,
    shortcut: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    keep: Tensor | None,
    heads: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`forward` as torch's operator: the output, then the five parts of the state."""
    weights = LightWeights(query, key, value, decay, norm_weight, norm_bias)
    statistics = None if running_mean is None or running_var is None else (running_mean.clone(), running_var.clone())
    out, state = forward(x, shortcut, weights, statistics, keep, heads, eps)
    return out, state.means, state.gates, state.moments, state.mean, state.variance


@_light.register_fake
def _(x, shortcut, query, key, value, decay, norm_weight, norm_bias, running_mean, running_var, keep, heads, eps):
    b, c = x.shape[:2]
    shapes = (b, c + query.numel() - 1), (b, heads), (b, c, 5), (c,), (c,)
    return torch.empty_like(x), *(x.new_empty(shape, dtype=torch.float32) for shape in shapes)


@torch.library.custom_op("mrla::light_backward", mutates_args=())
def _light_backward(
    gradient: Tensor,
    x: Tensor,
    shortcut: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    means: Tensor,
    gates: Tensor,
    moments: Tensor,
    mean: Tensor,
    variance: Tensor,
    keep: Tensor | None,
    eps: float,
    batch_statistics: bool,
) -> list[Tensor]:
    """`backward` as torch's operator: the gradients of x, the shortcut and the weights, of what is not left out."""
    of_x, of_shortcut, of_weights, _ = backward(
        gradient,
        x,
        shortcut,
        LightWeights(query, key, value, decay, norm_weight, norm_bias),
        LightState(means, gates, moments, mean, variance),
        keep,
        eps,
        batch_statistics=batch_statistics,
    )
    return [own(one) for one in (of_x, of_shortcut, *of_weights) if one is not None]


@_light_backward.register_fake
def _(gradient, x, shortcut, query, key, value, decay, norm_weight, norm_bias, *_):
    given = (x, shortcut, query, key, value, decay, norm_weight, norm_bias)
    return [torch.empty_like(one) for one in given if one is not None]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    running_mean, keep = inputs[8], inputs[10]
    ctx.save_for_backward(*inputs[:8], *output[1:], keep)
    ctx.rest = inputs[12], running_mean is None
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


@once_differentiable
def _differentiate(ctx: Any, gradient: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if gradient is None:
        return (None,) * 13
    saved = ctx.saved_tensors
    found = iter(torch.ops.mrla.light_backward(gradient, *saved, *ctx.rest))
    return *(None if one is None else next(found) for one in saved[:8]), *(None,) * 5


_light.register_autograd(_differentiate, setup_context=_save)


def light(
    x: Tensor,
    shortcut: Tensor | None,
    weights: LightWeights,
    statistics: tuple[Tensor, Tensor] | None,
    keep: Tensor | None,
    heads: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The mixer's output, and mean and biased variance that its norm went by; arguments as of `forward`."""
    out, _, _, _, mean, variance = torch.ops.mrla.light(
        x, shortcut, *weights, *(statistics or (None, None)), keep, heads, eps
    )
    return out, mean, variance


def light_behind(
    tail: BlockTail,
    weights: LightWeights,
    statistics: tuple[Tensor, Tensor] | None,
    keep: Tensor | None,
    heads: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Like `light`, of the block's output and shortcut that a tail stands for."""
    inputs = (tail.branch, tail.shortcut, *affine_of(tail), *weights)
    if torch.is_grad_enabled() and any(one is not None and one.requires_grad for one in inputs):
        return _LightTail.apply(*inputs, tail, statistics, keep, heads, eps)
    x, rest, _, owned = begin(tail)
    out, state = forward(
        x, tail.shortcut, weights, statistics, keep, heads, eps, tail=rest, in_place=owned, keep_state=False
    )
    return out, state.mean, state.variance


class _LightTail(torch.autograd.Function):
    """The end of a residual block with MRLA-light behind it: of its maps only branch and shortcut are kept.

    Not an operator of torch's registry: it moves the running statistics of the block's norm on, as that norm would,
    which an operator with a gradient may not. So compiled graphs have the tail and the mixer one after the other.
    """

    @staticmethod
    def forward(ctx: Any, branch: Tensor, shortcut: Tensor, weight: Any, bias: Any, *rest: Any) -> Any:
        *given, tail, statistics, keep, heads, eps = rest
        weights = LightWeights(*given)
        x, rest, norm, _ = begin(tail)
        owned = x is not branch
        out, state = forward(x, shortcut, weights, statistics, keep, heads, eps, tail=rest, in_place=owned)
        ctx.save_for_backward(branch, shortcut, *weights, *state, keep, *norm[:4])
        ctx.rest = eps, statistics is None, norm[4:]
        ctx.affine = weight is not None, bias is not None
        ctx.mark_non_differentiable(state.mean, state.variance)
        return out, state.mean, state.variance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> Any:
        branch, shortcut, *saved = ctx.saved_tensors
        eps, batch_statistics, rest_of_norm = ctx.rest
        of_branch, of_shortcut, of_weights, of_norm = backward(
            gradient,
            branch,
            shortcut,
            LightWeights(*saved[:6]),
            LightState(*saved[6:11]),
            saved[11],
            eps,
            batch_statistics=batch_statistics,
            tail=ResidualNorm(*saved[12:], *rest_of_norm),
        )
        of_affine = (one if there else None for one, there in zip(of_norm or (None, None), ctx.affine, strict=True))
        return of_branch, of_shortcut, *of_affine, *of_weights, *(None,) * 5
