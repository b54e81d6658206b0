"""MRLA-light by compiled kernels: x + norm(light_update(x, s)) as one operator, with its gradient."""

from typing import NamedTuple

import torch
from torch import Tensor

from ._block_tail import ResidualNorm
from ._fused_maps import chunks_of, kernel_gradients, kind_of, norm_gradients, norm_of_branch, packed, tail_numbers
from ._light import gate_of_means
from ._projections import slide


class LightWeights(NamedTuple):
    """What MRLA-light and the BatchNorm behind it own, in float32."""

    query: Tensor
    key: Tensor
    value: Tensor
    decay: Tensor | None
    norm_weight: Tensor
    norm_bias: Tensor


class LightState(NamedTuple):
    """What the gradient needs beside the maps: some numbers for each plane, and the norm's mean and variance."""

    means: Tensor
    gates: Tensor
    moments: Tensor
    mean: Tensor
    variance: Tensor


def forward(
    x: Tensor,
    shortcut: Tensor | None,
    weights: LightWeights,
    statistics: tuple[Tensor, Tensor] | None,
    keep: Tensor | None,
    heads: int,
    eps: float,
    *,
    tail: bool = False,
    in_place: bool = False,
) -> tuple[Tensor, LightState]:
    """The mixer's output and what its gradient needs.

    Args:
        x: The block's output; with `tail` what relu(. + shortcut) makes it of.
        shortcut: What the block added.
        weights: The mixer's own.
        statistics: The norm's running mean and variance in float32; None for those of this batch.
        keep: DropPath's factor for each image.
        heads: Number of heads.
        eps: The norm's.
        tail: See `x`.
        in_place: Whether `x` may be overwritten.
    """
    from ._kernels import launch, light

    weights = packed(weights)
    b, c, h, w = x.shape
    kind = kind_of(x)
    per_plane = torch.float32
    reach = weights.query.shape[-1] // 2
    around = x.new_zeros((b, c + 2 * reach), dtype=per_plane)  # the means, with zeros on both sides
    means, gates = around[:, reach : reach + c], x.new_empty((b, heads), dtype=per_plane)
    moments = x.new_empty((b, c, light.MOMENTS), dtype=per_plane)
    chunks = chunks_of(b, heads)
    header = (c, h, w, heads, chunks, tail, shortcut is not None, weights.query.numel())
    if statistics is None:
        means = x.new_empty((b, c), dtype=per_plane)
        launch.run(light.moments(kind), b * chunks, x.numel(), *header, x, shortcut, weights.value, means, moments)
        gates = gate_of_means(means, weights.query, weights.key, heads)
        mean, variance = _statistics(_Planes(gates, weights.decay, moments), h * w)
    else:
        mean, variance = statistics
        moments.zero_()
    scale, shift = norm_of_branch(mean, variance, weights.norm_weight, weights.norm_bias, eps)
    out = x if in_place and chunks == 1 else torch.empty_like(x)
    launch.run(
        light.apply(kind), b * chunks, x.numel(), *header,
        x, shortcut, out, weights.value, weights.decay, weights.query, weights.key, scale, shift, keep, gates, around,
        statistics is None,
    )  # fmt: skip
    return out, LightState(means.contiguous(), gates, moments, mean, variance)


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
    from ._kernels import launch, light

    weights = packed(weights)
    b, c, h, w = x.shape
    kind, heads, count = kind_of(x), state.gates.shape[1], b * h * w
    gradient = gradient.contiguous()
    chunks = chunks_of(b, heads)
    header = (c, h, w, heads, chunks, tail is not None, shortcut is not None, weights.query.numel())
    per_plane = {"dtype": torch.float32, "device": x.device}
    alpha, beta, centre, after = tail_numbers(tail, c)
    sums = torch.empty((b, c, light.SUMS), **per_plane)
    launch.run(
        light.sums(kind), b * chunks, x.numel(), *header,
        x, shortcut, gradient, weights.value, alpha, beta, state.moments, sums,
    )  # fmt: skip

    # From here to the maps again: numbers for each plane, in float64, since what is left after subtraction counts.
    planes = _Planes(state.gates, weights.decay, state.moments)
    of_g, of_gv, of_gs = sums.double().unbind(-1)
    kept = 1.0 if keep is None else keep.double()[:, None]
    mean, norm_weight = state.mean.double(), weights.norm_weight.double()
    rstd = (state.variance.double() + eps).rsqrt()
    off_centre = planes.mean - mean
    of_norm_bias = (kept * of_g).sum(0)
    of_norm_weight = rstd * (kept * (planes.gate * of_gv + planes.decay * of_gs + off_centre * of_g)).sum(0)
    incoming = norm_weight * rstd * kept * torch.ones_like(of_g)
    constant = norm_weight * rstd * of_norm_bias / count * batch_statistics
    slope = norm_weight * rstd.square() * of_norm_weight / count * batch_statistics
    of_update = incoming * of_g - h * w * (constant + slope * off_centre)
    of_value = incoming * of_gv - slope * (planes.gate * planes.vv + planes.decay * planes.vs) + planes.v * of_update
    of_gate = of_value.unflatten(1, (heads, -1)).sum(-1)
    of_decay = None
    if weights.decay is not None:
        of_short = incoming * of_gs - slope * (planes.gate * planes.vs + planes.decay * planes.ss)
        of_decay = (of_short + planes.s * of_update).sum(0).to(weights.decay.dtype)
    of_means, of_query, of_key = _behind_gates(of_gate.float(), state, weights)

    of_x, of_shortcut = torch.empty_like(x), None if shortcut is None else torch.empty_like(shortcut)
    of_taps, of_tail = torch.empty((b, c, 9), **per_plane), torch.empty((b, c, 2), **per_plane)
    launch.run(
        light.gradients(kind), b * chunks, x.numel(), *header,
        x, shortcut, gradient, of_x, of_shortcut, weights.value, weights.decay, alpha, beta, centre, after,
        constant.float(), slope.float(), state.mean, state.gates, incoming.float(), of_means / (h * w),
        of_taps, of_tail,
    )  # fmt: skip
    of_weights = LightWeights(
        of_query,
        of_key,
        of_taps.sum(0).view_as(weights.value),
        of_decay,
        of_norm_weight.float(),
        of_norm_bias.float(),
    )
    of_norm = norm_gradients(tail, x, of_x, of_tail, header, b * chunks)
    return of_x, of_shortcut, of_weights, of_norm


class _Planes:
    """The moments of v and s, plane by plane (b, c), and what they say of y = gate * v + lambda * s."""

    def __init__(self, gates: Tensor, decay: Tensor | None, moments: Tensor):
        self.v, self.s, self.vv, self.vs, self.ss = moments.double().unbind(-1)
        self.gate = gates.double().repeat_interleave(moments.shape[1] // gates.shape[1], dim=1)
        self.decay = torch.zeros_like(self.v[0]) if decay is None else decay.double()
        self.mean = self.gate * self.v + self.decay * self.s


def _statistics(planes: _Planes, pixels: int) -> tuple[Tensor, Tensor]:
    """Mean and (biased) variance of y over batch and space."""
    gate, decay = planes.gate, planes.decay
    within = gate.square() * planes.vv + 2 * gate * decay * planes.vs + decay.square() * planes.ss
    mean = planes.mean.mean(0)
    squares = (within + pixels * (planes.mean - mean).square()).sum(0)
    return mean.float(), (squares / (pixels * len(gate))).clamp(min=0).float()


def _behind_gates(gradient: Tensor, state: LightState, weights: LightWeights) -> tuple[Tensor, ...]:
    """Gradients of the means, the query's and the key's kernel, from that of the gates."""
    query, key = slide(state.means, weights.query, weights.key)
    head_dim = query.shape[1] // state.gates.shape[1]
    scores = gradient * state.gates * (1 - state.gates) * head_dim**-0.5
    of_product = scores.repeat_interleave(head_dim, dim=1)
    of_slid = torch.stack((of_product * key, of_product * query), dim=1)
    return kernel_gradients(of_slid, state.means, weights.query, weights.key)
