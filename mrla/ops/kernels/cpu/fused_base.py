"""MRLA-base by compiled kernels: x + scale * act(norm(base_update(x, memory))) as one operator, with its gradient."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...calls import BaseForm, BaseState, BaseWeights, DeferredGrad, ResidualNorm
from .fused_maps import (
    PARTS,
    addresses,
    as_read,
    chunks_of,
    epilogue_fields,
    image_fields,
    kind_of,
    norm_gradients,
    packed,
    plane_number_fields,
    update_norm_fields,
)


def forward(
    x: Tensor,
    shortcut: Tensor | None,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    weights: BaseWeights,
    statistics: tuple[Tensor, Tensor] | None,
    drop_scale: Tensor | None,
    form: BaseForm,
    *,
    branch_norm: ResidualNorm | None = None,
    in_place: bool = False,
    keep_value: bool = True,
) -> tuple[Tensor, BaseState]:
    """The mixer's output, and what the memory and its gradient need.

    Arguments are those of `mrla.ops.Backend.base_forward`.
    """
    from . import base, base_numbers, launch

    weights = packed(weights)
    b, c, _, _ = x.shape
    kind, num_layers, k = kind_of(x), len(values) + 1, weights.query.numel()
    per_plane = {"dtype": torch.float32, "device": x.device}
    means = torch.empty((b, c + k - 1), **per_plane)
    by_batch = statistics is None
    keep_value = keep_value or by_batch
    value = torch.empty_like(x) if keep_value else x.new_empty(0)
    key, query = torch.empty((b, c), **per_plane), torch.empty((b, c), **per_plane)
    attn = torch.empty((b, form.heads, num_layers), **per_plane)
    all_values, all_keys = [*values, value if keep_value else None], [*(one.contiguous() for one in keys), key]
    moments = torch.empty((b, c, len(base.MOMENTS)), **per_plane) if by_batch else None
    chunks = chunks_of(b, form.heads)
    images, epilogue = image_fields(x, form.heads, chunks, k), epilogue_fields(branch_norm)
    scales = {"scale": weights.scale, "drop_scale": drop_scale}
    out = x if in_place and chunks == 1 and not by_batch else torch.empty_like(x)
    launch.run(
        base.apply(kind),
        items=b * chunks,
        work=x.numel() * num_layers,
        **images,
        **epilogue,
        **update_norm_fields(weights.norm_weight, weights.norm_bias, statistics, form.eps),
        **scales,
        num_layers=num_layers,
        softmax=form.softmax,
        rectify=form.rectify,
        by_batch=by_batch,
        x=x,
        shortcut=shortcut,
        out=out,
        taps=weights.value,
        values=addresses(all_values),
        keys=addresses(all_keys),
        query=query,
        query_weight=weights.query,
        key_weight=weights.key,
        attn=attn,
        means=means,
        moments=moments,
    )
    if statistics is None:
        mean, variance = statistics = torch.empty(c, **per_plane), torch.empty(c, **per_plane)
        launch.run(
            base_numbers.statistics(),
            items=PARTS,
            work=2 * b * c,
            **plane_number_fields(x, form.heads, k),
            moments=moments,
            mean=mean,
            variance=variance,
        )
        launch.run(
            base.finish(kind),
            items=b * chunks,
            work=x.numel(),
            **images,
            **epilogue,
            **update_norm_fields(weights.norm_weight, weights.norm_bias, statistics, form.eps),
            **scales,
            rectify=form.rectify,
            x=x,
            shortcut=shortcut,
            out=out,
        )
    return out, BaseState(value, key, query, attn, means, *statistics)


def backward(
    gradient: Tensor,
    grad_key: Tensor | None,
    grad_value: Tensor | None,
    pending: Sequence[DeferredGrad],
    x: Tensor,
    shortcut: Tensor | None,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    weights: BaseWeights,
    state: BaseState,
    drop_scale: Tensor | None,
    form: BaseForm,
    *,
    batch_statistics: bool,
    wanted: Sequence[bool],
    grad_update: Tensor | None = None,
    branch_norm: ResidualNorm | None = None,
) -> tuple[Tensor, Tensor | None, list[Tensor], list[Tensor | None], BaseWeights, tuple[Tensor, Tensor] | None]:
    """Gradients of `x`, the shortcut, earlier keys and values, the weights and, with `branch_norm`, its norm's two.

    Arguments are those of `mrla.ops.Backend.base_backward`.
    """
    from . import base, base_numbers, launch

    weights = packed(weights)
    b, c, _, _ = x.shape
    kind, num_layers, k = kind_of(x), len(values) + 1, weights.query.numel()
    gradient = as_read(gradient)
    chunks = chunks_of(b, form.heads)
    images, numbers = image_fields(x, form.heads, chunks, k), plane_number_fields(x, form.heads, k)
    norm = update_norm_fields(weights.norm_weight, weights.norm_bias, (state.mean, state.variance), form.eps)
    scales = {"scale": weights.scale, "drop_scale": drop_scale}
    per_plane = {"dtype": torch.float32, "device": x.device}
    sums = torch.empty((b, c, len(base.SUMS)), **per_plane)
    value_sums = torch.empty((b, c, num_layers, len(base.VALUE_SUMS)), **per_plane)
    grad_x = torch.empty_like(x)  # y until its place is needed for the gradient
    launch.run(
        base.sums(kind),
        items=b * chunks,
        work=x.numel() * num_layers,
        **images,
        **norm,
        **scales,
        num_layers=num_layers,
        rectify=form.rectify,
        grad_out=gradient,
        grad_x=grad_x,
        values=addresses([*values, state.value]),
        attn=state.weights,
        sums=sums,
        value_sums=value_sums,
    )

    incoming, constant, slope, grad_norm_weight, grad_norm_bias = (torch.empty(c, **per_plane) for _ in range(5))
    grad_scale = None if weights.scale is None else torch.empty(c, **per_plane)
    grad_attn = torch.empty((b, c, num_layers), **per_plane)
    launch.run(
        base_numbers.numbers(),
        items=PARTS,
        work=4 * b * c * num_layers,
        **numbers,
        num_layers=num_layers,
        by_batch=batch_statistics,
        norm_eps=form.eps,
        sums=sums,
        value_sums=value_sums,
        variance=state.variance,
        norm_weight=weights.norm_weight,
        drop_scale=drop_scale,
        incoming=incoming,
        constant=constant,
        slope=slope,
        grad_weight=grad_norm_weight,
        grad_bias=grad_norm_bias,
        grad_scale=grad_scale,
        grad_attn=grad_attn,
    )
    grad_keys, pooled = [torch.empty((b, c), **per_plane) for _ in keys], torch.empty((b, c), **per_plane)
    grad_kernels = torch.empty((b, 2, k), **per_plane)
    all_keys = [*(one.contiguous() for one in keys), state.key]
    launch.run(
        base_numbers.score_gradients(),
        items=b,
        work=4 * b * c * num_layers,
        **numbers,
        num_layers=num_layers,
        softmax=form.softmax,
        query_weight=weights.query,
        key_weight=weights.key,
        means=state.means,
        attn=state.weights,
        query=state.query,
        keys=addresses(all_keys),
        grad_keys=addresses([*grad_keys, None]),
        grad_key=None if grad_key is None else as_read(grad_key.float()),
        grad_attn=grad_attn,
        pooled=pooled,
        grad_kernels=grad_kernels,
    )

    grad_shortcut = None if shortcut is None else torch.empty_like(shortcut)
    grad_values = [torch.empty_like(one) if there else None for one, there in zip(values, wanted, strict=True)]
    grad_taps, branch_sums = torch.empty((b, c, 9), **per_plane), torch.empty((b, c, 2), **per_plane)
    rows = [(one.grad_update.data_ptr(), one.attn.data_ptr(), one.attn.shape[2], one.block) for one in pending]
    launch.run(
        base.gradients(kind),
        items=b * chunks,
        work=x.numel() * (2 + len(pending)),
        **images,
        **epilogue_fields(branch_norm),
        **norm,
        **scales,
        num_layers=num_layers,
        rectify=form.rectify,
        num_pending=len(pending),
        x=x,
        shortcut=shortcut,
        grad_out=gradient,
        grad_value=None if grad_value is None else as_read(grad_value),
        grad_x=grad_x,
        grad_shortcut=grad_shortcut,
        grad_update=grad_update,
        grad_values=addresses([*grad_values, None]),
        pending=torch.tensor(rows, dtype=torch.int64, device="cpu"),
        attn=state.weights,
        taps=weights.value,
        incoming=incoming,
        constant=constant,
        slope=slope,
        pooled=pooled,
        grad_taps=grad_taps,
        branch_sums=branch_sums,
    )
    grad_taps = grad_taps.sum(0).view_as(weights.value)
    grad_query, grad_own_key = grad_kernels.sum(0).view(2, 1, 1, -1).unbind()
    grad_weights = BaseWeights(grad_query, grad_own_key, grad_taps, grad_norm_weight, grad_norm_bias, grad_scale)
    grad_keys = [one.view_as(key) for one, key in zip(grad_keys, keys, strict=True)]
    grad_norm = norm_gradients(branch_norm, x, grad_x, branch_sums, images, b * chunks)
    return grad_x, grad_shortcut, grad_keys, grad_values, grad_weights, grad_norm
