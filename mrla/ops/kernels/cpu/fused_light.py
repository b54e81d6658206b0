"""MRLA-light by compiled kernels: x + norm(light_update(x, s)) as one operator, with its gradient."""

import torch
from torch import Tensor

from ...calls import LightState, LightWeights, ResidualNorm
from .epilogue import fields_of, rest_of
from .fused_maps import PARTS, as_read, chunks_of, kind_of, norm_gradients, packed


def forward(
    x: Tensor,
    shortcut: Tensor | None,
    weights: LightWeights,
    statistics: tuple[Tensor, Tensor] | None,
    keep: Tensor | None,
    heads: int,
    eps: float,
    *,
    tail: ResidualNorm | None = None,
    in_place: bool = False,
    keep_state: bool = True,
) -> tuple[Tensor, LightState]:
    """The mixer's output and what its gradient needs.

    Args:
        x: The block's output; with `tail` the branch that it is relu(norm(branch) + shortcut) of.
        shortcut: What the block added.
        weights: The mixer's own.
        statistics: The norm's running mean and variance in float32; None for those of this batch.
        keep: DropPath's factor for each image.
        heads: Number of heads.
        eps: The norm's.
        tail: The norm behind the branch.
        in_place: Whether `x` may be overwritten.
        keep_state: Whether there will be a gradient.
    """
    from . import launch, light, light_numbers

    weights = packed(weights)
    eps = float(eps)
    b, c, h, w = x.shape
    kind, k = kind_of(x), weights.query.numel()
    per_plane = {"dtype": torch.float32, "device": x.device}
    means, gates = torch.empty((b, c + k - 1), **per_plane), torch.empty((b, heads), **per_plane)
    chunks = chunks_of(b, heads)
    header = (c, h, w, heads, chunks, rest_of(tail), shortcut is not None, k)
    branch_norm = fields_of(tail)
    if statistics is None:
        moments = torch.empty((b, c, light.MOMENTS), **per_plane)
        mean, variance = torch.empty(c, **per_plane), torch.empty(c, **per_plane)
        small = (b, c, h * w, heads, k, PARTS)
        launch.run(
            light.moments(kind), b * chunks, x.numel(), *header,
            x, shortcut, weights.value, means, moments, *branch_norm,
        )  # fmt: skip
        launch.run(light_numbers.gates(), b, b * c * k, *small, weights.query, weights.key, means, gates)
        launch.run(light_numbers.statistics(), PARTS, 4 * b * c, *small, gates, weights.decay, moments, mean, variance)
    else:
        mean, variance = statistics
        # Backward takes the sums of its planes around these, which without batch statistics may be anything.
        moments = torch.zeros((b, c, light.MOMENTS) if keep_state else 0, **per_plane)
    out = x if in_place and chunks == 1 else torch.empty_like(x)
    launch.run(
        light.apply(kind), b * chunks, x.numel(), *header,
        x, shortcut, out, weights.value, weights.decay, weights.query, weights.key,
        weights.norm_weight, weights.norm_bias, mean, variance, eps, keep, gates, means, statistics is None,
        *branch_norm,
    )  # fmt: skip
    return out, LightState(means, gates, moments, mean, variance)


def backward(
    gradient: Tensor,
    x: Tensor,
    shortcut: Tensor | None,
    weights: LightWeights,
    state: LightState,
    keep: Tensor | None,
    eps: float,
    *,
    batch_statistics: bool,
    tail: ResidualNorm | None = None,
) -> tuple[Tensor, Tensor | None, LightWeights, tuple[Tensor, Tensor] | None]:
    """Gradients of `x`, the shortcut, the weights and, with `tail`, weight and bias of its norm.

    Args:
        gradient: That of the output.
        x: As `forward` had it; with `tail` the branch before its norm.
        shortcut: As `forward` had it.
        weights: Likewise.
        state: What `forward` returned.
        keep: As `forward` had it.
        eps: Likewise.
        batch_statistics: Whether the mixer's norm took those of the batch.
        tail: The norm behind the branch.
    """
    from . import launch, light, light_numbers

    weights = packed(weights)
    eps = float(eps)
    b, c, h, w = x.shape
    kind, heads = kind_of(x), state.gates.shape[1]
    gradient = as_read(gradient)
    chunks = chunks_of(b, heads)
    header = (c, h, w, heads, chunks, rest_of(tail), shortcut is not None, weights.query.numel())
    branch_norm = fields_of(tail)
    per_plane = {"dtype": torch.float32, "device": x.device}
    sums = torch.empty((b, c, light.SUMS), **per_plane)
    launch.run(
        light.sums(kind), b * chunks, x.numel(), *header,
        x, shortcut, gradient, weights.value, state.moments, sums, *branch_norm,
    )  # fmt: skip

    small = (b, c, h * w, heads, weights.query.numel(), PARTS)
    incoming, of_value, pooled = (torch.empty((b, c), **per_plane) for _ in range(3))
    constant, slope, of_norm_weight, of_norm_bias = (torch.empty(c, **per_plane) for _ in range(4))
    of_decay = None if weights.decay is None else torch.empty(c, **per_plane)
    of_kernels = torch.empty((b, 2, weights.query.numel()), **per_plane)
    launch.run(
        light_numbers.numbers(), PARTS, 8 * b * c, *small,
        state.gates, weights.decay, state.moments, sums, state.mean, state.variance, weights.norm_weight, keep,
        incoming, of_value, constant, slope, of_norm_weight, of_norm_bias, of_decay, batch_statistics, eps,
    )  # fmt: skip
    launch.run(
        light_numbers.gate_gradients(), b, 4 * b * c, *small,
        weights.query, weights.key, state.means, state.gates, of_value, pooled, of_kernels,
    )  # fmt: skip

    of_x, of_shortcut = torch.empty_like(x), None if shortcut is None else torch.empty_like(shortcut)
    of_taps, of_tail = torch.empty((b, c, 9), **per_plane), torch.empty((b, c, 2), **per_plane)
    launch.run(
        light.gradients(kind), b * chunks, x.numel(), *header,
        x, shortcut, gradient, of_x, of_shortcut, weights.value, weights.decay,
        constant, slope, state.mean, state.gates, incoming, pooled, of_taps, of_tail, *branch_norm,
    )  # fmt: skip
    of_query, of_key = of_kernels.sum(0).view(2, 1, 1, -1).unbind()
    of_taps = of_taps.sum(0).view_as(weights.value)
    of_weights = LightWeights(of_query, of_key, of_taps, of_decay, of_norm_weight, of_norm_bias)
    of_norm = norm_gradients(tail, x, of_x, of_tail, header, b * chunks)
    return of_x, of_shortcut, of_weights, of_norm
