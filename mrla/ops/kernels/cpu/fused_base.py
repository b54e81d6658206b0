"""MRLA-base by compiled kernels: x + scale * act(norm(base_update(x, memory))) as one operator, with its gradient."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...calls import BaseForm, BaseState, BaseWeights, Letter, ResidualNorm
from .epilogue import fields_of, rest_of
from .fused_maps import PARTS, addresses, as_read, chunks_of, kind_of, norm_gradients, packed


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
    from . import base, base_numbers, launch

    weights = packed(weights)
    form = form._replace(eps=float(form.eps))
    b, c, h, w = x.shape
    kind, asked, k = kind_of(x), len(values) + 1, weights.query.numel()
    per_plane = {"dtype": torch.float32, "device": x.device}
    means = torch.empty((b, c + k - 1), **per_plane)
    by_batch = statistics is None
    keep_value = keep_value or by_batch
    value = torch.empty_like(x) if keep_value else x.new_empty(0)
    key, query = torch.empty((b, c), **per_plane), torch.empty((b, c), **per_plane)
    taken = torch.empty((b, form.heads, asked), **per_plane)
    all_values, all_keys = [*values, value if keep_value else None], [*(one.contiguous() for one in keys), key]
    moments = torch.empty((b, c, base.MOMENTS), **per_plane) if by_batch else None
    norm = (weights.norm_weight, weights.norm_bias, *(statistics or (None, None)), form.eps)
    chunks = chunks_of(b, form.heads)
    header, branch_norm = (c, h, w, form.heads, chunks, rest_of(tail), asked, k), fields_of(tail)
    out = x if in_place and chunks == 1 and not by_batch else torch.empty_like(x)
    launch.run(
        base.apply(kind), b * chunks, x.numel() * asked, *header,
        x, shortcut, out, weights.value, addresses(all_values), addresses(all_keys), query, weights.query, weights.key,
        *norm, weights.scale, keep, taken, means, moments, form.softmax, form.rectify, by_batch, *branch_norm,
    )  # fmt: skip
    if statistics is None:
        assert moments is not None
        statistics = torch.empty(c, **per_plane), torch.empty(c, **per_plane)
        small = (b, c, h * w, form.heads, k, PARTS)
        launch.run(base_numbers.statistics(), PARTS, 2 * b * c, *small, moments, *statistics)
        norm = (weights.norm_weight, weights.norm_bias, *statistics, form.eps)
        launch.run(
            base.finish(kind), b * chunks, x.numel(), *header,
            x, shortcut, out, *norm, weights.scale, keep, form.rectify, *branch_norm,
        )  # fmt: skip
    return out, BaseState(value, key, query, taken, means, *statistics)


def backward(
    gradient: Tensor,
    of_key: Tensor | None,
    of_value: Tensor | None,
    mail: Sequence[Letter],
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
    wanted: Sequence[bool],
    of_update: Tensor | None = None,
    tail: ResidualNorm | None = None,
) -> tuple[Tensor, Tensor | None, list[Tensor], list[Tensor | None], BaseWeights, tuple[Tensor, Tensor] | None]:
    """Gradients of `x`, the shortcut, earlier keys and values, the weights and, with `tail`, its norm's two.

    Args:
        gradient: That of the output.
        of_key: That of the block's key, from later blocks.
        of_value: That of its value, from whoever sends no letter.
        mail: The letters of later blocks.
        x: As `forward` had it; with `tail` the branch before its norm.
        shortcut: As `forward` had it.
        keys: Likewise.
        values: Likewise.
        weights: Likewise.
        state: What `forward` returned.
        keep: As `forward` had it.
        form: Likewise.
        batch_statistics: Whether the mixer's norm took those of the batch.
        wanted: For which earlier values a gradient is to be made here; the others get a letter.
        of_update: Where the gradient of y goes for letters; the place of the block's own value may be given.
        tail: The norm behind the branch.
    """
    from . import base, base_numbers, launch

    weights = packed(weights)
    form = form._replace(eps=float(form.eps))
    b, c, h, w = x.shape
    kind, asked = kind_of(x), len(values) + 1
    gradient = as_read(gradient)
    chunks = chunks_of(b, form.heads)
    header = (c, h, w, form.heads, chunks, rest_of(tail), asked, weights.query.numel())
    norm = (weights.norm_weight, weights.norm_bias, state.mean, state.variance, form.eps)
    per_plane = {"dtype": torch.float32, "device": x.device}
    sums = torch.empty((b, c, base.SUMS), **per_plane)
    of_each = torch.empty((b, c, asked, base.VALUE_SUMS), **per_plane)
    of_x = torch.empty_like(x)  # y until its place is needed for the gradient
    launch.run(
        base.sums(kind), b * chunks, x.numel() * asked, *header,
        addresses([*values, state.value]), gradient, state.weights, *norm, weights.scale, keep, sums, of_each, of_x,
        form.rectify,
    )  # fmt: skip

    k = weights.query.numel()
    small = (b, c, h * w, form.heads, k, PARTS)
    incoming, constant, slope, of_norm_weight, of_norm_bias = (torch.empty(c, **per_plane) for _ in range(5))
    of_scale = None if weights.scale is None else torch.empty(c, **per_plane)
    of_taken = torch.empty((b, c, asked), **per_plane)
    launch.run(
        base_numbers.numbers(), PARTS, 4 * b * c * asked, *small,
        sums, of_each, state.variance, weights.norm_weight, keep, incoming, constant, slope, of_norm_weight,
        of_norm_bias, of_scale, of_taken, asked, batch_statistics, form.eps,
    )  # fmt: skip
    of_keys, pooled = [torch.empty((b, c), **per_plane) for _ in keys], torch.empty((b, c), **per_plane)
    of_kernels = torch.empty((b, 2, k), **per_plane)
    key_later = None if of_key is None else as_read(of_key.float())
    all_keys = [*(one.contiguous() for one in keys), state.key]
    at_keys, at_key_gradients = addresses(all_keys), addresses([*of_keys, None])
    launch.run(
        base_numbers.score_gradients(), b, 4 * b * c * asked, *small,
        weights.query, weights.key, state.means, state.weights, state.query, at_keys, at_key_gradients, key_later,
        of_taken, pooled, of_kernels, asked, form.softmax,
    )  # fmt: skip

    of_shortcut = None if shortcut is None else torch.empty_like(shortcut)
    of_values = [torch.empty_like(one) if there else None for one, there in zip(values, wanted, strict=True)]
    of_value = None if of_value is None else as_read(of_value)
    of_taps, of_tail = torch.empty((b, c, 9), **per_plane), torch.empty((b, c, 2), **per_plane)
    rows = [(one.of_update.data_ptr(), one.taken.data_ptr(), one.taken.shape[2], one.block) for one in mail]
    letters = torch.tensor(rows, dtype=torch.int64, device="cpu")
    launch.run(
        base.gradients(kind), b * chunks, x.numel() * (2 + len(mail)), *header,
        x, shortcut, gradient, of_x, of_shortcut, addresses([*of_values, None]), state.weights, weights.value, *norm,
        incoming, constant, slope, pooled, of_taps, of_tail, form.rectify, of_value, of_update, letters, len(mail),
        *fields_of(tail), weights.scale, keep,
    )  # fmt: skip
    of_taps = of_taps.sum(0).view_as(weights.value)
    of_query, of_own_key = of_kernels.sum(0).view(2, 1, 1, -1).unbind()
    of_all = BaseWeights(of_query, of_own_key, of_taps, of_norm_weight, of_norm_bias, of_scale)
    of_keys = [one.view_as(key) for one, key in zip(of_keys, keys, strict=True)]
    of_norm = norm_gradients(tail, x, of_x, of_tail, header, b * chunks)
    return of_x, of_shortcut, of_keys, of_values, of_all, of_norm
