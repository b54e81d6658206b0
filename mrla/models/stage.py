"""A stage of a backbone whose blocks hand memory on to one another through their mixers."""

from collections.abc import Iterator, Mapping
from typing import Any, overload

from timm.models import checkpoint_seq
from torch import nn
from torch.fx import Proxy

from mrla.ops import BlockTail, Grid, LayerMixer

from .block_tails import held_back
from .chain_search import ShortcutSource
from .grids import GridFromArgument, GridFromPatches, is_grid

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

    `children()` are the blocks themselves, which pass their mixers by. Where torch.fx traces a network its blocks are
    traced as ever and each mixer is one node.
    """

    plain_class: type[nn.Module]
    """The class that the container had before, and has again after `detach`."""

    grid_source: GridFromArgument | GridFromPatches | None
    """Where the grid of the tokens comes from; None for maps."""

    shortcuts: dict[str, ShortcutSource]
    """Where the shortcut of each block comes from, by the block's name; one that is not there is not known."""

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Runs the blocks in order, handing memory from each to the next."""
        if getattr(self, "grad_checkpointing", False):  # a stage of a RegNet keeps it on itself
            return checkpoint_seq(list(self), x)
        grid = self._grid(args, kwargs)
        memory = None
        for name, block in self.named_children():
            x, memory = run_block(block, x, memory, self.shortcuts.get(name), grid, *args, **kwargs)
        return x

    def __iter__(self) -> Iterator["Step"]:
        memories: dict[int, Any] = {}
        grid = self._grid((), {})
        return iter([Step(self, name, at, memories, grid) for at, name in enumerate(self._modules)])

    def __len__(self) -> int:
        return len(self._modules)

    @overload
    def __getitem__(self, index: int) -> "Step": ...
    @overload
    def __getitem__(self, index: slice) -> "Stage": ...
    def __getitem__(self, index: int | slice) -> "Step | Stage":
        names = list(self._modules)
        if not isinstance(index, slice):
            return Step(self, names[index], 0, {}, self._grid((), {}))
        stage = Stage()
        stage.plain_class = self.plain_class
        stage.grid_source = self.grid_source
        stage.shortcuts = {}
        stage.training = self.training
        for position, name in enumerate(names[index]):
            # A list counts its part anew, a sequence keeps its names.
            key = str(position) if issubclass(self.plain_class, nn.ModuleList) else name
            stage.add_module(key, self.get_submodule(name))
            if name in self.shortcuts:
                stage.shortcuts[key] = self.shortcuts[name]
        return stage

    def _grid(self, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> Grid | None:
        return None if self.grid_source is None else self.grid_source.grid(arguments, keywords)


class Step:
    """One block of a stage together with its mixer; called like the block, it hands every other attribute on to it."""

    __slots__ = ("_grid", "_memories", "_position", "_shortcut", "_stage", "block")

    def __init__(self, stage: Stage, name: str, position: int, memories: dict[int, Any], grid: Grid | None):
        self.block = stage.get_submodule(name)
        self._stage = stage
        self._shortcut: ShortcutSource | None = stage.shortcuts.get(name)
        self._position = position
        self._memories = memories
        self._grid = grid

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        memory = self._memories.get(self._position - 1)
        grid = self._grid or self._stage._grid(args, kwargs)
        # Keyed by position, not appended: under activation checkpointing a step runs a second time in backward.
        x, self._memories[self._position] = run_block(self.block, x, memory, self._shortcut, grid, *args, **kwargs)
        return x

    def __getattr__(self, name: str) -> Any:
        if name == "block":  # not yet set, as while unpickling
            raise AttributeError(name)
        return getattr(self.block, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in Step.__slots__:
            super().__setattr__(name, value)
        else:  # as in `stage[0].drop_path = nn.Identity()`: a step is made anew each time and would forget it
            setattr(self.block, name, value)


def run_block(
    block: nn.Module,
    x: Any,
    memory: Any,
    shortcut: ShortcutSource | None = "input",
    grid: Grid | None = None,
    *args: Any,
    **kwargs: Any,
) -> tuple[Any, Any]:
    """Runs one block and its mixer, if it has one.

    Args:
        block: A block.
        x: Its input.
        memory: What the mixer before left, None at the head of a chain.
        shortcut: Where the block's shortcut comes from: its input, or its `downsample`; None where it is not known.
        grid: Rows and columns of patch tokens, where `x` is tokens and their grid is known.
        args: Whatever else the network calls the block with, handed through.
        kwargs: Likewise.

    Returns:
        The block's output after its mixer, and the memory for the next one. Of an output of several parts the first is
        the mixer's. A block without a mixer passes memory by.
    """
    mixer = block._modules.get(MIXER)
    if mixer is None:
        return block(x, *args, **kwargs), memory
    assert isinstance(mixer, LayerMixer)
    if mixer.place is not None and mixer.place.index == 0:
        memory = None  # one container may hold several chains
    changed: dict[str, Any] = {}
    if shortcut is not None and not isinstance(x, Proxy):
        changed.update(held_back(block, mixer))
    if shortcut == "downsample":
        # Computed once: a second call would update its BatchNorm twice in a training step.
        added = block.get_submodule("downsample")(x)
        changed["downsample"] = lambda _: added
    else:
        added = x if shortcut == "input" else None
    output = _call_view(block, changed, x, *args, **kwargs) if changed else block(x, *args, **kwargs)
    if isinstance(output, BlockTail):
        return mixer.behind(output, memory)
    if isinstance(output, (tuple, list)) and len(output) > 0:
        if grid is not None and len(output) > 1 and is_grid(output[1]):
            grid = tuple(output[1])  # a block that shrinks its grid says what it has become
        mixed, memory = _mix(mixer, output[0], added, memory, grid)
        return type(output)([mixed, *output[1:]]), memory
    return _mix(mixer, output, added, memory, grid)


def _call_view(block: nn.Module, changed: Mapping[str, Any], x: Any, *args: Any, **kwargs: Any) -> Any:
    """Calls a view of `block`, sharing everything with it but the children that are named in `changed`."""
    view = object.__new__(type(block))
    modules = {name: module for name, module in block._modules.items() if name not in changed}
    view.__dict__.update(block.__dict__, _modules=modules, **changed)
    if isinstance(x, Proxy):  # torch.fx knows the block by its name, and the view by none
        return x.tracer.call_module(block, view.forward, (x, *args), kwargs)  # type: ignore[union-attr]
    return view(x, *args, **kwargs)


def _mix(mixer: LayerMixer, x: Any, shortcut: Any, memory: Any, grid: Grid | None) -> tuple[Any, Any]:
    """Calls the mixer; where torch.fx traces the network it is one node, since it asks for shapes."""
    if not isinstance(x, Proxy):
        return mixer(x, shortcut, memory, grid=grid)
    tracer: Any = x.tracer

    def as_one_node(*args: Any, **kwargs: Any) -> tuple[Proxy, Proxy]:
        both = tracer.create_proxy("call_module", tracer.path_of_module(mixer), args, kwargs)
        rest = both[1]  # the map comes last: torchvision takes a module's last node for its output
        return both[0], rest

    return tracer.call_module(mixer, as_one_node, (x, shortcut, memory), {"grid": grid})
