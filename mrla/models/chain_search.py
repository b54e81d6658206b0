"""Which blocks of a network follow one another, and what their outputs look like."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import Any

from timm.layers import PatchEmbed
from torch import Tensor, nn

from mrla.ops import Layout, resolve_grid

from .dry_run import Call, DryRun, dry_run
from .grids import GridFromArgument, grid_made, is_grid, says_grid
from .wiring import ShortcutSource, attach_recipe

ContainerNames = str | Sequence[str]
ContainerChoice = ContainerNames | Callable[[str, nn.Module], bool]


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
class _Run:
    """Children of one container, each fed by the one before, all outputs of one shape."""

    container: str
    names: tuple[str, ...]
    calls: tuple[Call, ...]


def find_chains(
    model: nn.Module, blocks: ContainerNames | None = None, example: Sequence[int] | None = None
) -> list[Chain]:
    """The chains of blocks in a network, found by what a dry run shows, in the order of the network.

    A block is a child of a plain container that has parameters and more than one layer. Blocks form a chain where each
    is fed by the one before and keeps its shape; the first may change it. Of containers within one another the
    outermost that has a chain counts. A block alone is a chain where it is of a kind that forms chains elsewhere in
    the network; where none does, blocks alone that keep their shape count. A block that says by `has_skip` that it has
    no residual gets no mixer, and one that says it has is a chain even alone.

    Args:
        model: Any network of one input; of one with mixers the chains of the plain one are found, by default in the
            containers and with the input shape that it was attached with.
        blocks: Which containers hold blocks, where the rule is not to find them: a pattern of paths such as
            ``"stages.*.blocks"``, or a list of paths or patterns.
        example: Shape of the input, the batch included; None for the size that the network tells of.

    Returns:
        One chain for each run of blocks.

    Raises:
        ValueError: If there is none, the network does not run, or a block runs several times in one forward pass.

    Example:
        >>> import timm
        >>> [(chain.name, len(chain.blocks), chain.channels) for chain in find_chains(timm.create_model("resnet18"))]
        [('layer1', 2, 64), ('layer2', 2, 128), ('layer3', 2, 256), ('layer4', 2, 512)]
    """
    recipe = attach_recipe(model) or {}
    seen = dry_run(model, recipe.get("example") if example is None else example, plain=True)
    return chains_in(seen, recipe.get("blocks") if blocks is None else blocks)


def chains_in(seen: DryRun, blocks: ContainerNames | None = None) -> list[Chain]:
    """The chains of blocks in a plain network, found by what it did in a dry run.

    Args:
        seen: What `dry_run` gave.
        blocks: As in `find_chains`.

    Returns:
        One chain for each run of blocks.

    Raises:
        ValueError: If there is none, or a block runs several times in one forward pass.
    """
    model, calls = seen.network, seen.calls
    by_path: dict[str, list[Call]] = {}
    for call in calls:
        by_path.setdefault(call.path, []).append(call)
    containers = {name: module for name, module in model.named_modules() if _is_container(name, module, by_path)}
    loose = _loose_blocks(model, containers, by_path)
    if blocks is not None:
        containers = _chosen(containers, blocks)
    _check_called_once(containers, by_path)
    runs = [run for name, module in containers.items() for run in _runs(name, module, by_path)]
    if blocks is None:
        runs = _outermost(model, runs, loose)
    order = {id(call): position for position, call in enumerate(calls)}
    runs.sort(key=lambda run: order[id(run.calls[0])])
    refused: list[str] = []
    chains = []
    for run in runs:
        chain = _describe(model, run, calls, by_path)
        if isinstance(chain, Chain):
            chains.append(chain)
        else:
            refused.append(f"{run.container} ({chain})")
    if not chains:
        raise ValueError(_nothing_found(model, containers, loose, refused))
    return [*chains[:-1], _with_unread_patches(model, chains[-1])]


def _check_called_once(containers: dict[str, nn.Module], by_path: dict[str, list[Call]]) -> None:
    for name, container in containers.items():
        for key, child in container.named_children():
            if _is_block(child) and (times := len(by_path.get(f"{name}.{key}", []))) > 1:
                raise ValueError(
                    f"a block has one place in its chain: {name}.{key} runs {times} times in one forward pass; give "
                    f"each place a block of its own, or name other containers, as in blocks='stages.*.blocks'"
                )


def _is_container(name: str, module: nn.Module, by_path: dict[str, list[Call]]) -> bool:
    """Whether calling `module` does nothing but to call its children one after the other."""
    children = [f"{name}.{key}" if name else key for key, _ in module.named_children()]
    if not children or not name:
        return False
    if type(module).forward in (nn.Sequential.forward, nn.ModuleList.forward):
        return True
    # A class of its own, such as a stage of a RegNet, which loops over its children.
    calls = [by_path.get(path, []) for path in (name, *children)]
    if any(len(call) != 1 for call in calls):
        return False
    whole, *parts = (one for (one,) in calls)
    if any(len(call.args) != 1 or call.kwargs for call in (whole, *parts)):
        return False
    handed_on = [whole.args[0], *(part.output for part in parts)]
    taken = [*(part.args[0] for part in parts), whole.output]
    return all(isinstance(one, Tensor) and one is other for one, other in zip(handed_on, taken, strict=True))


def _is_block(module: nn.Module) -> bool:
    if type(module).forward in (nn.Sequential.forward, nn.ModuleList.forward):
        return False
    leaves = sum(1 for child in module.modules() if not any(True for _ in child.children()))
    return leaves > 1 and any(True for _ in module.parameters())


def _runs(name: str, container: nn.Module, by_path: dict[str, list[Call]]) -> list[_Run]:
    runs: list[list[tuple[str, Call]]] = []
    before: Call | None = None
    for key, child in container.named_children():
        calls = by_path.get(f"{name}.{key}", [])
        call = calls[0] if len(calls) == 1 and _is_block(child) else None
        # A first output that is the input itself: the block works on others, and maybe nobody reads this one.
        if call is None or call.given is None or call.returned is None or call.returned is call.given:
            before = None
            continue
        keeps_shape = call.given.shape == call.returned.shape
        if before is not None and before.returned is call.given and keeps_shape:
            runs[-1].append((key, call))
        else:
            runs.append([(key, call)])
        before = call
    return [_Run(name, tuple(key for key, _ in run), tuple(call for _, call in run)) for run in runs]


def _loose_blocks(
    model: nn.Module, containers: dict[str, nn.Module], by_path: dict[str, list[Call]]
) -> dict[str, nn.Module]:
    """Blocks by path that are attributes of a module where some follow one another, as NASNet's cells do."""
    loose: dict[str, nn.Module] = {}
    for name, parent in model.named_modules():
        if name in containers:
            continue
        blocks = {f"{name}.{key}" if name else key: child for key, child in parent.named_children() if _is_block(child)}
        for (path_before, before), (path, block) in pairwise(blocks.items()):
            if type(before) is type(block) and _follows(by_path.get(path_before, []), by_path.get(path, [])):
                loose |= blocks
    return loose


def _follows(before: list[Call], calls: list[Call]) -> bool:
    if len(before) != 1 or len(calls) != 1 or before[0].returned is None or calls[0].returned is None:
        return False
    given = before[0].returned
    return any(argument is given for argument in calls[0].args) and calls[0].returned.shape == given.shape


def _outermost(model: nn.Module, runs: list[_Run], loose: dict[str, nn.Module]) -> list[_Run]:
    """Runs of several blocks that are in no block of another such run, and single blocks of the same kinds.

    Where there are no such runs single blocks count, but not what is part of a loose block: that is a layer.
    """
    several = _not_within([run for run in runs if len(run.calls) > 1])
    singles = [run for run in runs if len(run.calls) == 1]
    if not several:
        singles = [run for run in singles if not any(run.container.startswith(f"{path}.") for path in loose)]
    models = several or [run for run in singles if run.calls[0].given.shape == run.calls[0].returned.shape]  # type: ignore[union-attr]
    models = models or [run for run in singles if not any(_inside(other, [run]) for other in singles)]
    kinds = {type(model.get_submodule(call.path)) for run in models for call in run.calls}
    alone = {id(run): model.get_submodule(run.calls[0].path) for run in singles}
    alike = [run for run in singles if type(alone[id(run)]) in kinds or _says_residual(alone[id(run)])]
    return _not_within([*several, *alike])


def _not_within(runs: list[_Run]) -> list[_Run]:
    taken: list[_Run] = []
    for run in sorted(runs, key=lambda run: run.container.count(".")):
        if not _inside(run, taken):
            taken.append(run)
    return taken


def _says_residual(block: nn.Module) -> bool:
    return getattr(block, "has_skip", False) is True


def _inside(run: _Run, others: Iterable[_Run]) -> bool:
    return any(
        run.container == call.path or run.container.startswith(f"{call.path}.")
        for other in others
        for call in other.calls
    )


def _describe(model: nn.Module, run: _Run, calls: list[Call], by_path: dict[str, list[Call]]) -> Chain | str:
    """The chain of a run, or why its outputs cannot be read."""
    last = run.calls[-1].returned
    assert last is not None
    shape = tuple(last.shape)
    batch = calls[0].given.shape[0] if calls[0].given is not None else shape[0]
    if len(shape) not in (3, 4) or shape[0] != batch:
        return f"outputs of shape {shape} for a batch of {batch}"
    axis = _channel_axis(model, run.calls[-1], calls)
    if axis is None or (len(shape) == 3 and axis == 1):
        return f"outputs of shape {shape} whose channels are not found"
    layout: Layout = "NLC" if len(shape) == 3 else "NCHW" if axis == 1 else "NHWC"
    image = calls[0].given
    if layout == "NHWC" and image is not None and image.ndim == 4 and not _in_proportion(shape[1:3], image.shape[2:]):
        return f"outputs of shape {shape} that are no map of an image of shape {tuple(image.shape)}"
    tokens: dict[str, Any] = {}
    if layout == "NLC":
        found = _tokens(model, run, shape[1], calls)
        if found is None:
            return f"{shape[1]} tokens that form no grid that is known"
        tokens = found
    modules = [model.get_submodule(call.path) for call in run.calls]
    served = [at for at, block in enumerate(modules) if getattr(block, "has_skip", True)]
    if not served:
        return "no block with a residual"
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


def _tokens(model: nn.Module, run: _Run, tokens: int, calls: list[Call]) -> dict[str, Any] | None:
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


def _with_unread_patches(model: nn.Module, chain: Chain) -> Chain:
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


def _chosen(containers: dict[str, nn.Module], blocks: ContainerNames) -> dict[str, nn.Module]:
    patterns = [blocks] if isinstance(blocks, str) else list(blocks)
    chosen = {name: one for name, one in containers.items() if any(fnmatchcase(name, p) for p in patterns)}
    if not chosen:
        raise ValueError(
            f"blocks must choose containers of blocks: got {blocks!r}, which chooses none of {', '.join(containers)}"
        )
    return chosen


def _nothing_found(
    model: nn.Module, containers: dict[str, nn.Module], loose: dict[str, nn.Module], refused: list[str]
) -> str:
    seen = f"; looked at {'; '.join(refused[:5])}" if refused else ""
    if loose:
        seen += f"; {', '.join(list(loose)[:3])} and so on follow one another, but in no container"
    names = ", ".join(list(containers)[:8]) or "none"
    return (
        f"no chain of blocks was found in this {type(model).__name__}: consecutive blocks of one container, each fed "
        f"by the one before, with outputs of one shape{seen}. Its containers: {names}; name those that hold blocks, as "
        f"in blocks='stages.*.blocks'"
    )
