"""MRLA-light: the gate between a block's query and key, and the update it lets through."""

from jaxtyping import Float
from torch import Tensor, addcmul

from .checks import check_kernels, check_like, check_map
from .projections import Activation, depthwise_value, per_channel, pool, slide


def light_gate(
    x: Float[Tensor, "b c h w"],
    query_weight: Float[Tensor, "1 1 k"],
    key_weight: Float[Tensor, "1 1 k"],
    heads: int,
) -> Float[Tensor, "b g"]:
    r"""How strongly each head of a block lets its own value through.

    .. math:: \sigma(q_t \cdot k_t / \sqrt d), \qquad y_t = \mathrm{mean}_{hw}\, x_t, \quad
              q_t = \mathrm{conv1d}(y_t; w_q), \quad k_t = \mathrm{conv1d}(y_t; w_k)

    The light form's attention (arXiv:2302.03985, section 3.3). Channels are the one-dimensional axis that the kernels
    slide along, with zero padding.

    Args:
        x: A block's output.
        query_weight: Kernel w_q, of odd size k.
        key_weight: Kernel w_k, of the same size.
        heads: Number of heads g; divides c.

    Returns:
        One number in (0, 1) per image and head, in float32 or, for float64, float64.

    Example:
        >>> import torch
        >>> one_tap = torch.tensor([[[0.0, 1.0, 0.0]]])
        >>> light_gate(torch.zeros(1, 4, 2, 2), one_tap, one_tap, heads=2).tolist()
        [[0.5, 0.5]]
    """
    query, key = slide(pool(x), query_weight, key_weight)
    product = (query * key).unflatten(1, (heads, -1))
    return (product.sum(-1) * product.shape[-1] ** -0.5).sigmoid()


def light_update(
    x: Float[Tensor, "b c h w"],
    carried: Float[Tensor, "b c h w"] | None,
    query_weight: Float[Tensor, "1 1 k"],
    key_weight: Float[Tensor, "1 1 k"],
    value_weight: Float[Tensor, "c 1 3 3"],
    decay: Float[Tensor, " c"] | None,
    heads: int,
    value_act: Activation | None = None,
) -> Float[Tensor, "b c h w"]:
    r"""What MRLA-light adds to a block's output, before its norm.

    .. math:: o_t = \sigma(q_t \cdot k_t / \sqrt d)\, v_t + \lambda_t \odot u_t

    with v_t a depthwise 3x3 convolution of x_t, and u_t either the shortcut s_t (the released PyTorch code and the
    Paddle notebook) or the update before, o_{t-1} (the recurrence as arXiv:2302.03985, eq. 8, prints it).

    Args:
        x: The block's output x_t.
        carried: u_t, in the shape of `x`; None leaves the term out.
        query_weight: Kernel of the query along channels, of odd size k.
        key_weight: Kernel of the key along channels, of the same size.
        value_weight: Depthwise kernel of the value.
        decay: lambda_t, one number per channel; None exactly where `carried` is.
        heads: Number of heads g; divides c.
        value_act: Activation on the value, see `depthwise_value`.

    Returns:
        o_t, in the shape of `x` (under autocast in its lower precision).

    Raises:
        ValueError: If the shapes do not fit one another, or one of `carried` and `decay` is given without the other.

    Example:
        >>> import torch
        >>> x, tap = torch.ones(1, 2, 1, 1), torch.zeros(1, 1, 3)
        >>> centre = torch.zeros(2, 1, 3, 3); centre[:, :, 1, 1] = 1
        >>> light_update(x, x, tap, tap, centre, torch.tensor([0.0, 1.0]), heads=1).flatten().tolist()
        [0.5, 1.5]
    """
    check_map(x)
    check_kernels(x.shape[1], query_weight, key_weight, value_weight, heads, decay)
    if (carried is None) != (decay is None):
        raise ValueError(
            f"carried and decay belong together: got {'no ' if carried is None else ''}carried and "
            f"{'no ' if decay is None else ''}decay; give both or neither"
        )
    value = depthwise_value(x, value_weight, value_act)
    gate = light_gate(x, query_weight, key_weight, heads)
    update = value * per_channel(gate, x.shape[1]).to(value.dtype)
    if carried is None or decay is None:
        return update
    check_like("carried", (carried,), x)
    # Under autocast a float32 lambda would promote the whole residual stream. One addcmul rounds once: in float16 the
    # product alone may overflow where the sum does not.
    return addcmul(update, decay[:, None, None].to(update.dtype), carried.to(update.dtype))
