"""Layer attention as the paper defines it: keys and values of every earlier output, made anew by each block."""

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor, cat, float16

from .base import Weighting, layer_weights, recent, weighted_sum
from .checks import check_kernels, check_like, check_map, check_pairs, check_window
from .projections import Activation, depthwise_value, pool, slide


class OutputMemory(NamedTuple):
    """Outputs (b, c, h, w) of the blocks so far, the oldest first, and their means over space (b, c)."""

    outputs: tuple[Tensor, ...] = ()
    pooled: tuple[Tensor, ...] = ()


def exact_update(
    x: Float[Tensor, "b c h w"],
    memory: OutputMemory | None,
    query_weight: Float[Tensor, "1 1 k"],
    key_weight: Float[Tensor, "1 1 k"],
    value_weight: Float[Tensor, "c 1 3 3"],
    heads: int,
    weighting: Weighting = "softmax",
    value_act: Activation | None = None,
    last: int | None = None,
) -> tuple[Float[Tensor, "b c h w"], OutputMemory]:
    r"""What layer attention adds to a block's output, before its norm.

    .. math:: o_t = \sum_{s \le t} \mathrm{softmax}_s(q_t \cdot k_s^t / \sqrt d)\, v_s^t, \qquad
              k_s^t = \mathrm{conv1d}(y_s; w_k^t), \quad v_s^t = \mathrm{DWConv}(x_s; w_v^t)

    arXiv:2302.03985, eq. 4, for any number of heads.

    NOTE the released layer reshapes (b, t, c) to (b, g, t, d) without moving axes, so that with more than one head it
    mixes blocks and channels; with one head it agrees with this.

    The weight of a block is one number for a whole channel and a depthwise convolution treats each channel alone, so
    the sum of the values is the value of the sum: one convolution in place of t, unless an activation stands between.

    Args:
        x: The block's output x_t.
        memory: Outputs of the blocks before, None at the head of a chain.
        query_weight: Kernel of the query along channels, of odd size k.
        key_weight: Kernel of the keys along channels, of the same size.
        value_weight: Depthwise kernel of the values.
        heads: Number of heads g; divides c.
        weighting: ``"softmax"`` over the blocks, or ``"sigmoid"`` for each alone.
        value_act: Activation on the values, see `depthwise_value`.
        last: Ask the last so many blocks only, this one counted; it bounds the memory. None for all.

    Returns:
        o_t in the shape of `x`, and the memory for the next block.

    Raises:
        ValueError: If the shapes do not fit one another, the memory's included, or `last` is not positive.

    Example:
        >>> import torch
        >>> x, tap = torch.randn(1, 4, 2, 2), torch.zeros(1, 1, 3)
        >>> centre = torch.zeros(4, 1, 3, 3); centre[:, :, 1, 1] = 1
        >>> _, memory = exact_update(x, None, tap, tap, centre, heads=2)
        >>> second, _ = exact_update(3 * x, memory, tap, tap, 5 * centre, heads=2)  # block 2's value kernel, on both
        >>> torch.allclose(second, 10 * x)
        True
    """
    check_map(x)
    check_kernels(x.shape[1], query_weight, key_weight, value_weight, heads)
    check_window(last)
    before = recent(memory or OutputMemory(), last)
    check_pairs("outputs and means", before)
    check_like("every output of the memory", before.outputs, x)
    pooled = pool(x)
    check_like("every mean of the memory", before.pooled, pooled)
    now = OutputMemory(outputs=(*before.outputs, x), pooled=(*before.pooled, pooled))
    (query,) = slide(now.pooled[-1], query_weight)
    (keys,) = slide(cat(now.pooled), key_weight)
    of_outputs = keys.unflatten(0, (len(now.pooled), -1))  # not chunk: torch.export would then fix the batch
    weights = layer_weights(
        query.unflatten(1, (heads, -1)), [key.unflatten(1, (heads, -1)) for key in of_outputs], weighting
    )
    if value_act is not None:
        update = weighted_sum(weights, [depthwise_value(one, value_weight, value_act) for one in now.outputs])
    elif weighting == "sigmoid" and x.dtype == float16:
        # A sum of outputs may not fit into float16 where that of their values does; their mean always does.
        count = len(now.outputs)
        update = depthwise_value(weighted_sum(weights / count, now.outputs), value_weight) * count
    else:
        update = depthwise_value(weighted_sum(weights, now.outputs), value_weight)
    return update, recent(now, last)
