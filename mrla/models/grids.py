"""Where a stage of tokens learns the rows and columns of its patches, at call time."""

import math
import threading
from collections.abc import Mapping
from typing import Any

import torch
from timm.layers import PatchEmbed
from torch import SymInt, Tensor, nn
from torch.fx import Proxy
from torch.utils.hooks import RemovableHandle

from mrla.ops import Grid


def is_grid(value: Any) -> bool:
    """Whether a value can be the rows and columns of a map: two whole numbers, or what stands for them in a trace."""
    number = (int, SymInt, Proxy)
    return isinstance(value, (tuple, list)) and len(value) == 2 and all(isinstance(side, number) for side in value)


def says_grid(module: nn.Module, output: Any) -> bool:
    """Whether a module gives tokens and, beside them, their grid, or their coordinates where it has a patch size."""
    if not isinstance(output, (tuple, list)) or len(output) < 2:
        return False
    beside = output[1]
    coordinates = isinstance(beside, Tensor) and not beside.is_floating_point() and beside.shape[2:] == (2,)
    return is_grid(beside) or (coordinates and is_grid(getattr(module, "patch_size", None)))


def grid_made(module: nn.Module, inputs: tuple[Any, ...], keywords: Mapping[str, Any], output: Any) -> Grid | None:
    """The grid of the tokens that a patch embedding has made.

    Args:
        module: A patch embedding of timm: one that gives a map of patches, tokens with their grid (NaFlexViT's), or
            tokens with their coordinates (Gemma 4's).
        inputs: What it was called with: an image, or patches cut out before, with `patch_coord`.
        keywords: The rest of that.
        output: What it gave.

    Returns:
        (rows, columns); None where it says none, or the images of a batch differ.
    """
    if isinstance(output, (Tensor, Proxy)):
        shape: Any = output.shape
        return (shape[1], shape[2])
    if is_grid(output[1]):
        return (output[1][0], output[1][1])
    image: Any = inputs[0] if inputs else next(iter(keywords.values()))
    patch_size: Any = getattr(module, "patch_size", None)
    if isinstance(image, Tensor) and image.ndim == 4 and is_grid(patch_size):
        return (image.shape[2] // patch_size[0], image.shape[3] // patch_size[1])
    named = {**image, **keywords} if isinstance(image, Mapping) else keywords
    coordinates = named.get("patch_coord", inputs[1] if len(inputs) > 1 else None)
    if not isinstance(coordinates, Tensor) or torch.compiler.is_compiling():  # a graph knows shapes, and no values
        return None
    return _full_grid(coordinates)


def _full_grid(coordinates: Tensor) -> Grid | None:
    """The grid of which each image has every patch, row by row, without padding: (b, n, 2) are rows and columns."""
    rows, columns = (int(side) + 1 for side in coordinates.flatten(0, 1).amax(0))
    if rows * columns != coordinates.shape[1]:
        return None
    sides = (torch.arange(side, device=coordinates.device, dtype=coordinates.dtype) for side in (rows, columns))
    full = torch.cartesian_prod(*sides)
    return (rows, columns) if torch.equal(coordinates, full.expand_as(coordinates)) else None


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
            self._hook = self.patch_embed.register_forward_hook(self._note, with_kwargs=True)

    def grid(self, x: Any) -> Grid | None:
        """(rows, columns) of the patches among the tokens `x`; None where no image has come by yet.

        Raises:
            RuntimeError: If images of different grids went through the patch embedding, and `x` may be of either; or it
                did not say the grid.
        """
        if not self.changes:
            return self.patch_embed.grid_size  # type: ignore[return-value]
        grids = getattr(self._noted, "grids", ())
        compiling = torch.compiler.is_compiling()
        if not compiling:
            self._noted.read = True
        if len(grids) > 1 and not compiling and not isinstance(x, Proxy):
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
                "mixers need the rows and columns of the patch tokens, and the patch embedding did not say them: give "
                "the network images of one size, or patches of all of one grid, row by row and without padding"
            )
        return grids[0] if grids else None

    def detach(self) -> None:
        """Takes the hook off the patch embedding again."""
        if self._hook is not None:
            self._hook.remove()

    def _note(self, module: nn.Module, inputs: Any, keywords: Any, output: Any) -> None:
        grid = grid_made(module, inputs, keywords, output)
        if torch.compiler.is_compiling() or isinstance(output, Proxy) or getattr(self._noted, "read", True):
            self._noted.grids = (grid,)
        elif grid not in self._noted.grids:
            self._noted.grids = (*self._noted.grids, grid)
        self._noted.read = False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_noted": None}  # of this process and thread alone

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _noted=threading.local())
