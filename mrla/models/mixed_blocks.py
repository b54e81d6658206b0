"""A block of a chain, which runs its own forward and then its mixer."""

import copyreg
import functools
import threading
from collections.abc import Callable, Mapping
from operator import is_
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from mrla.ops import Grid, LayerMixer, ResidualEpilogue, unobserved

from .grids import GridFromPatches, is_grid
from .residual_epilogues import epilogue_overrides
from .tensor_memory import Carried, carried_by, grid_carried_by, store
from .wiring import Wiring, set_wiring, wiring_of

# The dynamo of torch 2.11 and older refuses `update` and `items` of a module's __dict__; that of 2.14 follows them.
_DYNAMO_FOLLOWS_VIEWS = torch.__version__ >= (2, 14)  # type: ignore[operator]

MIXER = "mrla"
"""The name under which a block holds its mixer; it ends every new parameter's path: ``layer1.0.mrla.*``."""


class _Call:
    """A call of a block with hooks.

    Attributes:
        mixer: The block's.
        entered: What rode on the input before the hooks.
        left: What the mixer has put on the output.
    """

    def __init__(self, mixer: Any, entered: Carried | None):
        self.mixer = mixer
        self.entered = entered
        self.left: Carried | None = None


_running = threading.local()


class MixedBlock(nn.Module):
    """A block whose `forward` is its plain class's own and then its mixer, within one call of the block.

    `mixed` makes a subclass of this and of a block's class, and `mix_block` puts it in the block's place of a class. So
    whoever calls the block runs the mixer: a loop over `children()`, a checkpoint wrapper, FSDP, a slice. The block
    keeps its children, keys, hooks, name and `isinstance`.

    What later blocks need rides on the output tensor (`tensor_memory`); no module keeps anything. A block without a
    mixer hands on what rides on its input.
    """

    plain_class: ClassVar[type[nn.Module]]
    """The class that the block had before, and has again after `unmix_block`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the block; what rides on its input and output outlives hooks that replace these by new tensors."""
        if torch.compiler.is_compiling() or unobserved(self):
            return super().__call__(*args, **kwargs)
        x = args[0] if args else next(iter(kwargs.values()), None)
        call = _Call(self._modules.get(MIXER), None if isinstance(x, Proxy) else carried_by(x))
        outer, _running.call = getattr(_running, "call", None), call
        try:
            output = super().__call__(*args, **kwargs)
        finally:
            _running.call = outer
        first = _first(output)
        if call.left is None or not isinstance(first, Tensor) or carried_by(first) is not None:
            return output
        kept = store(first, call.left)
        return output if kept is first else _with_first(output, kept)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The plain block's output after the mixer; of an output of several parts the first is the mixer's."""
        x: Any = args[0] if args else next(iter(kwargs.values()), None)
        mixer: Any = self._modules.get(MIXER)
        if mixer is None:
            output = self.plain_class.forward(self, *args, **kwargs)
            return _hand_on(output, x)
        wiring = _known(self)
        changed: dict[str, Any] = {}
        if wiring.shortcut is not None and not isinstance(x, Proxy):
            changed.update(epilogue_overrides(self, mixer))
        if wiring.shortcut == "downsample":
            # Computed once: a second call would update its BatchNorm twice in a training step.
            # By attribute: the dynamo of torch 2.9 does not follow get_submodule.
            shortcut = getattr(self, "downsample")(x)  # noqa: B009  # a block's, not this class's
            changed["downsample"] = lambda _: shortcut
        else:
            shortcut = x if wiring.shortcut == "input" else None
        grid = _grid(wiring, x, args[1:], kwargs)
        output: Any = _forward_with(self, changed, *args, **kwargs)
        first = _first(output)
        if first is not output and grid is not None and len(output) > 1 and is_grid(output[1]):
            grid = (output[1][0], output[1][1])  # a block that shrinks its grid says what it has become
        carries_grid = isinstance(wiring.grid_source, GridFromPatches) and wiring.grid_source.changes
        run = _mix_as_node if isinstance(x, Proxy) else mix
        out = run(mixer, first, shortcut, x, grid, wiring.path, wiring.chain, carries_grid)
        return out if first is output else _with_first(output, out)

    def __prepare_scriptable__(self) -> None:
        """Raises: TorchScript cannot follow a value that rides on a tensor."""
        raise ValueError(
            f"torch.jit.script does not take a network with mixers (block {_known(self).path}): use "
            f"torch.jit.trace, torch.export or mrla.export, or script the plain network, mrla.detach(model)"
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickles by the plain class: the class that `mixed` makes has no name in a module."""
        reduced = super().__reduce_ex__(protocol)
        by_class = reduced[0] in (copyreg.__newobj__, copyreg._reconstructor)  # type: ignore[attr-defined]
        if not by_class or type(self) is not mixed(self.plain_class):  # something has put a class of its own on top
            return reduced
        return _new, (self.plain_class,), *reduced[2:]


@functools.cache
def mixed(plain_class: type[nn.Module]) -> type[MixedBlock]:
    """The class of blocks of a plain class that run their mixers."""

    @functools.wraps(plain_class.forward)  # its signature, which torch.fx and others read
    def forward(self: MixedBlock, *args: Any, **kwargs: Any) -> Any:
        return MixedBlock.forward(self, *args, **kwargs)

    names = {"__module__": plain_class.__module__, "__qualname__": plain_class.__qualname__}
    attributes = {**names, "__doc__": plain_class.__doc__, "plain_class": plain_class, "forward": forward}
    return type(plain_class.__name__, (MixedBlock, plain_class), attributes)  # type: ignore[return-value]


def mix_block(block: nn.Module, mixer: LayerMixer | None, wiring: Wiring) -> None:
    """Makes a block run a mixer after its own forward.

    Args:
        block: A block, changed in place.
        mixer: Its mixer; None for a block of a chain that has none and hands memory on.
        wiring: What the block has to know.
    """
    if mixer is not None:
        block.add_module(MIXER, mixer)
    block.__class__ = mixed(type(block))
    set_wiring(block, wiring)


def unmix_block(block: nn.Module) -> None:
    """Makes a block a plain one again.

    Args:
        block: A block that `mix_block` has worked on, changed in place.

    Raises:
        ValueError: If something has put a class of its own on top of the block's.
    """
    assert isinstance(block, MixedBlock)
    plain_class, wiring = block.plain_class, _known(block)
    if type(block) is not mixed(plain_class):
        raise ValueError(
            f"detach needs blocks of the class that attach has left: {wiring.path} has become a "
            f"{type(block).__name__}; first undo what was put on top (parametrizations, FSDP2)"
        )
    if isinstance(wiring.grid_source, GridFromPatches):
        wiring.grid_source.detach()
    block._modules.pop(MIXER, None)
    set_wiring(block, None)
    block.__class__ = plain_class  # type: ignore[assignment]


def with_memory(x: Tensor, block: nn.Module, memory: Any) -> Tensor:
    """A block's input with memory on it, for a block that is called outside of its chain.

    Args:
        x: The block's input.
        block: A block with a mixer that reads memory.
        memory: What the mixers before it left, as the mixer of one of them returns it.

    Returns:
        The tensor to call the block with: `x`, or in a compiled graph a view of it.
    """
    return store(x, Carried(_known(block).chain, memory, None, torch.is_grad_enabled()))


@torch.fx.wrap
def mix(
    mixer: Any, output: Any, shortcut: Any, x: Any, grid: Grid | None, path: str, chain: str, carries_grid: bool
) -> Tensor:
    """A block's new output, with what later blocks need on it.

    Args:
        mixer: The block's mixer.
        output: What the block's own forward gave: a tensor, or the epilogue that it left to the mixer.
        shortcut: What the block added; None where that is not known.
        x: The block's input, on which the memory of the blocks before rides.
        grid: Rows and columns of patch tokens.
        path: The block's path, for errors.
        chain: The chain that it stands in.
        carries_grid: Whether later blocks need the grid from here.

    Returns:
        The new output.

    Raises:
        RuntimeError: If the mixer needs the memory of the blocks before and it does not ride on `x`, or its gradients
            would be wrong.
    """
    carries, place = mixer.carries_memory, mixer.place
    call = None if torch.compiler.is_compiling() else getattr(_running, "call", None)
    call = call if call is not None and call.mixer is mixer else None
    memory = None
    if carries and place is not None and place.index > 0:
        memory = _memory(x, None if call is None else call.entered, path, chain)
    if isinstance(output, ResidualEpilogue):
        out, memory = mixer.forward_fused(output, memory)
    else:
        out, memory = mixer(output, shortcut, memory, grid=grid)
    carries = carries and (place is None or place.index + 1 < place.length)  # nobody reads what the last one leaves
    if not carries and not carries_grid:
        return out
    left = Carried(chain, memory if carries else None, grid if carries_grid else None, torch.is_grad_enabled())
    if call is not None:
        call.left = left
    return store(out, left)


def _memory(x: Any, entered: Carried | None, path: str, chain: str) -> Any:
    """The memory that rides on a block's input, or rode on it before the block's hooks."""
    carried = carried_by(x) or entered
    if carried is None or carried.memory is None or carried.chain != chain:
        raise RuntimeError(
            f"block {path} needs the memory of the blocks before it in its chain, which begins with {chain}, and its "
            f"input does not carry it: a new tensor was made between two blocks (clone, detach, a hook), blocks were "
            f"called out of order or without {chain}, or checkpointing is reentrant; call the blocks in order with "
            f"one another's outputs, and checkpoint with use_reentrant=False"
        )
    if not torch.compiler.is_compiling() and not carried.with_grad and x.grad_fn is not None:
        # A reentrant checkpoint hands out the tensor that was made under no_grad: its memory has no gradient.
        raise RuntimeError(
            f"block {path} got the output of a block under reentrant checkpointing, whose memory has no gradient: "
            f"checkpoint with use_reentrant=False"
        )
    return carried.memory


def _hand_on(output: Any, x: Any) -> Any:
    """The output of a block without a mixer, with what rides on its input."""
    carried = None if isinstance(x, Proxy) else carried_by(x)
    first = _first(output)
    if carried is None or first is x or not isinstance(first, Tensor):
        return output
    passed = store(first, carried._replace(with_grad=torch.is_grad_enabled() and carried.with_grad))
    return passed if first is output else _with_first(output, passed)


def _grid(wiring: Wiring, x: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Grid | None:
    """Rows and columns of patch tokens."""
    source = wiring.grid_source
    if not isinstance(source, GridFromPatches):
        return None if source is None else source.grid(args, kwargs)
    if not source.changes or isinstance(x, Proxy):
        return source.grid(x)
    if (grid := grid_carried_by(x)) is not None:
        return grid
    grid = source.grid(x)
    if grid is not None and not torch.compiler.is_compiling() and (torch.is_grad_enabled() or x.requires_grad):
        # Checkpointing calls the block again in backward, when another image may have been the last.
        store(x, Carried(wiring.chain, None, grid, torch.is_grad_enabled()))
    return grid


def _known(block: nn.Module) -> Wiring:
    wiring = wiring_of(block)
    assert wiring is not None  # mix_block sets both the class and this
    return wiring


def _mix_as_node(mixer: LayerMixer, output: Any, shortcut: Any, x: Proxy, *rest: Any) -> Any:
    """`mix` where torch.fx traces the network: one node, since a mixer asks for shapes and memory rides on tensors."""
    tracer: Any = x.tracer
    # Not by create_proxy, which torchvision's tracer notes as a feature; a module is none.
    node = Proxy(tracer.create_node("get_attr", tracer.path_of_module(mixer), (), {}), tracer)
    path, *_ = rest[1:]
    mixed_output: Any = mix(node, output, shortcut, x, *rest)
    for _ in range(path.count(".")):
        # torchvision gives a node to one name alone: the last block of a stage has nodes for both names.
        mixed_output = same(mixed_output)
    return mixed_output


@torch.fx.wrap
def same(x: Tensor) -> Tensor:
    """The tensor itself, as a node of a graph."""
    return x


class _StandIn:
    """A block with other children in a graph that an older torch compiles: not a module, and nothing is copied."""

    def __init__(self, block: MixedBlock, changed: Mapping[str, Callable[[Any], Any]]):
        self.block = block
        self.changed = changed

    def __getattr__(self, name: str) -> Any:
        return self.changed[name] if name in self.changed else getattr(self.block, name)


def _forward_with(block: MixedBlock, changed: Mapping[str, Callable[[Any], Any]], *args: Any, **kwargs: Any) -> Any:
    """The block's own forward, with other children in the place of those that are named in `changed`.

    It runs on a view that shares everything with the block, so that threads cannot meet. The view is of the block's
    very class, which may not be ours: parametrizations and FSDP2 put theirs on top.
    """
    if not changed:
        return block.plain_class.forward(block, *args, **kwargs)
    if torch.compiler.is_compiling() and not _DYNAMO_FOLLOWS_VIEWS:
        return block.plain_class.forward(_StandIn(block, changed), *args, **kwargs)  # type: ignore[arg-type]
    view = object.__new__(type(block))
    modules = block._modules.copy()
    for name in changed:
        del modules[name]
    view.__dict__.update(block.__dict__, _modules=modules, **changed)
    if torch.compiler.is_compiling():
        return block.plain_class.forward(view, *args, **kwargs)
    before = view.__dict__.copy()
    output = block.plain_class.forward(view, *args, **kwargs)
    if len(view.__dict__) != len(before) or not all(map(is_, view.__dict__.values(), before.values())):
        for name, value in view.__dict__.items():  # what the block has written to itself
            if name not in before or value is not before[name]:
                block.__dict__[name] = value
    return output


def _first(output: Any) -> Any:
    """The first part of an output of several parts; else the output itself."""
    if isinstance(output, ResidualEpilogue) or not isinstance(output, (tuple, list)):
        return output
    return next(iter(output), output)


def _with_first(output: Any, first: Any) -> Any:
    """An output of several parts with another first one."""
    parts = [first, *output[1:]]
    kind: Any = type(output)
    return kind(*parts) if hasattr(output, "_fields") else kind(parts)


def _new(plain_class: type[nn.Module]) -> MixedBlock:
    """An empty block, for pickle and copy to fill."""
    return mixed(plain_class).__new__(mixed(plain_class))
