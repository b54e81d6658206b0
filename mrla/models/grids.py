"""Where a stage of tokens learns the rows and columns of its patches, at call time."""

import threading
from typing import Any

from torch import Tensor, nn

from mrla.ops import Grid


class GridFromArgument:
    """The first argument of a block after its input, as PVT's blocks take it."""

    def grid(self, arguments: tuple[Any, ...]) -> Grid | None:
        """(rows, columns) as the network passes them."""
        return tuple(arguments[0]) if arguments else None  # type: ignore[return-value]

    def detach(self) -> None:
        """Nothing to undo."""


class GridFromPatches:
    """The grid of timm's patch embedding: its own where the image size is fixed, else that of the patches it last made.

    The latter is kept per thread, so that threads with images of different sizes cannot meet in it. It is that of the
    last image: a stage that is called without its network, on tokens of another grid, needs a fixed size.
    """

    def __init__(self, patch_embed: nn.Module, *, dynamic: bool):
        self.patch_embed = patch_embed
        self._last = threading.local()
        self._dynamic = dynamic
        self._hook = patch_embed.register_forward_hook(self._record) if dynamic else None

    def grid(self, arguments: tuple[Any, ...]) -> Grid | None:
        """The grid of the patch embedding."""
        if not self._dynamic:
            return self.patch_embed.grid_size  # type: ignore[return-value]
        return getattr(self._last, "grid", None)

    def detach(self) -> None:
        """Takes the hook off the patch embedding again."""
        if self._hook is not None:
            self._hook.remove()

    def _record(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        # A patch embedding for images of any size gives (b, rows, columns, c), and the network flattens it.
        self._last.grid = (output.shape[1], output.shape[2])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last": None}  # of this process and thread alone

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _last=threading.local())
