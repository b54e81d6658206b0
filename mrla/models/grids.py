"""Where a stage of tokens learns the rows and columns of its patches, at call time."""

import threading
from collections.abc import Mapping
from typing import Any

from timm.layers import PatchEmbed
from torch import SymInt, nn
from torch.fx import Proxy

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

    def detach(self) -> None:
        """Nothing to undo."""


class GridFromPatches:
    """The grid of a patch embedding: its own where the image size is fixed, else that of the patches it last made.

    The latter is kept per thread, so that threads with images of different sizes cannot meet in it. It is that of the
    last image: a stage that is called without its network, on tokens of another grid, needs a fixed size.
    """

    def __init__(self, patch_embed: nn.Module):
        self.patch_embed = patch_embed
        self._last = threading.local()
        # One of timm's for images of any size gives (b, rows, columns, c), and the network flattens it.
        maps = isinstance(patch_embed, PatchEmbed) and not patch_embed.flatten
        self._dynamic = maps or not is_grid(getattr(patch_embed, "grid_size", None))
        self._hook = patch_embed.register_forward_hook(self._record) if self._dynamic else None

    def grid(self, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> Grid | None:
        """The grid of the patch embedding."""
        if not self._dynamic:
            return self.patch_embed.grid_size  # type: ignore[return-value]
        return getattr(self._last, "grid", None)

    def detach(self) -> None:
        """Takes the hook off the patch embedding again."""
        if self._hook is not None:
            self._hook.remove()

    def _record(self, module: nn.Module, inputs: Any, output: Any) -> None:
        # One that says the grid of its tokens, as NaFlexViT's does, gives it beside them.
        self._last.grid = output[1] if isinstance(output, (tuple, list)) else (output.shape[1], output.shape[2])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last": None}  # of this process and thread alone

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _last=threading.local())
