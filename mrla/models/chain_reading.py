"""What the blocks of a chain give: layout, channels, tokens and their grid, shortcuts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from timm.layers import PatchEmbed
from torch import nn

from mrla.ops import Layout, resolve_grid

from .dry_run import Call
from .grids import GridFromArgument, grid_made, is_grid, says_grid
from .wiring import ShortcutSource


@dataclass(frozen=True, kw_only=True)
class Chain:
    """Blocks of one container that may hand memory to one another.

    Attributes:
        name: Path of the container in the network, such as ``layer1``.
        blocks: Names of the blocks in their container that can have a mixer, in the order in which they run.
        members: The same, with the blocks between them that have no residual and so no mixer, but hand memory on.
        channels: Channels of every block's output.
        shape: Shape of the blocks' outputs for a batch of two images of the size that the network was tried with.
        layout: How the blocks' outputs are laid out: ``"NCHW"``, ``"NHWC"`` or ``"NLC"``.
        shortcuts: Where a block's shortcut comes from: its input, or its `downsample`; a block whose shortcut is not
            known is not there.
        num_prefix_tokens: Tokens in front of the patches.
        patch_embed: Path of the module that makes the patches and knows their grid; None where there is none.
        takes_grid: Whether the blocks are called with the grid of their tokens.
        patches_unread: Whether the network reads only the prefix tokens of the last block's output.
    """

    name: str
    blocks: tuple[str, ...]
    members: tuple[str, ...]
    channels: int
    shape: tuple[int, ...]
    layout: Layout = "NCHW"
    shortcuts: dict[str, ShortcutSource] = field(default_factory=dict)
    num_prefix_tokens: int = 0
    patch_embed: str | None = None
    takes_grid: bool = False
    patches_unread: bool = False

    @property
    def served(self) -> tuple[str, ...]:
        """The blocks that get a mixer: all, but for the last where nobody reads the patches after it."""
        return self.blocks[:-1] if self.patches_unread else self.blocks


@dataclass(frozen=True)
class Run:
    """Children of one container, each fed by the one before, all outputs of one shape."""

    container: str
    names: tuple[str, ...]
    calls: tuple[Call, ...]


@dataclass(frozen=True)
class Refusal:
    """Why the blocks of a run are no chain.

    Attributes:
        container: Path of their container.
        reason: In a few words.
    """

    container: str
    reason: str

    def __str__(self) -> str:
        return f"{self.container} ({self.reason})"


def read_chain(model: nn.Module, run: Run, calls: list[Call], by_path: dict[str, list[Call]]) -> Chain | Refusal:
    """The chain of a run of blocks, or why their outputs cannot be read.

    Args:
        model: The network.
        run: The blocks.
        calls: What every module of the network was called with, in order.
        by_path: The same, by the module's path.
    """
    last = run.calls[-1].returned
    assert last is not None
    shape = tuple(last.shape)
    batch = calls[0].given.shape[0] if calls[0].given is not None else shape[0]
    if len(shape) not in (3, 4) or shape[0] != batch:
        return Refusal(run.container, f"outputs of shape {shape} for a batch of {batch}")
    axis = _channel_axis(model, run.calls[-1], calls)
    if axis is None or (len(shape) == 3 and axis == 1):
        return Refusal(run.container, f"outputs of shape {shape} whose channels are not found")
    layout: Layout = "NLC" if len(shape) == 3 else "NCHW" if axis == 1 else "NHWC"
    image = calls[0].given
    if layout == "NHWC" and image is not None and image.ndim == 4 and not _in_proportion(shape[1:3], image.shape[2:]):
        return Refusal(
            run.container, f"outputs of shape {shape} that are no map of an image of shape {tuple(image.shape)}"
        )
    tokens: dict[str, Any] = {}
    if layout == "NLC":
        found = _tokens(model, run, shape[1], calls)
        if found is None:
            return Refusal(run.container, f"{shape[1]} tokens that form no grid that is known")
        tokens = found
    modules = [model.get_submodule(call.path) for call in run.calls]
    served = [at for at, block in enumerate(modules) if getattr(block, "has_skip", True)]
    if not served:
        return Refusal(run.container, "no block with a residual")
    sources: dict[str, ShortcutSource | None] = {
        run.names[at]: _shortcut_source(modules[at], run.calls[at], by_path) for at in served
    }
    known: dict[str, ShortcutSource] = {name: source for name, source in sources.items() if source is not None}
    return Chain(
        name=run.container,
        blocks=tuple(run.names[at] for at in served),
        members=run.names[served[0] : served[-1] + 1],
        channels=shape[axis],
        shape=shape,
        layout=layout,
        shortcuts=known,
        **tokens,
    )


def _in_proportion(sides: Sequence[int], image: Sequence[int]) -> bool:
    """Whether a map's sides are the image's divided by one number and rounded; those of tokens in groups are not."""
    return abs(sides[0] * image[1] - sides[1] * image[0]) <= image[0] + image[1]


def _shortcut_source(block: nn.Module, call: Call, by_path: dict[str, list[Call]]) -> ShortcutSource | None:
    assert call.given is not None
    assert call.returned is not None
    if isinstance(getattr(block, "downsample", None), nn.Module):
        inner = by_path.get(f"{call.path}.downsample", [])
        fits = len(inner) == 1 and inner[0].given is call.given and inner[0].returned is not None
        if fits and inner[0].returned.shape == call.returned.shape:  # type: ignore[union-attr]
            return "downsample"
    return "input" if call.given.shape == call.returned.shape else None


def _channel_axis(model: nn.Module, block: Call, calls: list[Call]) -> int | None:
    """Which axis of a block's output holds the channels: 1, the last, or None where its layers do not tell.

    A layer that takes the block's own input tells it by its width; else most of the block's layers do, by which axis of
    the output is as wide as they are.
    """
    assert block.given is not None
    assert block.returned is not None
    layers = [
        (call, model.get_submodule(call.path), width)
        for call in calls
        if call.path.startswith(f"{block.path}.") and (width := _width(model.get_submodule(call.path))) is not None
    ]
    last = block.returned.ndim - 1
    for call, layer, width in layers:
        if call.given is block.given and block.given.ndim == last + 1:
            first, end = block.given.shape[1] == width, block.given.shape[-1] == width
            if first != end:
                return 1 if first else last
            if first:  # a square of features: the layer's own kind says which axis it works on
                return 1 if _works_on_maps(layer) else last
    shape = block.returned.shape
    if shape[1] != shape[-1]:
        votes = [1 if width == shape[1] else last for _, _, width in layers if width in (shape[1], shape[-1])]
    else:
        alike = [layer for call, layer, width in layers if width == shape[1] and call.given is not None]
        votes = [1 if _works_on_maps(layer) else last for layer in alike]
    return max(set(votes), key=votes.count) if votes else None


def _width(layer: nn.Module) -> int | None:
    """How many channels a layer takes, if it says so."""
    for attribute in ("in_channels", "num_features", "num_channels", "normalized_shape", "in_features"):
        width = getattr(layer, attribute, None)
        width = width[-1] if isinstance(width, (tuple, list)) and width else width
        if isinstance(width, int):
            return width
    return None


def _works_on_maps(layer: nn.Module) -> bool:
    return any(hasattr(layer, name) for name in ("in_channels", "num_features", "num_channels")) or (
        "2d" in type(layer).__name__
    )


def _tokens(model: nn.Module, run: Run, tokens: int, calls: list[Call]) -> dict[str, Any] | None:
    """Prefix and grid of a run's tokens: from what its blocks are called with, what made the patches, or a square."""
    owner, network = _nearest_with("patch_embed", model, run.container)
    if hasattr(network, "unroll"):  # Hiera's tokens lie in the order of its mask units: in no grid of rows
        return None
    declared = getattr(network, "num_prefix_tokens", None)
    prefixes: list[int] = list(dict.fromkeys([*([declared] if isinstance(declared, int) else []), 0, 1, 2]))
    last = run.calls[-1]
    said = GridFromArgument().grid(last.args[1:], last.kwargs)
    makers = _patch_makers(model, f"{owner}.patch_embed" if owner else "patch_embed", calls)
    for prefix in prefixes:
        if said is not None and math.prod(said) + prefix == tokens:
            return {"num_prefix_tokens": prefix, "takes_grid": True}
    for prefix in prefixes:
        for path, grid in makers.items():
            if math.prod(grid) + prefix == tokens:
                return {"num_prefix_tokens": prefix, "patch_embed": path}
    for prefix in prefixes:
        try:
            resolve_grid(tokens, prefix)
        except ValueError:
            continue
        return {"num_prefix_tokens": prefix}
    return None


def _patch_makers(model: nn.Module, likely: str, calls: list[Call]) -> dict[str, tuple[int, ...]]:
    """Modules that make tokens of maps and know the grid, with the grid that they had in the dry run, `likely` first.

    They have it as their `grid_size`, or give it or coordinates beside the tokens; one of timm's for any image gives a
    map.
    """
    makers: dict[str, tuple[int, ...]] = {}
    for call in calls:
        module, output = model.get_submodule(call.path), call.returned
        if isinstance(module, PatchEmbed) and not module.flatten:
            if output is not None:
                makers[call.path] = tuple(output.shape[1:3])
        elif is_grid(grid := getattr(module, "grid_size", None)):
            makers[call.path] = tuple(grid)  # type: ignore[arg-type]
        elif call.given is not None and call.given.ndim == 4 and says_grid(module, call.output):
            if (grid := grid_made(module, call.args, call.kwargs, call.output)) is not None:
                makers[call.path] = grid
    return {path: makers[path] for path in sorted(makers, key=lambda path: path != likely)}


def with_unread_patches(model: nn.Module, chain: Chain) -> Chain:
    """The network's last chain, which says whether only its prefix tokens are read."""
    _, network = _nearest_with("global_pool", model, chain.name)
    pool = getattr(network, "global_pool", None)
    reads_token = pool == "token" or (pool is None and hasattr(model, "class_token"))
    return replace(chain, patches_unread=bool(chain.num_prefix_tokens) and reads_token)


def _nearest_with(attribute: str, model: nn.Module, path: str) -> tuple[str, nn.Module]:
    """The nearest module around `path` that has an attribute, and its own path; the whole network if none has."""
    while path and not hasattr(model.get_submodule(path), attribute):
        path = path.rpartition(".")[0]
    return path, model.get_submodule(path)
