"""MRLA-base by compiled kernels: x + scale * act(norm(base_update(x, memory))) as one operator, with its gradient."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ._block_tail import ResidualNorm
from ._fused_maps import (
    PARTS,
    addresses,
    before_the_add,
    chunks_of,
    kind_of,
    norm_gradients,
    norm_of_branch,
    on_the_way_back,
    packed,
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
        means: Means of x over space, with zeros on both sides of the channels.
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
    tail: ResidualNorm | None = None,
    in_place: bool = False,
    keep_value: bool = True,
) -> tuple[Tensor, BaseState]:
    """The mixer's output, and what the memory and its gradient need.

    Args:
        x: The block's output; with `tail` the branch that it is relu(norm(branch) + shortcut) of.
        shortcut: What the block added; used with `tail` alone.
        keys: Those of the blocks before.
        values: Likewise.
        weights: The mixer's own.
        statistics: The norm's running mean and variance in float32; None for those of this batch.
        keep: DropPath's factor for each image.
        form: What kind of MRLA-base.
        tail: The norm behind the branch.
        in_place: Whether `x` may be overwritten.
        keep_value: Whether anybody reads the block's value later, where the norm goes by its own statistics; an empty
            tensor stands for it otherwise.
    """
    from ._kernels import base, base_numbers, launch

    weights = packed(weights)
    b, c, h, w = x.shape
    kind, asked, k = kind_of(x), len(values) + 1, weights.query.numel()
    per_plane = {"dtype": torch.float32, "device": x.device}
    means = torch.zeros((b, c + k - 1), **per_plane)
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
    header, line = (c, h, w, form.heads, chunks, tail is not None, asked, k), before_the_add(tail)
    out = x if in_place and chunks == 1 and not by_batch else torch.empty_like(x)
    launch.run(
        base.apply(kind), b * chunks, x.numel() * asked, *header,
        x, shortcut, out, weights.value, addresses(all_values), addresses(all_keys), query, weights.query, weights.key,
        scale, shift, factor, keep, taken, means, moments, form.softmax, form.rectify, by_batch, *line,
    )  # fmt: skip
    if statistics is None:
        assert moments is not None
        statistics = torch.empty(c, **per_plane), torch.empty(c, **per_plane)
        small = (b, c, h * w, form.heads, k, PARTS)
        launch.run(base_numbers.statistics(), PARTS, 2 * b * c, *small, moments, *statistics)
        scale, shift = norm_of_branch(*statistics, weights.norm_weight, weights.norm_bias, form.eps)
        launch.run(
            base.finish(kind), b * chunks, x.numel(), *header,
            x, shortcut, out, scale, shift, factor, keep, form.rectify, *line,
        )  # fmt: skip
    return out, BaseState(value, key, query, taken, means, *statistics)


def backward(
    gradient: Tensor,
    of_key: Tensor | None,
    of_value: Tensor | None,
    later: Sequence[Tensor | None],
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
        later: Those of the earlier values, from later blocks, where they come through here; they are overwritten.
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
    from ._kernels import base, base_numbers, launch

    weights = packed(weights)
    b, c, h, w = x.shape
    kind, asked = kind_of(x), len(values) + 1
    gradient = gradient.contiguous()
    chunks = chunks_of(b, form.heads)
    header = (c, h, w, form.heads, chunks, tail is not None, asked, weights.query.numel())
    per_plane = {"dtype": torch.float32, "device": x.device}
    scale, shift = norm_of_branch(state.mean, state.variance, weights.norm_weight, weights.norm_bias, form.eps)
    factor = (torch.ones(c, **per_plane) if weights.scale is None else weights.scale).expand(b, c)
    factor = (factor if keep is None else factor * keep[:, None]).contiguous()
    at_values = addresses([*values, state.value])
    sums = torch.empty((b, c, base.SUMS), **per_plane)
    of_each = torch.empty((b, c, asked, base.VALUE_SUMS), **per_plane)
    launch.run(
        base.sums(kind), b * chunks, x.numel() * asked, *header,
        at_values, gradient, state.weights, scale, shift, state.mean, factor, sums, form.rectify, of_each,
    )  # fmt: skip

    k = weights.query.numel()
    small, rstd = (b, c, h * w, form.heads, k, PARTS), (state.variance + form.eps).rsqrt()
    incoming, constant, slope, of_norm_weight, of_norm_bias = (torch.empty(c, **per_plane) for _ in range(5))
    of_scale = None if weights.scale is None else torch.empty(c, **per_plane)
    of_taken = torch.empty((b, c, asked), **per_plane)
    launch.run(
        base_numbers.numbers(), PARTS, 4 * b * c * asked, *small,
        sums, of_each, rstd, weights.norm_weight, keep, incoming, constant, slope, of_norm_weight, of_norm_bias,
        of_scale, of_taken, asked, batch_statistics,
    )  # fmt: skip
    of_keys, pooled = [torch.empty((b, c), **per_plane) for _ in keys], torch.empty((b, c), **per_plane)
    of_kernels = torch.empty((b, 2, k), **per_plane)
    key_later = None if of_key is None else of_key.float().contiguous()
    all_keys = [*(one.contiguous() for one in keys), state.key]
    at_keys, at_key_gradients = addresses(all_keys), addresses([*of_keys, None])
    launch.run(
        base_numbers.score_gradients(), b, 4 * b * c * asked, *small,
        weights.query, weights.key, state.means, state.weights, state.query, at_keys, at_key_gradients, key_later,
        of_taken, pooled, of_kernels, asked, form.softmax,
    )  # fmt: skip

    of_x, of_shortcut = torch.empty_like(x), None if shortcut is None else torch.empty_like(shortcut)
    given = [None if one is None else one.contiguous() for one in (*later, of_value)]
    of_values = [torch.empty_like(one) if of is None else of for one, of in zip(values, given[:-1], strict=True)]
    of_taps, of_tail = torch.empty((b, c, 9), **per_plane), torch.empty((b, c, 2), **per_plane)
    line, (centre, after) = before_the_add(tail), on_the_way_back(tail, c)
    launch.run(
        base.gradients(kind), b * chunks, x.numel() * asked, *header,
        x, shortcut, gradient, of_x, of_shortcut, at_values, addresses([*of_values, None]), state.weights,
        weights.value, *line, centre, after, scale, shift, state.mean, factor, incoming,
        constant, slope, pooled, of_taps, of_tail, form.rectify, addresses(given),
    )  # fmt: skip
    of_taps = of_taps.sum(0).view_as(weights.value)
    of_query, of_own_key = of_kernels.sum(0).view(2, 1, 1, -1).unbind()
    of_all = BaseWeights(of_query, of_own_key, of_taps, of_norm_weight, of_norm_bias, of_scale)
    of_keys = [one.view_as(key) for one, key in zip(of_keys, keys, strict=True)]
    of_norm = norm_gradients(tail, x, of_x, of_tail, header, b * chunks)
    return of_x, of_shortcut, of_keys, of_values, of_all, of_norm
