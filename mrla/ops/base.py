"""MRLA-base: a block's query attends to the keys and values that every block so far has made once."""

from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from .checks import check_kernels, check_like, check_map, check_pairs, check_window
from .projections import Activation, depthwise_value, per_channel, pool, slide

Weighting = Literal["softmax", "sigmoid"]
MemoryT = TypeVar("MemoryT", bound=tuple)


class LayerMemory(NamedTuple):
    """Keys (b, g, d) and values (b, c, h, w) of the blocks so far, the oldest first, each as its block made it."""

    keys: tuple[Tensor, ...] = ()
    values: tuple[Tensor, ...] = ()


def layer_weights(
    query: Float[Tensor, "b g d"], keys: Sequence[Float[Tensor, "b g d"]], weighting: Weighting = "softmax"
) -> Float[Tensor, "b t g"]:
    r"""How much each head of a block takes from each block so far.

    .. math:: \mathrm{softmax}_s(q_t \cdot k_s / \sqrt d) \quad\text{or}\quad \sigma(q_t \cdot k_s / \sqrt d)

    arXiv:2302.03985, eqs. 4 and 6.

    Args:
        query: q_t.
        keys: k_s of the t blocks so far, the block's own last.
        weighting: ``"softmax"`` over the blocks, or ``"sigmoid"`` for each alone.

    Returns:
        One weight per image, block and head.

    Example:
        >>> query = torch.zeros(1, 2, 3)
        >>> layer_weights(query, [query, query]).tolist()
        [[[0.5, 0.5], [0.5, 0.5]]]
    """
    scores = (query.unsqueeze(1) * torch.stack(tuple(keys), dim=1)).sum(-1) * query.shape[-1] ** -0.5
    return scores.softmax(dim=1) if weighting == "softmax" else scores.sigmoid()


def weighted_sum(weights: Float[Tensor, "b t g"], maps: Sequence[Float[Tensor, "b c h w"]]) -> Float[Tensor, "b c h w"]:
    r"""The sum :math:`\sum_s a_s x_s` of t maps, each head with weights of its own.

    Each map is read where it lies: nothing is stacked, so the cost is one pass over each and what is kept for backward
    is the maps themselves.

    Args:
        weights: a_s per image, map and head.
        maps: The t maps.

    Returns:
        The sum, in the maps' dtype; taken in float32 where they have less.

    Example:
        >>> one = torch.ones(1, 2, 1, 1)
        >>> weighted_sum(torch.tensor([[[1.0], [10.0]]]), [one, 2 * one]).flatten().tolist()
        [21.0, 21.0]
    """
    channels = maps[0].shape[1]
    first, *others = (per_channel(weight, channels) for weight in weights.unbind(1))
    total = first * maps[0]
    for weight, other in zip(others, maps[1:], strict=True):
        # Mixed on purpose: a float32 copy of a lower map would be kept for backward, one more in every block.
        total = torch.addcmul(total, weight, other)
    return total.to(maps[-1].dtype)


def base_update(
    x: Float[Tensor, "b c h w"],
    memory: LayerMemory | None,
    query_weight: Float[Tensor, "1 1 k"],
    key_weight: Float[Tensor, "1 1 k"],
    value_weight: Float[Tensor, "c 1 3 3"],
    heads: int,
    weighting: Weighting = "softmax",
    value_act: Activation | None = None,
    last: int | None = None,
) -> tuple[Float[Tensor, "b c h w"], LayerMemory]:
    r"""What MRLA-base adds to a block's output, before its norm.

    .. math:: o_t = \sum_{s \le t} \mathrm{softmax}_s(q_t \cdot k_s / \sqrt d)\, v_s

    arXiv:2302.03985, eq. 6. Every block makes its key and its value once; the memory hands them on as they are. The
    released code concatenates all of them again in every block; here block t reads t values and copies none.

    Args:
        x: The block's output x_t.
        memory: Keys and values of the blocks before, None at the head of a chain.
        query_weight: Kernel of the query along channels, of odd size k.
        key_weight: Kernel of the key along channels, of the same size.
        value_weight: Depthwise kernel of the value.
        heads: Number of heads g; divides c.
        weighting: ``"softmax"`` over the blocks, or ``"sigmoid"`` for each alone.
        value_act: Activation on the value, see `depthwise_value`.
        last: Ask the last so many blocks only, this one counted; it bounds the memory. None for all.

    Returns:
        o_t in the shape of `x`, and the memory for the next block.

    Raises:
        ValueError: If the shapes do not fit one another, the memory's included, or `last` is not positive.

    Example:
        >>> x, tap = torch.randn(1, 4, 2, 2), torch.zeros(1, 1, 3)
        >>> centre = torch.zeros(4, 1, 3, 3); centre[:, :, 1, 1] = 1
        >>> first, memory = base_update(x, None, tap, tap, centre, heads=2)
        >>> second, memory = base_update(3 * x, memory, tap, tap, centre, heads=2)  # equal keys give the mean
        >>> torch.equal(first, x), torch.allclose(second, 2 * x), len(memory.values)
        (True, True, 2)
    """
    check_map(x)
    check_kernels(x.shape[1], query_weight, key_weight, value_weight, heads)
    before = attended_memory(x, memory, heads, last)
    query, key = (one.unflatten(1, (heads, -1)) for one in slide(pool(x), query_weight, key_weight))
    now = LayerMemory(keys=(*before.keys, key), values=(*before.values, depthwise_value(x, value_weight, value_act)))
    update = weighted_sum(layer_weights(query, now.keys, weighting), now.values)
    return update, recent(now, last)


def attended_memory(x: Tensor, memory: LayerMemory | None, heads: int, last: int | None) -> LayerMemory:
    """The part of the memory that block t attends to, which must be of maps like `x`."""
    check_window(last)
    before = recent(memory or LayerMemory(), last)
    check_pairs("keys and values", before)
    check_like("every value of the memory", before.values, x)
    shape = (x.shape[0], heads, x.shape[1] // heads)
    for earlier in before.keys:
        if earlier.shape != shape:
            raise ValueError(
                f"every key of the memory must be (b, heads, head_dim) = {shape}: got {tuple(earlier.shape)}; the "
                f"memory is of a chain with other heads"
            )
    return before


def recent(memory: MemoryT, last: int | None) -> MemoryT:
    """The part of `memory` that a block attending to `last` blocks, itself counted, can use: the latest `last` - 1."""
    if last is None or len(memory[0]) < last:
        return memory
    first = len(memory[0]) - (last - 1)
    return type(memory)(*(part[first:] for part in memory))
