"""Where a stage of tokens learns the rows and columns of its patches, at call time."""

import math
import threading
from collections.abc import Mapping
from typing import Any

import torch
from timm.layers import PatchEmbed
from torch import SymInt, nn
from torch.fx import Proxy
from torch.utils.hooks import RemovableHandle

from mrla.ops import Grid


def is_grid(value: Any) -> bool:
    """Whether a value can be the rows and columns of a map: two whole numbers, or what stands for them in a trace."""
    number = (int, SymInt, Proxy)
    return isinstance(value, (tuple, list)) and len(value) == 2 and all(isinstance(side, number) for side in value)


class GridFromArgument:
    """What blocks are called with beside their input: a pair (PVT, CoaT's `size`) or two numbers (XCiT)."""

    def grid(self, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> Grid | None:
        """(rows, columns) as the network passes them."""
        candidates = (*arguments[:1], arguments[:2], keywords.get("size"))
        return next((tuple(said) for said in candidates if is_grid(said)), None)  # type: ignore[arg-type, return-value]


class GridFromPatches:
    """The grid of a patch embedding: its own where the image size is fixed, else that of the patches it last made.

    The latter is kept per thread, so that threads with images of different sizes cannot meet in it. It is that of the
    last image: a stage that is called without its network, on tokens of another grid, needs a fixed size. Where several
    images went through the patch embedding before a block asks, the grid is the one that holds the block's tokens.
    """

    def __init__(self, patch_embed: nn.Module, num_prefix_tokens: int):
        self.patch_embed = patch_embed
        self.num_prefix_tokens = num_prefix_tokens
        self._noted = threading.local()
        # One of timm's for images of any size gives (b, rows, columns, c), and the network flattens it.
        maps = isinstance(patch_embed, PatchEmbed) and not patch_embed.flatten
        self.changes: bool = maps or not is_grid(getattr(patch_embed, "grid_size", None))
        self._hook: RemovableHandle | None = None
        self.watch()

    def watch(self) -> None:
        """Puts the hook on the patch embedding that notes each image's grid, where grids can differ."""
        if self.changes:
            self._hook = self.patch_embed.register_forward_hook(self._note)

    def grid(self, x: Any) -> Grid | None:
        """(rows, columns) of the patches among the tokens `x`; None where no image has come by yet.

        Raises:
            RuntimeError: If images of different grids went through the patch embedding, and `x` may be of either; or it
                did not say the grid.
        """
        if not self.changes:
            return self.patch_embed.grid_size  # type: ignore[return-value]
        grids = getattr(self._noted, "grids", ())
        if torch.compiler.is_compiling() or isinstance(x, Proxy):
            return grids[0] if grids else None
        self._noted.read = True
        if len(grids) > 1:
            patches = x.shape[1] - self.num_prefix_tokens
            fitting = [grid for grid in grids if grid is not None and math.prod(grid) == patches]
            if len(fitting) > 1:
                raise RuntimeError(
                    f"images of different grids, {', '.join(map(str, fitting))}, went through the patch embedding "
                    f"before the first block, which cannot tell whose tokens it has: run one image size at a time"
                )
            grids = fitting or grids[-1:]
        if grids and grids[0] is None:
            raise RuntimeError(
                "mixers need the rows and columns of the patch tokens, and the patch embedding did not say them, as "
                "for a batch of images of several sizes: give the network images of one size"
            )
        return grids[0] if grids else None

    def detach(self) -> None:
        """Takes the hook off the patch embedding again."""
        if self._hook is not None:
            self._hook.remove()

    def _note(self, module: nn.Module, inputs: Any, output: Any) -> None:
        # One that says the grid of its tokens, as NaFlexViT's does, gives it beside them.
        grid = output[1] if isinstance(output, (tuple, list)) else (output.shape[1], output.shape[2])
        if torch.compiler.is_compiling() or isinstance(output, Proxy) or getattr(self._noted, "read", True):
            self._noted.grids = (grid,)
        elif grid not in self._noted.grids:
            self._noted.grids = (*self._noted.grids, grid)
        self._noted.read = False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_noted": None}  # of this process and thread alone

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _noted=threading.local())
