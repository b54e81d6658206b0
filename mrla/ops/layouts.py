"""How a network lays its features out, and the same as maps (b, c, h, w)."""

from math import isqrt
from typing import Literal

from jaxtyping import Float
from torch import Tensor

Layout = Literal["NCHW", "NHWC", "NLC"]
"""How features lie: maps with channels first or last, or tokens (b, n, c)."""
Grid = tuple[int, int]
"""Rows and columns (h, w) of patch tokens."""


def resolve_grid(tokens: int, num_prefix_tokens: int = 0, grid: Grid | None = None) -> Grid:
    """Rows and columns of a sequence's patch tokens.

    Args:
        tokens: Length n of the sequence, prefix tokens counted.
        num_prefix_tokens: Class, distillation or register tokens in front.
        grid: Rows and columns (h, w), where they are known; else the patches must form a square.

    Returns:
        (h, w), with h w + `num_prefix_tokens` = `tokens`.

    Raises:
        ValueError: If they do not.

    Example:
        >>> resolve_grid(197, num_prefix_tokens=1), resolve_grid(12, grid=(3, 4))
        ((14, 14), (3, 4))
    """
    patches = tokens - num_prefix_tokens
    if grid is None:
        side = isqrt(max(patches, 0))
        if side < 1 or side * side != patches:
            raise ValueError(
                f"without a grid the patch tokens must form a square: got {tokens} tokens of which {num_prefix_tokens} "
                f"are prefix tokens, {patches} patches; pass grid=(rows, columns)"
            )
        return side, side
    if grid[0] < 1 or grid[1] < 1 or grid[0] * grid[1] != patches:
        raise ValueError(
            f"the grid must hold every patch token: got grid={tuple(grid)} for {tokens} tokens of which "
            f"{num_prefix_tokens} are prefix tokens, {patches} patches; pass the grid of these tokens (dropped tokens "
            f"leave none)"
        )
    return grid[0], grid[1]


def to_map(
    x: Float[Tensor, "b ..."], layout: Layout = "NLC", *, num_prefix_tokens: int = 0, grid: Grid | None = None
) -> Float[Tensor, "b c h w"]:
    """Features as maps: a view, nothing is copied.

    Args:
        x: Maps (b, c, h, w) for ``"NCHW"``, (b, h, w, c) for ``"NHWC"``; tokens (b, n, c) for ``"NLC"``, row by row.
        layout: Which of these `x` is.
        num_prefix_tokens: Tokens in front that are not patches; they are left out.
        grid: Rows and columns of the patches, see `resolve_grid`.

    Returns:
        The maps.

    Raises:
        ValueError: If `x` has not the layout's number of axes, or the grid does not fit.

    Example:
        >>> import torch
        >>> tokens = torch.arange(7.0).reshape(1, 7, 1)  # one class token and 2x3 patches
        >>> to_map(tokens, num_prefix_tokens=1, grid=(2, 3)).tolist()
        [[[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]]]
    """
    if x.ndim != len(layout):
        raise ValueError(f"features in layout {layout} have {len(layout)} axes: got shape {tuple(x.shape)}")
    if layout == "NCHW":
        return x
    if layout == "NHWC":
        return x.permute(0, 3, 1, 2)
    rows, columns = resolve_grid(x.shape[1], num_prefix_tokens, grid)
    return x[:, num_prefix_tokens:].transpose(1, 2).unflatten(2, (rows, columns))


def from_map(maps: Float[Tensor, "b c h w"], layout: Layout = "NLC") -> Float[Tensor, "b ..."]:
    """Maps in a network's layout, the inverse of `to_map` but for prefix tokens.

    Args:
        maps: Maps (b, c, h, w).
        layout: The layout to give.

    Returns:
        The same numbers as (b, c, h, w), (b, h, w, c) or (b, h w, c).

    Example:
        >>> import torch
        >>> x = torch.randn(2, 12, 5)
        >>> torch.equal(from_map(to_map(x, grid=(3, 4))), x)
        True
    """
    if layout == "NCHW":
        return maps
    if layout == "NHWC":
        return maps.permute(0, 2, 3, 1)
    return maps.flatten(2).transpose(1, 2)
