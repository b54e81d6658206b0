"""MRLA-base as torch's operator `mrla::base`, and as a function of the epilogue of a residual block."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backend import BACKENDS
from ..calls import BaseForm, BaseState, BaseWeights, ResidualEpilogue
from ..torch_internals import own
from . import deferred_grads
from .residual_epilogue import affine_of
from .saved import save_groups, saved_groups
from .second_derivative import once_differentiable


@torch.library.custom_op("mrla::base", mutates_args=())
def _base(
    x: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    scale: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    drop_scale: Tensor | None,
    heads: int,
    eps: float,
    softmax: bool,
    rectify: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A backend's `base_forward` as torch's operator: the output, then the seven parts of the state."""
    weights = BaseWeights(query, key, value, norm_weight, norm_bias, scale)
    form = BaseForm(heads, eps, softmax, rectify)
    statistics = None if running_mean is None or running_var is None else (running_mean.clone(), running_var.clone())
    out, state = BACKENDS[backend].base_forward(x, None, keys, values, weights, statistics, drop_scale, form)
    value_now, key_now, query_now, attn, means, mean, variance = state
    return out, value_now, key_now, query_now, attn, means, mean, variance


@_base.register_fake
def _(
    x, keys, values, query, key, value, norm_weight, norm_bias, scale, running_mean, running_var, drop_scale, heads, *_
):
    b, c = x.shape[:2]
    shapes = (b, c), (b, c), (b, heads, len(values) + 1), (b, c + query.numel() - 1), (c,), (c,)
    return torch.empty_like(x), torch.empty_like(x), *(x.new_empty(shape, dtype=torch.float32) for shape in shapes)


@torch.library.custom_op("mrla::base_backward", mutates_args=())
def _base_backward(
    gradient: Tensor,
    grad_key: Tensor | None,
    grad_value: Tensor | None,
    x: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    weights: Sequence[Tensor],
    state: Sequence[Tensor],
    drop_scale: Tensor | None,
    heads: int,
    eps: float,
    softmax: bool,
    rectify: bool,
    backend: str,
    batch_statistics: bool,
) -> list[Tensor]:
    """A backend's `base_backward` as torch's operator: gradients of x, keys, values and weights in turn."""
    all_weights = BaseWeights(*weights, *(None,) * (6 - len(weights)))
    grad_x, _, grad_keys, grad_values, grad_weights, _ = BACKENDS[backend].base_backward(
        gradient, grad_key, grad_value, (), x, None, keys, values, all_weights, BaseState(*state), drop_scale,
        BaseForm(heads, eps, softmax, rectify), batch_statistics=batch_statistics, wanted=[True] * len(values),
    )  # fmt: skip
    return [own(one) for one in (grad_x, *grad_keys, *grad_values, *grad_weights) if one is not None]


@_base_backward.register_fake
def _(gradient, grad_key, grad_value, x, keys, values, weights, *_):
    return [torch.empty_like(one) for one in (x, *keys, *values, *weights)]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, keys, values, *weights, running_mean, _running_var, drop_scale, heads, eps, softmax, rectify, backend = inputs
    _, value, key, *others = output
    state = BaseState(value, key, *others)
    save_groups(ctx, x=x, keys=keys, values=values, weights=BaseWeights(*weights), state=state, drop_scale=drop_scale)
    ctx.rest = heads, eps, softmax, rectify, backend, running_mean is None
    ctx.mark_non_differentiable(*others)
    ctx.set_materialize_grads(False)


@once_differentiable
def _gradients(ctx: Any, gradient: Tensor | None, grad_value: Tensor | None, grad_key: Tensor | None) -> list[Any]:
    """The gradients of x, the keys, the values and the weights, one after another."""
    saved = saved_groups(ctx)
    x, keys, values = saved["x"], saved["keys"], saved["values"]
    weights = [one for one in saved["weights"] if one is not None]
    gradient = torch.zeros_like(x) if gradient is None else gradient
    return torch.ops.mrla.base_backward(
        gradient, grad_key, grad_value, x, keys, values, weights, saved["state"], saved["drop_scale"], *ctx.rest
    )


def _differentiate(
    ctx: Any, gradient: Tensor | None, grad_value: Tensor | None, grad_key: Tensor | None, *_: Any
) -> Any:
    count = sum(size for name, _, size in ctx.layout if name == "keys")
    grad_x, *found = _gradients(ctx, gradient, grad_value, grad_key)
    grad_keys, grad_values, grad_weights = found[:count], found[count : 2 * count], found[2 * count :]
    missing = len(BaseWeights._fields) - len(grad_weights) + 8  # a scale that is not there comes last of the weights
    return grad_x, grad_keys, grad_values, *grad_weights, *(None,) * missing


_base.register_autograd(_differentiate, setup_context=_save)


def base(
    x: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    weights: BaseWeights,
    statistics: tuple[Tensor, Tensor] | None,
    drop_scale: Tensor | None,
    form: BaseForm,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The mixer's output, the block's key (b, c) and value, and mean and biased variance that its norm went by."""
    out, value, key, _, _, _, mean, variance = torch.ops.mrla.base(
        x, list(keys), list(values), *weights, *(statistics or (None, None)), drop_scale, *form, backend
    )
    return out, key, value, mean, variance


def base_with_epilogue(
    epilogue: ResidualEpilogue,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    weights: BaseWeights,
    statistics: tuple[Tensor, Tensor] | None,
    drop_scale: Tensor | None,
    form: BaseForm,
    backend: str,
    *,
    last: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Like `base`, of the block's output that a epilogue stands for.

    With `last` no block reads the memory: without a gradient the value is then an empty tensor.
    """
    inputs = (epilogue.branch, epilogue.shortcut, *affine_of(epilogue), *weights, *keys, *values)
    if torch.is_grad_enabled() and any(one is not None and one.requires_grad for one in inputs):
        return _BaseWithEpilogue.apply(*inputs, epilogue, len(keys), statistics, drop_scale, form, backend)
    begun = BACKENDS[backend].begin(epilogue)
    out, state = BACKENDS[backend].base_forward(
        begun.map,
        epilogue.shortcut,
        keys,
        values,
        weights,
        statistics,
        drop_scale,
        form,
        branch_norm=begun.rest,
        in_place=begun.owned,
        keep_value=not last,
    )
    return out, state.key, state.value, state.mean, state.variance


class _BaseWithEpilogue(torch.autograd.Function):
    """The end of a residual block with MRLA-base behind it: of its maps branch, shortcut and values are kept.

    In backward a block gives the earlier ones no gradient of their values, see `deferred_grads`.
    """

    @staticmethod
    def forward(ctx: Any, branch: Tensor, shortcut: Tensor, weight: Any, bias: Any, *rest: Any) -> Any:
        *given, epilogue, num_values, statistics, drop_scale, form, backend = rest
        own_weights = len(BaseWeights._fields)
        weights, memory = BaseWeights(*given[:own_weights]), given[own_weights:]
        keys, values = memory[:num_values], memory[num_values:]
        x, left, norm, _ = BACKENDS[backend].begin(epilogue)
        out, state = BACKENDS[backend].base_forward(
            x, shortcut, keys, values, weights, statistics, drop_scale, form, branch_norm=left
        )
        kept_norm = norm._replace(eps=None, training=None)
        save_groups(
            ctx, branch=branch, shortcut=shortcut, weights=weights, keys=keys, values=values, state=state,
            drop_scale=drop_scale, norm=kept_norm,
        )  # fmt: skip
        ctx.rest = form, statistics is None, norm.eps, norm.training, backend
        ctx.affine = weight is not None, bias is not None
        # The graph counts tensors alone.
        before = sum(one is not None for one in (branch, shortcut, weight, bias, *weights, *keys))
        deferred_grads.begin_forward(ctx, before, num_values)
        ctx.mark_non_differentiable(state.mean, state.variance)
        ctx.set_materialize_grads(False)
        return out, state.key, state.value, state.mean, state.variance

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,
        gradient: Tensor | None,
        grad_key: Tensor | None,
        grad_value: Tensor | None,
        _mean: None,
        _variance: None,
    ) -> Any:
        saved = saved_groups(ctx)
        form, batch_statistics, norm_eps, norm_training, backend = ctx.rest
        branch, state = saved["branch"], saved["state"]
        gradient = torch.zeros_like(branch) if gradient is None else gradient
        plan = deferred_grads.plan(ctx)
        grad_update = deferred_grads.room_for_update(ctx, plan, state.value, branch)
        grad_branch, grad_shortcut, grad_keys, grad_values, grad_weights, of_norm = BACKENDS[backend].base_backward(
            gradient,
            grad_key,
            grad_value,
            plan.pending,
            branch,
            saved["shortcut"],
            saved["keys"],
            saved["values"],
            saved["weights"],
            state,
            saved["drop_scale"],
            form,
            batch_statistics=batch_statistics,
            wanted=plan.wanted,
            grad_update=grad_update,
            branch_norm=saved["norm"]._replace(eps=norm_eps, training=norm_training),
        )
        deferred_grads.leave(plan, grad_update, state.weights)
        of_affine = (one if there else None for one, there in zip(of_norm or (None, None), ctx.affine, strict=True))
        return grad_branch, grad_shortcut, *of_affine, *grad_weights, *grad_keys, *grad_values, *(None,) * 6
