"""MRLA-light as torch's operator `mrla::light`, and as a function of the epilogue of a residual block."""

from typing import Any

import torch
from torch import Tensor

from ..backend import BACKENDS
from ..calls import LightState, LightWeights, ResidualEpilogue, ResidualNorm
from ..torch_internals import own
from .residual_epilogue import affine_of
from .saved import save_groups, saved_groups
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
    drop_scale: Tensor | None,
    heads: int,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A backend's `light_forward` as torch's operator: the output, then the five parts of the state."""
    weights = LightWeights(query, key, value, decay, norm_weight, norm_bias)
    statistics = None if running_mean is None or running_var is None else (running_mean.clone(), running_var.clone())
    out, state = BACKENDS[backend].light_forward(x, shortcut, weights, statistics, drop_scale, heads, eps)
    return out, state.means, state.gates, state.moments, state.mean, state.variance


@_light.register_fake
def _(x, shortcut, query, key, value, decay, norm_weight, norm_bias, running_mean, running_var, drop_scale, heads, *_):
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
    drop_scale: Tensor | None,
    eps: float,
    batch_statistics: bool,
    backend: str,
) -> list[Tensor]:
    """A backend's `light_backward` as torch's operator: gradients of x, the shortcut and the weights that are there."""
    grad_x, grad_shortcut, grad_weights, _ = BACKENDS[backend].light_backward(
        gradient,
        x,
        shortcut,
        LightWeights(query, key, value, decay, norm_weight, norm_bias),
        LightState(means, gates, moments, mean, variance),
        drop_scale,
        eps,
        batch_statistics=batch_statistics,
    )
    return [own(one) for one in (grad_x, grad_shortcut, *grad_weights) if one is not None]


@_light_backward.register_fake
def _(gradient, x, shortcut, query, key, value, decay, norm_weight, norm_bias, *_):
    given = (x, shortcut, query, key, value, decay, norm_weight, norm_bias)
    return [torch.empty_like(one) for one in given if one is not None]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, shortcut, *weights, running_mean, _running_var, drop_scale, _heads, eps, backend = inputs
    _, *state = output
    save_groups(
        ctx, x=x, shortcut=shortcut, weights=LightWeights(*weights), state=LightState(*state), drop_scale=drop_scale
    )
    ctx.rest = eps, running_mean is None, backend
    ctx.mark_non_differentiable(*state)
    ctx.set_materialize_grads(False)


@once_differentiable
def _differentiate(ctx: Any, gradient: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if gradient is None:
        return (None,) * 14
    saved = saved_groups(ctx)
    given = (saved["x"], saved["shortcut"], *saved["weights"])
    found = iter(torch.ops.mrla.light_backward(gradient, *given, *saved["state"], saved["drop_scale"], *ctx.rest))
    gradients = [None if one is None else next(found) for one in given]
    return *gradients, *(None,) * 6


_light.register_autograd(_differentiate, setup_context=_save)


def light(
    x: Tensor,
    shortcut: Tensor | None,
    weights: LightWeights,
    statistics: tuple[Tensor, Tensor] | None,
    drop_scale: Tensor | None,
    heads: int,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The mixer's output, and mean and biased variance that its norm went by; see `Backend.light_forward`."""
    out, _, _, _, mean, variance = torch.ops.mrla.light(
        x, shortcut, *weights, *(statistics or (None, None)), drop_scale, heads, eps, backend
    )
    return out, mean, variance


def light_with_epilogue(
    epilogue: ResidualEpilogue,
    weights: LightWeights,
    statistics: tuple[Tensor, Tensor] | None,
    drop_scale: Tensor | None,
    heads: int,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Like `light`, of the block's output and shortcut that a epilogue stands for."""
    inputs = (epilogue.branch, epilogue.shortcut, *affine_of(epilogue), *weights)
    if torch.is_grad_enabled() and any(one is not None and one.requires_grad for one in inputs):
        return _LightWithEpilogue.apply(*inputs, epilogue, statistics, drop_scale, heads, eps, backend)
    begun = BACKENDS[backend].begin(epilogue)
    out, state = BACKENDS[backend].light_forward(
        begun.map,
        epilogue.shortcut,
        weights,
        statistics,
        drop_scale,
        heads,
        eps,
        branch_norm=begun.rest,
        in_place=begun.owned,
        keep_state=False,
    )
    return out, state.mean, state.variance


class _LightWithEpilogue(torch.autograd.Function):
    """The end of a residual block with MRLA-light behind it: of its maps only branch and shortcut are kept.

    Not an operator of torch's registry: it moves the running statistics of the block's norm on, as that norm would,
    which an operator with a gradient may not. So compiled graphs have the epilogue and the mixer one after the other.
    """

    @staticmethod
    def forward(ctx: Any, branch: Tensor, shortcut: Tensor, weight: Any, bias: Any, *rest: Any) -> Any:
        *given, epilogue, statistics, drop_scale, heads, eps, backend = rest
        weights = LightWeights(*given)
        x, rest, norm, _ = BACKENDS[backend].begin(epilogue)
        owned = x is not branch
        out, state = BACKENDS[backend].light_forward(
            x, shortcut, weights, statistics, drop_scale, heads, eps, branch_norm=rest, in_place=owned
        )
        kept_norm = norm._replace(eps=None, training=None)
        save_groups(
            ctx, branch=branch, shortcut=shortcut, weights=weights, state=state, drop_scale=drop_scale, norm=kept_norm
        )
        ctx.rest = eps, statistics is None, norm.eps, norm.training, backend
        ctx.affine = weight is not None, bias is not None
        ctx.mark_non_differentiable(state.mean, state.variance)
        return out, state.mean, state.variance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> Any:
        saved = saved_groups(ctx)
        eps, batch_statistics, norm_eps, norm_training, backend = ctx.rest
        norm: ResidualNorm = saved["norm"]._replace(eps=norm_eps, training=norm_training)
        grad_branch, grad_shortcut, grad_weights, of_norm = BACKENDS[backend].light_backward(
            gradient,
            saved["branch"],
            saved["shortcut"],
            saved["weights"],
            saved["state"],
            saved["drop_scale"],
            eps,
            batch_statistics=batch_statistics,
            branch_norm=norm,
        )
        of_affine = (one if there else None for one, there in zip(of_norm or (None, None), ctx.affine, strict=True))
        return grad_branch, grad_shortcut, *of_affine, *grad_weights, *(None,) * 6
