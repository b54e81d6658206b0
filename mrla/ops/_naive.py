"""MRLA-light in plain loops: the oracle that the fast operators are held against. Never exported, never optimised."""

import math

import torch
from torch import Tensor


def naive_light_update(
    x: Tensor,
    carried: Tensor | None,
    query_weight: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    decay: Tensor | None,
    heads: int,
) -> Tensor:
    """o_t of `mrla.ops.light_update`, entry by entry; arguments as there."""
    batch, channels, height, width = x.shape
    head_dim = channels // heads
    out = torch.zeros_like(x)
    for b in range(batch):
        pooled = [x[b, c].sum() / (height * width) for c in range(channels)]
        query = _slide(pooled, query_weight[0, 0])
        key = _slide(pooled, key_weight[0, 0])
        for c in range(channels):
            head = range(c // head_dim * head_dim, (c // head_dim + 1) * head_dim)
            score = sum(query[i] * key[i] for i in head) / math.sqrt(head_dim)
            gate = 1 / (1 + torch.exp(-torch.as_tensor(score)))
            for i in range(height):
                for j in range(width):
                    out[b, c, i, j] = gate * _stencil(x[b, c], value_weight[c, 0], i, j)
                    if carried is not None and decay is not None:
                        out[b, c, i, j] += decay[c] * carried[b, c, i, j]
    return out


def _slide(signal: list[Tensor], kernel: Tensor) -> list[Tensor]:
    reach = len(kernel) // 2
    return [
        sum(
            (kernel[k] * signal[c + k - reach] for k in range(len(kernel)) if 0 <= c + k - reach < len(signal)),
            start=torch.zeros_like(signal[0]),
        )
        for c in range(len(signal))
    ]


def _stencil(image: Tensor, kernel: Tensor, i: int, j: int) -> Tensor:
    height, width = image.shape
    total = torch.zeros_like(image[0, 0])
    for di in (-1, 0, 1):
        for dj in (-1, 0, 1):
            if 0 <= i + di < height and 0 <= j + dj < width:
                total = total + kernel[di + 1, dj + 1] * image[i + di, j + dj]
    return total
