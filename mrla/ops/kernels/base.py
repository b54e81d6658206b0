"""MRLA-base as torch's operator `mrla::base`, and as a function of the tail of a residual block."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .cpu.fused_base import BaseForm, BaseState, BaseWeights, Letter, backward, forward
from .cpu.fused_maps import own
from .residual_epilogue import BlockTail, ResidualNorm, affine_of, begin
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
    keep: Tensor | None,
    heads: int,
    eps: float,
    softmax: bool,
    rectify: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`forward` as torch's operator: the output, then the seven parts of the state."""
    weights = BaseWeights(query, key, value, norm_weight, norm_bias, scale)
    form = BaseForm(heads, eps, softmax, rectify)
    statistics = None if running_mean is None or running_var is None else (running_mean.clone(), running_var.clone())
    out, state = forward(x, None, keys, values, weights, statistics, keep, form)
    value_now, key_now, query_now, taken, means, mean, variance = state
    return out, value_now, key_now, query_now, taken, means, mean, variance


@_base.register_fake
def _(x, keys, values, query, key, value, norm_weight, norm_bias, scale, running_mean, running_var, keep, heads, *_):
    b, c = x.shape[:2]
    shapes = (b, c), (b, c), (b, heads, len(values) + 1), (b, c + query.numel() - 1), (c,), (c,)
    return torch.empty_like(x), torch.empty_like(x), *(x.new_empty(shape, dtype=torch.float32) for shape in shapes)


@torch.library.custom_op("mrla::base_backward", mutates_args=())
def _base_backward(
    gradient: Tensor,
    of_key: Tensor | None,
    of_value: Tensor | None,
    x: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    weights: Sequence[Tensor],
    state: Sequence[Tensor],
    keep: Tensor | None,
    heads: int,
    eps: float,
    softmax: bool,
    rectify: bool,
    batch_statistics: bool,
) -> list[Tensor]:
    """`backward` as torch's operator: the gradients of x, keys, values and weights, one after the other."""
    all_weights = BaseWeights(*weights, *(None,) * (6 - len(weights)))
    of_x, _, of_keys, of_values, of_weights, _ = backward(
        gradient, of_key, of_value, (), x, None, keys, values, all_weights, BaseState(*state), keep,
        BaseForm(heads, eps, softmax, rectify), batch_statistics=batch_statistics, wanted=[True] * len(values),
    )  # fmt: skip
    return [own(one) for one in (of_x, *of_keys, *of_values, *of_weights) if one is not None]


@_base_backward.register_fake
def _(gradient, of_key, of_value, x, keys, values, weights, *_):
    return [torch.empty_like(one) for one in (x, *keys, *values, *weights)]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, keys, values, *weights = inputs[:9]
    running_mean, keep = inputs[9], inputs[11]
    given = [one for one in weights if one is not None]
    ctx.save_for_backward(x, *keys, *values, *given, *output[1:], keep)
    ctx.asked, ctx.form, ctx.rest = len(keys), len(given), (*inputs[12:], running_mean is None)
    ctx.mark_non_differentiable(*output[3:])
    ctx.set_materialize_grads(False)


@once_differentiable
def _gradients(ctx: Any, gradient: Tensor | None, of_value: Tensor | None, of_key: Tensor | None) -> list[Any]:
    """The gradients of x, the keys, the values and the weights, one after another."""
    x, *saved = ctx.saved_tensors
    count = ctx.asked
    keys, values, rest = saved[:count], saved[count : 2 * count], saved[2 * count :]
    weights, state, keep = rest[: ctx.form], rest[ctx.form : -1], rest[-1]
    gradient = torch.zeros_like(x) if gradient is None else gradient
    return torch.ops.mrla.base_backward(gradient, of_key, of_value, x, keys, values, weights, state, keep, *ctx.rest)


def _differentiate(ctx: Any, gradient: Tensor | None, of_value: Tensor | None, of_key: Tensor | None, *_: Any) -> Any:
    count = ctx.asked
    found = list(_gradients(ctx, gradient, of_value, of_key))
    of_weights = [*found[1 + 2 * count :], *(None,) * (6 - ctx.form)]
    return found[0], found[1 : 1 + count], found[1 + count : 1 + 2 * count], *of_weights, *(None,) * 7


_base.register_autograd(_differentiate, setup_context=_save)


def base(
    x: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    weights: BaseWeights,
    statistics: tuple[Tensor, Tensor] | None,
    keep: Tensor | None,
    form: BaseForm,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The mixer's output, the block's key (b, c) and value, and mean and biased variance that its norm went by."""
    out, value, key, _, _, _, mean, variance = torch.ops.mrla.base(
        x, list(keys), list(values), *weights, *(statistics or (None, None)), keep, *form
    )
    return out, key, value, mean, variance


def base_behind(
    tail: BlockTail,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    weights: BaseWeights,
    statistics: tuple[Tensor, Tensor] | None,
    keep: Tensor | None,
    form: BaseForm,
    *,
    last: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Like `base`, of the block's output that a tail stands for.

    With `last` no block reads the memory: without a gradient the value is then an empty tensor.
    """
    inputs = (tail.branch, tail.shortcut, *affine_of(tail), *weights, *keys, *values)
    if torch.is_grad_enabled() and any(one is not None and one.requires_grad for one in inputs):
        return _BaseTail.apply(*inputs, tail, len(keys), statistics, keep, form)
    x, rest, _, owned = begin(tail)
    out, state = forward(
        x,
        tail.shortcut,
        keys,
        values,
        weights,
        statistics,
        keep,
        form,
        tail=rest,
        in_place=owned,
        keep_value=not last,
    )
    return out, state.key, state.value, state.mean, state.variance


_VALUE = 2
"""The number of the value among what `_BaseTail` returns."""


class _BaseTail(torch.autograd.Function):
    """The end of a residual block with MRLA-base behind it: of its maps branch, shortcut and values are kept.

    In backward a block gives the earlier ones no gradient of their values. It leaves each of them a `Letter` at its
    node in the graph: every map is then read once, and but one map a block is written, the gradient of its y. That goes
    where the block's own value was, if nobody needs that any more.
    """

    @staticmethod
    def forward(ctx: Any, branch: Tensor, shortcut: Tensor, weight: Any, bias: Any, *rest: Any) -> Any:
        *given, tail, asked, statistics, keep, form = rest
        weights, keys, values = BaseWeights(*given[:6]), given[6 : 6 + asked], given[6 + asked :]
        x, left, norm, _ = begin(tail)
        out, state = forward(x, shortcut, keys, values, weights, statistics, keep, form, tail=left)
        ctx.save_for_backward(branch, shortcut, *weights, *keys, *values, *state, keep, *norm[:4])
        ctx.rest = asked, form, statistics is None, norm[4:]
        ctx.affine = weight is not None, bias is not None
        # The graph counts tensors alone.
        ctx.first_value = sum(one is not None for one in (branch, shortcut, weight, bias, *given[: 6 + asked]))
        ctx.mail = {}
        inside: Any = torch._C
        # Whoever has set a hook on what is saved may hold it.
        ctx.own_place = inside._autograd._top_saved_tensors_default_hooks(False) is None
        ctx.mark_non_differentiable(state.mean, state.variance)
        ctx.set_materialize_grads(False)
        return out, state.key, state.value, state.mean, state.variance

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,
        gradient: Tensor | None,
        of_key: Tensor | None,
        of_value: Tensor | None,
        _mean: None,
        _variance: None,
    ) -> Any:
        branch, shortcut, *saved = ctx.saved_tensors
        asked, form, batch_statistics, rest_of_norm = ctx.rest
        keys, values = saved[6 : 6 + asked], saved[6 + asked : 6 + 2 * asked]
        state = BaseState(*saved[6 + 2 * asked : 13 + 2 * asked])
        keep, *norm = saved[13 + 2 * asked :]
        gradient = torch.zeros_like(branch) if gradient is None else gradient

        nodes = ctx.next_functions[ctx.first_value : ctx.first_value + asked]
        run: Any = torch._C
        by_letter = [isinstance(node, type(ctx)) and at == _VALUE for node, at in nodes]
        to = [
            (block, node)
            for block, ((node, _), takes) in enumerate(zip(nodes, by_letter, strict=True))
            if takes and run._will_engine_execute_node(node)
        ]
        wanted = [node is not None and not takes for (node, _), takes in zip(nodes, by_letter, strict=True)]
        of_update = None
        if to:
            free = ctx.own_place and _is_done_with(state.value)
            of_update = state.value if free else torch.empty_like(branch)
        task = run._current_graph_task_id()
        of_branch, of_shortcut, of_keys, of_values, of_weights, of_norm = backward(
            gradient, of_key, of_value, ctx.mail.pop(task, ()), branch, shortcut, keys, values,
            BaseWeights(*saved[:6]), state, keep, form, batch_statistics=batch_statistics, wanted=wanted,
            grad_update=of_update, tail=ResidualNorm(*norm, *rest_of_norm),
        )  # fmt: skip
        for block, node in to:
            assert of_update is not None
            node.mail.setdefault(task, []).append(Letter(of_update, state.weights, block))
        of_affine = (one if there else None for one, there in zip(of_norm or (None, None), ctx.affine, strict=True))
        return of_branch, of_shortcut, *of_affine, *of_weights, *of_keys, *of_values, *(None,) * 5


def _is_done_with(value: Tensor) -> bool:
    """Whether a saved output may be overwritten: no second pass is to come, and nobody else holds what it lies in."""
    inside: Any = torch._C
    return not inside._autograd._get_current_graph_task_keep_graph() and _holders(value) == _holders_of_an_output()


def _holders(tensor: Tensor) -> int:
    inside: Any = torch._C
    return inside._storage_Use_Count(tensor.untyped_storage()._cdata)


@functools.cache
def _holders_of_an_output() -> int:
    """How often torch itself holds an output that its function has saved and takes out in backward."""
    found = []

    class Probe(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            out = x.clone()
            ctx.save_for_backward(out)
            return out

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
            (out,) = ctx.saved_tensors
            found.append(_holders(out))
            return gradient

    with torch.enable_grad():
        Probe.apply(torch.zeros(1, dtype=torch.float32, device="cpu", requires_grad=True)).sum().backward()
    return found[0]
