"""Which blocks of a network follow one another."""

from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from itertools import pairwise

from torch import Tensor, nn

from .chain_reading import Chain, Refusal, Run, read_chain, with_unread_patches
from .dry_run import Call, DryRun, dry_run
from .wiring import attach_recipe

ContainerNames = str | Sequence[str]
ContainerChoice = ContainerNames | Callable[[str, nn.Module], bool]


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
    refused: list[Refusal] = []
    chains = []
    for run in runs:
        chain = read_chain(model, run, calls, by_path)
        if isinstance(chain, Chain):
            chains.append(chain)
        else:
            refused.append(chain)
    if not chains:
        raise ValueError(_nothing_found(model, containers, loose, refused))
    return [*chains[:-1], with_unread_patches(model, chains[-1])]


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


def _runs(name: str, container: nn.Module, by_path: dict[str, list[Call]]) -> list[Run]:
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
    return [Run(name, tuple(key for key, _ in run), tuple(call for _, call in run)) for run in runs]


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


def _outermost(model: nn.Module, runs: list[Run], loose: dict[str, nn.Module]) -> list[Run]:
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


def _not_within(runs: list[Run]) -> list[Run]:
    taken: list[Run] = []
    for run in sorted(runs, key=lambda run: run.container.count(".")):
        if not _inside(run, taken):
            taken.append(run)
    return taken


def _says_residual(block: nn.Module) -> bool:
    return getattr(block, "has_skip", False) is True


def _inside(run: Run, others: Iterable[Run]) -> bool:
    return any(
        run.container == call.path or run.container.startswith(f"{call.path}.")
        for other in others
        for call in other.calls
    )


def _chosen(containers: dict[str, nn.Module], blocks: ContainerNames) -> dict[str, nn.Module]:
    patterns = [blocks] if isinstance(blocks, str) else list(blocks)
    chosen = {name: one for name, one in containers.items() if any(fnmatchcase(name, p) for p in patterns)}
    if not chosen:
        raise ValueError(
            f"blocks must choose containers of blocks: got {blocks!r}, which chooses none of {', '.join(containers)}"
        )
    return chosen


def _nothing_found(
    model: nn.Module, containers: dict[str, nn.Module], loose: dict[str, nn.Module], refused: list[Refusal]
) -> str:
    seen = f"; looked at {'; '.join(map(str, refused[:5]))}" if refused else ""
    if loose:
        seen += f"; {', '.join(list(loose)[:3])} and so on follow one another, but in no container"
    names = ", ".join(list(containers)[:8]) or "none"
    return (
        f"no chain of blocks was found in this {type(model).__name__}: consecutive blocks of one container, each fed "
        f"by the one before, with outputs of one shape{seen}. Its containers: {names}; name those that hold blocks, as "
        f"in blocks='stages.*.blocks'"
    )
