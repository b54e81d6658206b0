"""How many heads, how wide, and how far the one-dimensional kernels reach."""

import math


def resolve_heads(channels: int, *, head_dim: int | None = None, heads: int | None = None, default: int = 32) -> int:
    """The number of heads g for c channels, from a width, a count, or a method's own default width.

    A width or a count that the caller gives is a promise, so one that does not divide the channels is refused. The
    default is a wish: where it does not divide, the largest divisor of the channels below it is taken.

    Args:
        channels: Number of channels c.
        head_dim: Width d of one head; give this or `heads`, not both.
        heads: Number of heads g.
        default: Width to aim at when neither is given (light 32, base 16, exact 32).

    Returns:
        The number of heads; it divides `channels`.

    Raises:
        ValueError: If both are given, or the given one is not a positive divisor of `channels`.

    Example:
        >>> resolve_heads(64), resolve_heads(48), resolve_heads(64, head_dim=16)
        (2, 2, 4)
    """
    if channels < 1:
        raise ValueError(f"channels must be positive: got {channels}")
    if head_dim is not None and heads is not None:
        raise ValueError(f"give head_dim or heads, not both: got head_dim={head_dim}, heads={heads}")
    if head_dim is None and heads is None:
        return channels // _largest_divisor(channels, default)
    name, given = ("head_dim", head_dim) if head_dim is not None else ("heads", heads)
    assert given is not None
    if given < 1 or channels % given:
        near = _largest_divisor(channels, max(given, 1))
        raise ValueError(f"{name} must divide the channels: got {name}={given}, channels={channels}; try {near}")
    return channels // given if name == "head_dim" else given


def channel_kernel_size(channels: int) -> int:
    r"""Kernel size of the query's and key's convolution along channels.

    .. math:: k = t \text{ if } t \text{ is odd else } t + 1, \qquad t = \lfloor |(\log_2 c + 1) / 2| \rfloor

    ECA's rule with its published constants (arXiv:1910.03151, eq. 12), which MRLA takes over.

    Args:
        channels: Number of channels c.

    Returns:
        An odd number of channels.

    Example:
        >>> [channel_kernel_size(c) for c in (16, 64, 256, 2048)]
        [3, 3, 5, 7]
    """
    reach = int(abs((math.log2(channels) + 1) / 2))
    return reach if reach % 2 else reach + 1


def _largest_divisor(number: int, limit: int) -> int:
    return max(divisor for divisor in range(1, min(number, limit) + 1) if number % divisor == 0)
