"""Every method in plain loops: the oracle that the fast operators are held against. Never exported, never optimised."""

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
    value_act: str | None = None,
) -> Tensor:
    """o_t of `mrla.ops.light_update`, entry by entry; arguments as there."""
    out = torch.zeros_like(x)
    for b, c, i, j in _entries(x):
        query = _slide(_pooled(x[b]), query_weight[0, 0])
        key = _slide(_pooled(x[b]), key_weight[0, 0])
        gate = 1 / (1 + torch.exp(-_score(query, key, c, heads)))
        out[b, c, i, j] = gate * _value(x[b, c], value_weight[c, 0], i, j, value_act)
        if carried is not None and decay is not None:
            out[b, c, i, j] += decay[c] * carried[b, c, i, j]
    return out


def naive_base_updates(
    xs: list[Tensor],
    query_weights: list[Tensor],
    key_weights: list[Tensor],
    value_weights: list[Tensor],
    heads: int,
    weighting: str = "softmax",
    value_act: str | None = None,
    last: int | None = None,
) -> list[Tensor]:
    """o_1 to o_T of `mrla.ops.base_update` over a chain of outputs: block s's own kernels make its key and value."""
    return [
        _attend(
            xs[: t + 1],
            query_weights[t],
            key_weights[: t + 1],
            value_weights[: t + 1],
            heads,
            weighting,
            value_act,
            last,
        )
        for t in range(len(xs))
    ]


def naive_exact_updates(
    xs: list[Tensor],
    query_weights: list[Tensor],
    key_weights: list[Tensor],
    value_weights: list[Tensor],
    heads: int,
    weighting: str = "softmax",
    value_act: str | None = None,
    last: int | None = None,
) -> list[Tensor]:
    """o_1 to o_T of `mrla.ops.exact_update` over a chain of outputs: block t's kernels make all keys and values."""
    return [
        _attend(
            xs[: t + 1], query_weights[t], [key_weights[t]] * (t + 1), [value_weights[t]] * (t + 1), heads, weighting,
            value_act, last,
        )
        for t in range(len(xs))
    ]  # fmt: skip


def _attend(
    xs: list[Tensor],
    query_weight: Tensor,
    key_weights: list[Tensor],
    value_weights: list[Tensor],
    heads: int,
    weighting: str,
    value_act: str | None,
    last: int | None,
) -> Tensor:
    """What the last of `xs` takes from all of them, entry by entry."""
    out = torch.zeros_like(xs[-1])
    asked = range(max(0, len(xs) - last) if last else 0, len(xs))
    for b, c, i, j in _entries(out):
        query = _slide(_pooled(xs[-1][b]), query_weight[0, 0])
        scores = [_score(query, _slide(_pooled(xs[s][b]), key_weights[s][0, 0]), c, heads) for s in asked]
        if weighting == "softmax":
            total = sum(torch.exp(score) for score in scores)
            weights = [torch.exp(score) / total for score in scores]
        else:
            weights = [1 / (1 + torch.exp(-score)) for score in scores]
        for weight, s in zip(weights, asked, strict=True):
            out[b, c, i, j] += weight * _value(xs[s][b, c], value_weights[s][c, 0], i, j, value_act)
    return out


def _entries(x: Tensor) -> list[tuple[int, int, int, int]]:
    batch, channels, height, width = x.shape
    return [(b, c, i, j) for b in range(batch) for c in range(channels) for i in range(height) for j in range(width)]


def _pooled(image: Tensor) -> list[Tensor]:
    return [image[c].sum() / (image.shape[1] * image.shape[2]) for c in range(len(image))]


def _score(query: list[Tensor], key: list[Tensor], c: int, heads: int) -> Tensor:
    """q.k / sqrt(d) of the head that channel c is in."""
    head_dim = len(query) // heads
    head = range(c // head_dim * head_dim, (c // head_dim + 1) * head_dim)
    return torch.stack([query[i] * key[i] for i in head]).sum() / math.sqrt(head_dim)


def _slide(signal: list[Tensor], kernel: Tensor) -> list[Tensor]:
    reach = len(kernel) // 2
    return [
        sum(
            (kernel[k] * signal[c + k - reach] for k in range(len(kernel)) if 0 <= c + k - reach < len(signal)),
            start=torch.zeros_like(signal[0]),
        )
        for c in range(len(signal))
    ]


def _value(image: Tensor, kernel: Tensor, i: int, j: int, value_act: str | None) -> Tensor:
    """Entry (i, j) of the 3x3 convolution of one channel with zero padding, then the activation."""
    height, width = image.shape
    total = torch.zeros_like(image[0, 0])
    for di in (-1, 0, 1):
        for dj in (-1, 0, 1):
            if 0 <= i + di < height and 0 <= j + dj < width:
                total = total + kernel[di + 1, dj + 1] * image[i + di, j + dj]
    if value_act == "gelu":
        return total * (1 + torch.erf(total / math.sqrt(2))) / 2
    return total.clamp(min=0) if value_act == "relu" else total
