"""A stage of a backbone whose blocks hand memory on to one another through their mixers."""

from collections.abc import Iterator
from typing import Any, overload

from torch import Tensor, nn

from mrla.ops import Grid, LayerMixer

from .grids import GridFromArgument, GridFromPatches

MIXER = "mrla"
"""The name under which a block holds its mixer; it ends every new parameter's path: ``layer1.0.mrla.*``."""


class Stage(nn.Module):
    """A container of blocks, some with a mixer, that is called, iterated, indexed and sliced like `nn.Sequential`.

    `attach` turns a network's own container into this class in place and `detach` turns it back, so that the children,
    their keys, hooks and every reference to the container stay what they were. It is not a `nn.Sequential` on purpose:
    code that flattens those by their children would pass the mixers by.

    Iterating, or an integer index, gives `Step` objects. The steps of one iteration share one memory and one grid of
    tokens, taken anew for each iteration, so a caller who goes block by block gets what `forward` gives; a step got by
    index is a chain of one.
    """

    plain_class: type[nn.Module]
    """The class that the container had before, and has again after `detach`."""

    grid_source: GridFromArgument | GridFromPatches | None
    """Where the grid of the tokens comes from; None for maps."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Runs the blocks in order, handing memory from each to the next."""
        grid = self._grid(args)
        memory = None
        for block in self.children():
            x, memory = run_block(block, x, memory, grid, *args, **kwargs)
        return x

    def __iter__(self) -> Iterator["Step"]:
        memories: dict[int, Any] = {}
        grid = self._grid(())
        return iter([Step(self, block, at, memories, grid) for at, block in enumerate(self.children())])

    def __len__(self) -> int:
        return len(self._modules)

    @overload
    def __getitem__(self, index: int) -> "Step": ...
    @overload
    def __getitem__(self, index: slice) -> "Stage": ...
    def __getitem__(self, index: int | slice) -> "Step | Stage":
        blocks = list(self.children())
        if isinstance(index, slice):
            stage = Stage()
            stage.plain_class = self.plain_class
            stage.grid_source = self.grid_source
            stage.training = self.training
            for position, block in enumerate(blocks[index]):
                stage.add_module(str(position), block)
            return stage
        return Step(self, blocks[index], 0, {}, self._grid(()))

    def _grid(self, arguments: tuple[Any, ...]) -> Grid | None:
        return None if self.grid_source is None else self.grid_source.grid(arguments)


class Step:
    """One block of a stage together with its mixer; called like the block, it hands every other attribute on to it."""

    def __init__(self, stage: Stage, block: nn.Module, position: int, memories: dict[int, Any], grid: Grid | None):
        self.block = block
        self._stage = stage
        self._position = position
        self._memories = memories
        self._grid = grid

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        memory = self._memories.get(self._position - 1)
        grid = self._grid or self._stage._grid(args)
        # Keyed by position, not appended: under activation checkpointing a step runs a second time in backward.
        x, self._memories[self._position] = run_block(self.block, x, memory, grid, *args, **kwargs)
        return x

    def __getattr__(self, name: str) -> Any:
        if name == "block":  # not yet set, as while unpickling
            raise AttributeError(name)
        return getattr(self.block, name)


def run_block(
    block: nn.Module, x: Tensor, memory: Any, grid: Grid | None = None, *args: Any, **kwargs: Any
) -> tuple[Tensor, Any]:
    """Runs one block and its mixer, if it has one.

    Args:
        block: A residual block; its `downsample`, where it has one, makes its shortcut.
        x: The block's input.
        memory: What the mixer before left, None at the head of a chain.
        grid: Rows and columns of patch tokens, where `x` is tokens and their grid is known.
        args: Whatever else the network calls the block with, handed through.
        kwargs: Likewise.

    Returns:
        The block's output after its mixer, and the memory for the next one. A block without a mixer passes it by.
    """
    mixer = block._modules.get(MIXER)
    if mixer is None:
        return block(x, *args, **kwargs), memory
    assert isinstance(mixer, LayerMixer)
    if mixer.place is not None and mixer.place.index == 0:
        memory = None  # one container may hold several chains
    downsample = getattr(block, "downsample", None)
    if downsample is None:
        return mixer(block(x, *args, **kwargs), x, memory, grid=grid)
    # Computed once: a second call would update its BatchNorm twice in a training step.
    shortcut = downsample(x)
    return mixer(_with_shortcut(block, shortcut)(x, *args, **kwargs), shortcut, memory, grid=grid)


def _with_shortcut(block: nn.Module, shortcut: Tensor) -> nn.Module:
    """A view of `block`, sharing everything with it, whose `downsample` returns `shortcut`."""
    view = object.__new__(type(block))
    modules = {name: module for name, module in block._modules.items() if name != "downsample"}
    view.__dict__.update(block.__dict__, _modules=modules, downsample=lambda _: shortcut)
    return view
