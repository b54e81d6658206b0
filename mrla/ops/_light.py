"""MRLA-light: the gate between a block's query and key, and the update it lets through."""

from jaxtyping import Float
from torch import Tensor, cat
from torch.nn.functional import conv1d, conv2d


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
        One number in (0, 1) per image and head.

    Example:
        >>> import torch
        >>> one_tap = torch.tensor([[[0.0, 1.0, 0.0]]])
        >>> light_gate(torch.zeros(1, 4, 2, 2), one_tap, one_tap, heads=2).tolist()
        [[0.5, 0.5]]
    """
    pooled = x.mean(dim=(2, 3)).unsqueeze(1)
    projected = conv1d(pooled, cat((query_weight, key_weight)), padding=query_weight.shape[-1] // 2)
    query, key = projected.unflatten(2, (heads, -1)).unbind(1)
    return ((query * key).sum(-1) * query.shape[-1] ** -0.5).sigmoid()


def light_update(
    x: Float[Tensor, "b c h w"],
    carried: Float[Tensor, "b c h w"] | None,
    query_weight: Float[Tensor, "1 1 k"],
    key_weight: Float[Tensor, "1 1 k"],
    value_weight: Float[Tensor, "c 1 3 3"],
    decay: Float[Tensor, " c"] | None,
    heads: int,
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

    Returns:
        o_t, in the shape of `x` (under autocast in its lower precision).

    Example:
        >>> import torch
        >>> x, tap = torch.ones(1, 2, 1, 1), torch.zeros(1, 1, 3)
        >>> centre = torch.zeros(2, 1, 3, 3); centre[:, :, 1, 1] = 1
        >>> light_update(x, x, tap, tap, centre, torch.tensor([0.0, 1.0]), heads=1).flatten().tolist()
        [0.5, 1.5]
    """
    value = conv2d(x, value_weight, padding=1, groups=x.shape[1])
    gate = light_gate(x, query_weight, key_weight, heads)
    # One gate for the d channels of a head; the explicit reshape keeps the graph free of data-dependent shapes.
    update = value * gate.repeat_interleave(x.shape[1] // heads, dim=1)[:, :, None, None]
    if carried is None or decay is None:
        return update
    # Under autocast a float32 lambda would promote the whole residual stream.
    return update + decay[:, None, None].to(update.dtype) * carried.to(update.dtype)
