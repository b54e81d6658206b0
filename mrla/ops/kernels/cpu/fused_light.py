"""MRLA-light by compiled kernels: x + norm(light_update(x, s)) as one operator, with its gradient."""

import torch
from torch import Tensor

from ...calls import LightState, LightWeights, ResidualNorm
from .fused_maps import (
    PARTS,
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
    weights: LightWeights,
    statistics: tuple[Tensor, Tensor] | None,
    drop_scale: Tensor | None,
    heads: int,
    eps: float,
    *,
    branch_norm: ResidualNorm | None = None,
    in_place: bool = False,
    keep_state: bool = True,
) -> tuple[Tensor, LightState]:
    """The mixer's output and what its gradient needs.

    Arguments are those of `mrla.ops.Backend.light_forward`.
    """
    from . import launch, light, light_numbers

    weights = packed(weights)
    b, c, _, _ = x.shape
    kind, k = kind_of(x), weights.query.numel()
    per_plane = {"dtype": torch.float32, "device": x.device}
    means, gates = torch.empty((b, c + k - 1), **per_plane), torch.empty((b, heads), **per_plane)
    chunks = chunks_of(b, heads)
    images, numbers = image_fields(x, heads, chunks, k), plane_number_fields(x, heads, k)
    epilogue = epilogue_fields(branch_norm)
    if statistics is None:
        moments = torch.empty((b, c, len(light.MOMENTS)), **per_plane)
        mean, variance = torch.empty(c, **per_plane), torch.empty(c, **per_plane)
        launch.run(
            light.moments(kind),
            items=b * chunks,
            work=x.numel(),
            **images,
            **epilogue,
            x=x,
            shortcut=shortcut,
            taps=weights.value,
            means=means,
            moments=moments,
        )
        launch.run(
            light_numbers.gates(),
            items=b,
            work=b * c * k,
            **numbers,
            query=weights.query,
            key=weights.key,
            means=means,
            gates=gates,
        )
        launch.run(
            light_numbers.statistics(),
            items=PARTS,
            work=4 * b * c,
            **numbers,
            gates=gates,
            decay=weights.decay,
            moments=moments,
            mean=mean,
            variance=variance,
        )
    else:
        mean, variance = statistics
        # Backward takes the sums of its planes around these, which without batch statistics may be anything.
        moments = torch.zeros((b, c, len(light.MOMENTS)) if keep_state else 0, **per_plane)
    out = x if in_place and chunks == 1 else torch.empty_like(x)
    launch.run(
        light.apply(kind),
        items=b * chunks,
        work=x.numel(),
        **images,
        **epilogue,
        **update_norm_fields(weights.norm_weight, weights.norm_bias, (mean, variance), eps),
        gates_known=statistics is None,
        x=x,
        shortcut=shortcut,
        out=out,
        taps=weights.value,
        decay=weights.decay,
        query=weights.query,
        key=weights.key,
        drop_scale=drop_scale,
        gates=gates,
        means=means,
    )
    return out, LightState(means, gates, moments, mean, variance)


def backward(
    gradient: Tensor,
    x: Tensor,
    shortcut: Tensor | None,
    weights: LightWeights,
    state: LightState,
    drop_scale: Tensor | None,
    eps: float,
    *,
    batch_statistics: bool,
    branch_norm: ResidualNorm | None = None,
) -> tuple[Tensor, Tensor | None, LightWeights, tuple[Tensor, Tensor] | None]:
    """Gradients of `x`, the shortcut, the weights and, with `branch_norm`, weight and bias of its norm.

    Arguments are those of `mrla.ops.Backend.light_backward`.
    """
    from . import launch, light, light_numbers

    weights = packed(weights)
    b, c, _, _ = x.shape
    kind, heads, k = kind_of(x), state.gates.shape[1], weights.query.numel()
    gradient = as_read(gradient)
    chunks = chunks_of(b, heads)
    images, numbers = image_fields(x, heads, chunks, k), plane_number_fields(x, heads, k)
    epilogue = epilogue_fields(branch_norm)
    per_plane = {"dtype": torch.float32, "device": x.device}
    sums = torch.empty((b, c, len(light.SUMS)), **per_plane)
    launch.run(
        light.sums(kind),
        items=b * chunks,
        work=x.numel(),
        **images,
        **epilogue,
        x=x,
        shortcut=shortcut,
        grad_out=gradient,
        taps=weights.value,
        moments=state.moments,
        sums=sums,
    )

    incoming, gate_grads, pooled = (torch.empty((b, c), **per_plane) for _ in range(3))
    constant, slope, grad_norm_weight, grad_norm_bias = (torch.empty(c, **per_plane) for _ in range(4))
    grad_decay = None if weights.decay is None else torch.empty(c, **per_plane)
    grad_kernels = torch.empty((b, 2, k), **per_plane)
    launch.run(
        light_numbers.numbers(),
        items=PARTS,
        work=8 * b * c,
        **numbers,
        by_batch=batch_statistics,
        norm_eps=eps,
        gates=state.gates,
        decay=weights.decay,
        moments=state.moments,
        sums=sums,
        mean=state.mean,
        variance=state.variance,
        norm_weight=weights.norm_weight,
        drop_scale=drop_scale,
        incoming=incoming,
        gate_grads=gate_grads,
        constant=constant,
        slope=slope,
        grad_weight=grad_norm_weight,
        grad_bias=grad_norm_bias,
        grad_decay=grad_decay,
    )
    launch.run(
        light_numbers.gate_gradients(),
        items=b,
        work=4 * b * c,
        **numbers,
        query=weights.query,
        key=weights.key,
        means=state.means,
        gates=state.gates,
        gate_grads=gate_grads,
        pooled=pooled,
        grad_kernels=grad_kernels,
    )

    grad_x, grad_shortcut = torch.empty_like(x), None if shortcut is None else torch.empty_like(shortcut)
    grad_taps, branch_sums = torch.empty((b, c, 9), **per_plane), torch.empty((b, c, 2), **per_plane)
    launch.run(
        light.gradients(kind),
        items=b * chunks,
        work=x.numel(),
        **images,
        **epilogue,
        x=x,
        shortcut=shortcut,
        grad_out=gradient,
        grad_x=grad_x,
        grad_shortcut=grad_shortcut,
        taps=weights.value,
        decay=weights.decay,
        constant=constant,
        slope=slope,
        mean=state.mean,
        gates=state.gates,
        incoming=incoming,
        pooled=pooled,
        grad_taps=grad_taps,
        branch_sums=branch_sums,
    )
    grad_query, grad_key = grad_kernels.sum(0).view(2, 1, 1, -1).unbind()
    grad_taps = grad_taps.sum(0).view_as(weights.value)
    grad_weights = LightWeights(grad_query, grad_key, grad_taps, grad_decay, grad_norm_weight, grad_norm_bias)
    grad_norm = norm_gradients(branch_norm, x, grad_x, branch_sums, images, b * chunks)
    return grad_x, grad_shortcut, grad_weights, grad_norm
