"""The kernels that make query, key and value of a block's output: their shapes and their starts."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..heads import channel_kernel_size
from .contract import Init


def projection_kernels(channels: int, **factory: Any) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter]:
    """Room for a query's, a key's and a value's kernel."""
    along, depthwise = (1, 1, channel_kernel_size(channels)), (channels, 1, 3, 3)
    query, key, value = (nn.Parameter(torch.empty(shape, **factory)) for shape in (along, along, depthwise))
    return query, key, value


def reset_projection_kernels(mixer: Any, init: Init) -> None:
    """Draws the three kernels of a mixer."""
    reset_channel_kernel(mixer.query_weight, init)
    reset_channel_kernel(mixer.key_weight, init)
    reset_depthwise_kernel(mixer.value_weight)


def width_text(mixer: Any) -> str:
    """Channels and heads of a mixer, as its `repr` shows them."""
    return f"{mixer.channels}, heads={mixer.heads}, head_dim={mixer.channels // mixer.heads}"


@torch.no_grad()
def reset_channel_kernel(weight: Tensor, init: Init) -> None:
    """Draws a query's or key's kernel: the notebook's normal, else torch's default for Conv1d."""
    bound = 1 / math.sqrt(weight.shape[-1])
    if init == "notebook":
        weight.normal_(std=math.sqrt(2) * bound)
    else:
        weight.uniform_(-bound, bound)


@torch.no_grad()
def reset_depthwise_kernel(weight: Tensor) -> None:
    """Draws a value's kernel: Kaiming fan-out that does not divide by groups, in the authors' code and the notebook."""
    weight.normal_(std=math.sqrt(2 / (weight.shape[0] * weight.shape[2] * weight.shape[3])))
