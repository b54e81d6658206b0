"""Queries, keys and values: what each block makes of its own output."""

from contextlib import nullcontext
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import conv1d, conv2d, gelu, relu

Activation = Literal["gelu", "relu"]
ACTIVATIONS = {"gelu": gelu, "relu": relu}


def pool(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c"]:
    r"""The mean over space, :math:`y_t = \mathrm{mean}_{hw}\, x_t`, in float32 where x has less.

    Args:
        x: A block's output.

    Returns:
        One number per image and channel, in float32 or, for float64, float64.

    Example:
        >>> pool(torch.full((1, 2, 3, 3), 60000.0, dtype=torch.float16)).tolist()
        [[60000.0, 60000.0]]
    """
    return x.mean(dim=(2, 3), dtype=torch.promote_types(x.dtype, torch.float32))


@torch.compiler.assume_constant_result
def _autocast_available(device: str) -> bool:
    # Dynamo of torch 2.11 and older does not follow this builtin; it never changes.
    return torch.amp.is_autocast_available(device)


def slide(pooled: Float[Tensor, "n c"], *kernels: Float[Tensor, "1 1 k"]) -> tuple[Float[Tensor, "n c"], ...]:
    r"""Queries or keys of pooled channels: each kernel slides along them, with zero padding.

    .. math:: q_t = \mathrm{conv1d}(y_t; w_q), \qquad k_t = \mathrm{conv1d}(y_t; w_k)

    arXiv:2302.03985, section 3.3; the channel convolution is ECA's (arXiv:1910.03151).

    Args:
        pooled: One number per image and channel.
        kernels: Kernels of the same odd size.

    Returns:
        One result for each kernel, in the dtype of `pooled`, under autocast too: a sum of products of queries and keys
        in float16 overflows soon.

    Example:
        >>> one_tap = torch.tensor([[[0.0, 0.0, 1.0]]])
        >>> slide(torch.tensor([[1.0, 2.0, 3.0]]), one_tap)[0].tolist()  # the right neighbour
        [[2.0, 3.0, 0.0]]
    """
    device = pooled.device.type
    lowered = _autocast_available(device) and torch.is_autocast_enabled(device)
    with torch.autocast(device, enabled=False) if lowered else nullcontext():
        weight = torch.cat(kernels).to(pooled.dtype)
        # A tuple: torch.jit.trace of torch 2.9 takes a traced size for a list without elements.
        return conv1d(pooled.unsqueeze(1), weight, padding=(weight.shape[-1] // 2,)).unbind(1)


def depthwise_value(
    x: Float[Tensor, "b c h w"], value_weight: Float[Tensor, "c 1 3 3"], value_act: Activation | None = None
) -> Float[Tensor, "b c h w"]:
    r"""A block's value, :math:`v_t = \mathrm{act}(\mathrm{DWConv}_{3 \times 3}(x_t))`, with zero padding and no bias.

    Args:
        x: The block's output.
        value_weight: One 3x3 kernel per channel.
        value_act: Activation on the value: ``"gelu"`` (exact, as the released DeiT-light), ``"relu"`` or none.

    Returns:
        v_t, in the shape of `x`.

    Example:
        >>> depthwise_value(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 3, 3)).flatten().tolist()
        [4.0, 4.0, 4.0, 4.0]
    """
    value = conv2d(x, value_weight, padding=1, groups=x.shape[1])
    return ACTIVATIONS[value_act](value) if value_act is not None else value


def per_channel(per_head: Float[Tensor, "b g"], channels: int) -> Float[Tensor, "b c 1 1"]:
    """One number per head, repeated for the d channels of each and ready to multiply a map."""
    # The explicit count keeps the graph free of data-dependent shapes.
    return per_head.repeat_interleave(channels // per_head.shape[1], dim=1)[:, :, None, None]
