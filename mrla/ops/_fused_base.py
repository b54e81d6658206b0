"""MRLA-base by compiled kernels: x + scale * act(norm(base_update(x, memory))) as one operator, with its gradient."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ._block_tail import ResidualNorm
from ._fused_maps import (
    addresses,
    chunks_of,
    kernel_gradients,
    kind_of,
    norm_gradients,
    norm_of_branch,
    packed,
    tail_numbers,
)


class BaseWeights(NamedTuple):
    """What MRLA-base, the BatchNorm behind it and its scale own, in float32."""

    query: Tensor
    key: Tensor
    value: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    scale: Tensor | None


class BaseForm(NamedTuple):
    """What kind of MRLA-base it is."""

    heads: int
    eps: float
    softmax: bool
    rectify: bool


class BaseState(NamedTuple):
    """The block's own value and key for the memory, and what else the gradient needs beside the maps.

    Attributes:
        value: v_t.
        key: k_t, one row an image.
        query: q_t, likewise.
        weights: What each head takes from each block, (b, g, t).
        means: Means of x over space.
        mean: The norm's.
        variance: The norm's, biased.
    """

    value: Tensor
    key: Tensor
    query: Tensor
    weights: Tensor
    means: Tensor
    mean: Tensor
    variance: Tensor


def forward(
    x: Tensor,
    shortcut: Tensor | None,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    weights: BaseWeights,
    statistics: tuple[Tensor, Tensor] | None,
    keep: Tensor | None,
    form: BaseForm,
    *,
    tail: bool = False,
    in_place: bool = False,
    keep_value: bool = True,
) -> tuple[Tensor, BaseState]:
    """The mixer's output, and what the memory and its gradient need.

    Args:
        x: The block's output; with `tail` what relu(. + shortcut) makes it of.
        shortcut: What the block added; used with `tail` alone.
        keys: Those of the blocks before.
        values: Likewise.
        weights: The mixer's own.
        statistics: The norm's running mean and variance in float32; None for those of this batch.
        keep: DropPath's factor for each image.
        form: What kind of MRLA-base.
        tail: See `x`.
        in_place: Whether `x` may be overwritten.
        keep_value: Whether anybody reads the block's value later, where the norm goes by its own statistics; an empty
            tensor stands for it otherwise.
    """
    from ._kernels import base, launch

    weights = packed(weights)
    b, c, h, w = x.shape
    kind, asked, reach = kind_of(x), len(values) + 1, weights.query.shape[-1] // 2
    per_plane = {"dtype": torch.float32, "device": x.device}
    around = torch.zeros((b, c + 2 * reach), **per_plane)  # the means of x, with zeros on both sides
    by_batch = statistics is None
    keep_value = keep_value or by_batch
    value = torch.empty_like(x) if keep_value else x.new_empty(0)
    key, query = torch.empty((b, c), **per_plane), torch.empty((b, c), **per_plane)
    taken = torch.empty((b, form.heads, asked), **per_plane)
    all_values, all_keys = [*values, value if keep_value else None], [*(one.contiguous() for one in keys), key]
    factor = torch.ones(c, **per_plane) if weights.scale is None else weights.scale
    moments = torch.empty((b, c, base.MOMENTS), **per_plane) if by_batch else None
    scale = shift = None
    if statistics is not None:
        scale, shift = norm_of_branch(*statistics, weights.norm_weight, weights.norm_bias, form.eps)
    chunks = chunks_of(b, form.heads)
    header = (c, h, w, form.heads, chunks, tail, asked, weights.query.numel())
    out = x if in_place and chunks == 1 and not by_batch else torch.empty_like(x)
    launch.run(
        base.apply(kind), b * chunks, x.numel() * asked, *header,
        x, shortcut, out, weights.value, addresses(all_values), addresses(all_keys), query, weights.query, weights.key,
        scale, shift, factor, keep, taken, around, moments, form.softmax, form.rectify, by_batch,
    )  # fmt: skip
    if statistics is None:
        assert moments is not None
        statistics = _statistics(moments, h * w)
        scale, shift = norm_of_branch(*statistics, weights.norm_weight, weights.norm_bias, form.eps)
        launch.run(
            base.finish(kind), b * chunks, x.numel(), *header,
            x, shortcut, out, scale, shift, factor, keep, form.rectify,
        )  # fmt: skip
    means = around[:, reach : reach + c].contiguous()
    return out, BaseState(value, key, query, taken, means, *statistics)


def backward(
    gradient: Tensor,
    of_key: Tensor | None,
    of_value: Tensor | None,
    x: Tensor,
    shortcut: Tensor | None,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    weights: BaseWeights,
    state: BaseState,
    keep: Tensor | None,
    form: BaseForm,
    *,
    batch_statistics: bool,
    tail: ResidualNorm | None = None,
) -> tuple[Tensor, Tensor | None, list[Tensor], list[Tensor], BaseWeights, tuple[Tensor, Tensor] | None]:
    """Gradients of `x`, the shortcut, earlier keys and values, the weights and, with `tail`, its norm's two.

    Args:
        gradient: That of the output.
        of_key: That of the block's key, from later blocks.
        of_value: That of its value, likewise.
        x: As `forward` had it; with `tail` the branch before its norm.
        shortcut: As `forward` had it.
        keys: Likewise.
        values: Likewise.
        weights: Likewise.
        state: What `forward` returned.
        keep: As `forward` had it.
        form: Likewise.
        batch_statistics: Whether the mixer's norm took those of the batch.
        tail: The norm behind the branch.
    """
    from ._kernels import base, launch

    weights = packed(weights)
    b, c, h, w = x.shape
    kind, count, asked, head_dim = kind_of(x), b * h * w, len(values) + 1, c // form.heads
    gradient = gradient.contiguous()
    chunks = chunks_of(b, form.heads)
    header = (c, h, w, form.heads, chunks, tail is not None, asked, weights.query.numel())
    per_plane = {"dtype": torch.float32, "device": x.device}
    scale, shift = norm_of_branch(state.mean, state.variance, weights.norm_weight, weights.norm_bias, form.eps)
    factor = (torch.ones(c, **per_plane) if weights.scale is None else weights.scale).expand(b, c)
    factor = (factor if keep is None else factor * keep[:, None]).contiguous()
    all_values, all_keys = [*values, state.value], [*keys, state.key]
    at_values = addresses(all_values)
    sums = torch.empty((b, c, base.SUMS), **per_plane)
    of_each = torch.empty((b, c, asked, base.VALUE_SUMS), **per_plane)
    launch.run(
        base.sums(kind), b * chunks, x.numel() * asked, *header,
        at_values, gradient, state.weights, scale, shift, state.mean, factor, sums, form.rectify, of_each,
    )  # fmt: skip

    # From here to the maps again: numbers for each plane, in float64, since what is left after subtraction counts.
    of_z, of_y, of_factor = sums.double().unbind(-1)
    rstd = (state.variance.double() + form.eps).rsqrt()
    of_norm_bias, of_norm_weight = of_z.sum(0), rstd * of_y.sum(0)
    incoming = weights.norm_weight.double() * rstd
    constant = incoming * of_norm_bias / count * batch_statistics
    slope = incoming * rstd * of_norm_weight / count * batch_statistics
    v, zv, yv = of_each.double().unbind(-1)
    of_weights = incoming[:, None] * zv - constant[:, None] * v - slope[:, None] * yv
    of_weights = of_weights.unflatten(1, (form.heads, head_dim)).sum(2)
    taken = state.weights.double()
    if form.softmax:
        of_scores = taken * (of_weights - (taken * of_weights).sum(-1, keepdim=True))
    else:
        of_scores = taken * (1 - taken) * of_weights
    of_scores = (of_scores * head_dim**-0.5).float()
    query = state.query.unflatten(1, (form.heads, head_dim))
    of_keys = [of_scores[:, :, at, None] * query for at in range(asked)]
    of_query = torch.stack([of_scores[:, :, at, None] * key.view_as(query) for at, key in enumerate(all_keys)]).sum(0)
    of_own_key = of_keys.pop() if of_key is None else of_keys.pop() + of_key.view_as(query)
    of_slid = torch.stack((of_query.flatten(1), of_own_key.flatten(1)), dim=1)
    of_means, of_query_kernel, of_key_kernel = kernel_gradients(of_slid, state.means, weights.query, weights.key)

    of_x, of_shortcut = torch.empty_like(x), None if shortcut is None else torch.empty_like(shortcut)
    of_values = [torch.empty_like(one) for one in values]
    of_own = None if of_value is None else of_value.contiguous()
    of_taps, of_tail = torch.empty((b, c, 9), **per_plane), torch.empty((b, c, 2), **per_plane)
    alpha, beta, centre, after = tail_numbers(tail, c)
    launch.run(
        base.gradients(kind), b * chunks, x.numel() * asked, *header,
        x, shortcut, gradient, of_x, of_shortcut, at_values, addresses([*of_values, of_own]), state.weights,
        weights.value, alpha, beta, centre, after, scale, shift, state.mean, factor, incoming.float(),
        constant.float(), slope.float(), of_means / (h * w), None, of_taps, of_tail, form.rectify, of_own is not None,
    )  # fmt: skip
    of_scale = None
    if weights.scale is not None:
        of_scale = (of_factor if keep is None else of_factor * keep[:, None]).sum(0).float()
    of_taps = of_taps.sum(0).view_as(weights.value)
    of_all = BaseWeights(
        of_query_kernel, of_key_kernel, of_taps, of_norm_weight.float(), of_norm_bias.float(), of_scale
    )
    of_norm = norm_gradients(tail, x, of_x, of_tail, header, b * chunks)
    return of_x, of_shortcut, of_keys, of_values, of_all, of_norm


def _statistics(moments: Tensor, pixels: int) -> tuple[Tensor, Tensor]:
    """Mean and (biased) variance of y over batch and space."""
    means, squares = moments.double().unbind(-1)
    mean = means.mean(0)
    squares = (squares + pixels * (means - mean).square()).sum(0)
    return mean.float(), (squares / (pixels * len(means))).float()
