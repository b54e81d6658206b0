"""Adding mixers to a built network, and taking them off again."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from mrla.messages.suggestions import nearest
from mrla.ops import ChainPlace, ChainSite, LayerMixer, method_named, options_of

from .chain_reading import Chain
from .chain_search import ContainerChoice, chains_in
from .dry_run import dry_run
from .grids import GridFromArgument, GridFromPatches
from .mixed_blocks import MIXER, MixedBlock, mix_block, unmix_block
from .wiring import Wiring

ModelT = TypeVar("ModelT", bound=nn.Module)

_CLASSES_TO_ATTACH_BEFORE = ("DistributedDataParallel", "FullyShardedDataParallel", "OptimizedModule", "DataParallel")


def attach(
    model: ModelT,
    method: str = "light",
    *,
    head_dim: int | None = None,
    heads: int | None = None,
    blocks: ContainerChoice | None = None,
    example: Sequence[int] | None = None,
    chain_length: int | None = None,
    without: Sequence[str] = (),
    init: str = "identity",
    drop_path: float = 0.0,
    **options: Any,
) -> ModelT:
    """Gives every block of a network a mixer, through which it attends to the outputs of the blocks before it.

    It works in place. With ``init="identity"`` the outputs are bit for bit those of before; old parameters keep
    their names, and a plain checkpoint still loads with only ``*.mrla.*`` missing.

    Args:
        model: A network of one input, trained or not. Its chains of blocks are found by a dry run; see
            `mrla.models.find_chains`.
        method: ``"light"``, ``"base"`` or ``"exact"``; ``"dw"`` for the control with no attention.
        head_dim: Channels per head; the method's own where neither this nor `heads` is given.
        heads: Number of heads, in place of `head_dim`.
        blocks: Which containers hold the blocks, where they are not found: a pattern of paths such as
            ``"stages.*.blocks"``, a list of paths or patterns, or a function of path and module.
        example: Shape of the input, the batch included, where the network does not tell of it.
        chain_length: Memory begins anew every so many blocks (the released DeiT-base: 4); None for once a stage.
        without: Paths of blocks that get no mixer, such as ``["layer1.0"]``; the others attend to one another as if
            these stood in no chain. `mrla.prune` shows which.
        init: ``"identity"`` for a trained network; ``"released"`` or ``"notebook"`` to train from scratch as the
            authors' code or the Paddle notebook does. Only the mixers are drawn.
        drop_path: Probability of leaving a mixer's branch out for an image, in training.
        options: The method's own, as its mixer takes them (`mrla.ops.MRLALight`, `MRLABase`, `LayerAttention`,
            `DepthwiseMixer`): `carry`, `weighting`, `last`, `norm`, `value_act`, `out_act`.

    Returns:
        `model` itself.

    Raises:
        ValueError: If no chain of blocks is found, the network already has mixers or is wrapped (DDP, compiled,
            scripted), or an option's value does not fit.
        TypeError: If the method has no such option, or `model` is not a module.

    Example:
        >>> import mrla, timm, torch
        >>> model = timm.create_model("resnet18", num_classes=10).eval()
        >>> image = torch.randn(1, 3, 64, 64)
        >>> before = model(image)
        >>> torch.equal(mrla.attach(model, "light")(image), before)
        True
    """
    if callable(blocks):  # by name from here on, so that the recipe can be saved
        chosen = blocks
        blocks = [name for name, module in model.named_modules() if chosen(name, module)]
    recipe = {
        "method": method,
        "head_dim": head_dim,
        "heads": heads,
        "blocks": blocks if blocks is None or isinstance(blocks, str) else list(blocks),
        "example": example if example is None else list(example),
        "chain_length": chain_length,
        "init": init,
        "drop_path": drop_path,
        **options,
    }
    if without := [without] if isinstance(without, str) else list(without):
        recipe["without"] = without
    _check_attachable(model)
    if chain_length is not None and chain_length < 1:
        raise ValueError(f"chain_length must be at least 1 block, or None for once a stage: got {chain_length}")
    arguments = _mixer_arguments(recipe)
    # Everything that can fail comes before the first change to the model.
    run = dry_run(model, example)
    chains = chains_in(run, blocks)
    mixers = [_make_mixers(model, chain, method_named(method), chain_length, without, arguments) for chain in chains]
    _check_without(chains, mixers, without)
    if not any(mixers):
        raise ValueError(
            f"a mixer must have somebody who reads it: of this {type(model).__name__}'s only block, in "
            f"{chains[-1].name}, only the class token is read; build it with another pooling, or with more blocks"
        )
    for chain, chain_mixers in zip(chains, mixers, strict=True):
        _mix_chain(model, chain, chain_mixers)
    model.mrla_recipe = recipe  # type: ignore[assignment]
    try:
        _check_every_mixer_runs(model, run.shape)
    except BaseException:
        detach(model)
        raise
    return model


def _mix_chain(model: nn.Module, chain: Chain, mixers: Mapping[str, LayerMixer]) -> None:
    """Gives the blocks of one chain their mixers; those between them that have none hand memory on."""
    if not mixers:
        return
    container, grid_source = model.get_submodule(chain.name), _grid_source(model, chain)
    at = [chain.members.index(name) for name in mixers]
    for name in chain.members[at[0] : at[-1] + 1]:
        block, mixer = container.get_submodule(name), mixers.get(name)
        path = block_path(chain.name, name)
        if mixer is not None:
            mixer.train(block.training)
            if mixer.place is None or mixer.place.index == 0:
                head = path
        mix_block(block, mixer, Wiring(path, head, chain.shortcuts.get(name), grid_source))


def _check_every_mixer_runs(model: nn.Module, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless the network's own forward calls every mixer exactly once."""
    try:
        calls = dry_run(model, shape).calls
    except ValueError as error:
        raise ValueError(f"attach is undone, since the network does not run with mixers: {error}") from error
    times = Counter(call.path for call in calls)
    mixers = [path for path, module in model.named_modules() if isinstance(module, LayerMixer)]
    if wrong := [path for path in mixers if times[path] != 1]:
        counts = ", ".join(f"{path.removesuffix(f'.{MIXER}')} {times[path]} times" for path in wrong[:5])
        raise ValueError(
            f"attach is undone: the network's forward must call every mixer once, and calls those of {len(wrong)} "
            f"blocks otherwise ({counts}); a forward that was put on a block, or a wrapper around it, hides them: "
            f"attach first, then patch or wrap"
        )


def detach(model: ModelT) -> ModelT:
    """Takes every mixer off again and gives the original network back, bit for bit.

    Args:
        model: A network that `attach` has worked on.

    Returns:
        `model` itself, with the classes, keys and key order that it had before.

    Raises:
        ValueError: If the network has no mixers.

    Example:
        >>> import mrla, timm
        >>> model = timm.create_model("resnet18")
        >>> keys = list(model.state_dict())
        >>> list(mrla.detach(mrla.attach(model)).state_dict()) == keys
        True
    """
    if not is_attached(model):
        raise ValueError(f"detach takes off what attach has added: this {type(model).__name__} has no mixers")
    for block in [module for module in model.modules() if isinstance(module, MixedBlock)]:
        unmix_block(block)
    for module in model.modules():  # timm's wrappers for features hold the network that was attached to
        module.__dict__.pop("mrla_recipe", None)
    return model


def is_attached(model: nn.Module) -> bool:
    """Whether any block of `model` has a mixer.

    Args:
        model: Any network.

    Returns:
        Whether one has.

    Example:
        >>> import timm
        >>> model = timm.create_model("resnet18_cifar")
        >>> is_attached(model), is_attached(attach(model))
        (False, True)
    """
    return any(isinstance(module, LayerMixer) for module in model.modules())


def _check_attachable(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"attach needs a torch.nn.Module: got {type(model).__name__}")
    if is_attached(model):
        raise ValueError(f"this {type(model).__name__} already has mixers: call mrla.detach(model) first")
    if isinstance(model, torch.jit.ScriptModule) or type(model).__name__ in _CLASSES_TO_ATTACH_BEFORE:
        raise ValueError(f"attach before wrapping: {type(model).__name__} hides the blocks; attach first, then wrap")


def _mixer_arguments(recipe: dict[str, Any]) -> dict[str, Any]:
    """What the method's mixer is built with, checked against what it takes."""
    arguments = dict(recipe)
    method = arguments.pop("method")
    for name in ("blocks", "example", "chain_length", "without"):  # the chains', not the mixers'
        arguments.pop(name, None)
    accepted = options_of(method_named(method))
    for name in ("head_dim", "heads"):  # attach has these for every method; not every method has heads
        if name not in accepted and arguments[name] is None:
            del arguments[name]
    if unknown := sorted(set(arguments) - accepted):
        raise TypeError(f"method {method!r} takes {', '.join(sorted(accepted))}: got {', '.join(unknown)}")
    return arguments


def _make_mixers(
    model: nn.Module,
    chain: Chain,
    mixer_class: type[LayerMixer],
    chain_length: int | None,
    without: Sequence[str],
    arguments: dict[str, Any],
) -> dict[str, LayerMixer]:
    """A mixer for each block of a chain that gets one, by the block's name."""
    mixers: dict[str, LayerMixer] = {}
    container = model.get_submodule(chain.name)
    # The released form works on the class token too, which is read.
    served = chain.blocks if arguments.get("norm") == "pre_layer" else chain.served
    places = _places(chain, served, chain_length)
    kept = close_up(places, [name for name in served if block_path(chain.name, name) not in without])
    references = {
        name: next(one for one in container.get_submodule(name).parameters() if one.is_floating_point())
        for name in kept
    }
    sites = {
        name: ChainSite(
            channels=chain.channels,  # type: ignore[arg-type]
            place=place,
            has_shortcut=name in chain.shortcuts,
            layout=chain.layout,
            num_prefix_tokens=chain.num_prefix_tokens,
            device="meta" if references[name].device.type == "meta" else "cpu",
        )
        for name, place in kept.items()
    }
    # Made outside inference mode (such parameters could never train), without touching the global random state.
    with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
        for names in _by_head(kept):
            built = mixer_class.build_chain([sites[name] for name in names], **arguments)
            _check_built(mixer_class, built, len(names))
            for name, mixer in zip(names, built, strict=True):
                mixers[name] = mixer.to(device=references[name].device, dtype=references[name].dtype)
    return mixers


def _by_head(places: Mapping[str, ChainPlace]) -> list[list[str]]:
    """The names of each chain that begins with an index of 0, in order."""
    chains: list[list[str]] = []
    for name, place in places.items():
        if place.index == 0 or not chains:
            chains.append([])
        chains[-1].append(name)
    return chains


def _check_built(mixer_class: type[LayerMixer], built: Sequence[Any], count: int) -> None:
    if len(built) != count or len({id(mixer) for mixer in built}) != count:
        raise ValueError(
            f"build_chain must give each block of a chain a mixer of its own: {mixer_class.__name__} gave "
            f"{len({id(mixer) for mixer in built})} for {count} blocks; share modules between mixers by mixer.share"
        )
    for mixer in built:
        if not isinstance(mixer, LayerMixer):
            raise TypeError(
                f"build_chain must give mixers: that of {mixer_class.__name__} gave a {type(mixer).__name__}"
            )


def _places(chain: Chain, served: Sequence[str], chain_length: int | None) -> dict[str, ChainPlace]:
    """Where each block of a chain stands, by its name, if all of `served` get a mixer."""
    length = chain_length or len(served)
    places = {}
    for at, name in enumerate(served):
        begins = at // length * length
        ends = min(begins + length, len(served))
        unread = int(chain.patches_unread and ends == len(chain.blocks))
        places[name] = ChainPlace(index=at - begins, length=ends - begins, unread=unread)
    return places


def close_up(places: Mapping[str, ChainPlace], kept: Sequence[str]) -> dict[str, ChainPlace]:
    """The places of those that are kept when the others leave.

    Args:
        places: Places by name, in order; an index of 0 begins a chain.
        kept: The names that stay.

    Returns:
        Their new places, in the same order.

    Example:
        >>> places = {"a": ChainPlace(0, 3), "b": ChainPlace(1, 3), "c": ChainPlace(2, 3)}
        >>> close_up(places, ["b", "c"])["b"]
        ChainPlace(index=0, length=2, unread=0)
    """
    closed = {}
    for chain in _by_head(places):
        left = [name for name in chain if name in kept]
        # Nobody reads the patches behind the last block alone.
        unread = places[chain[-1]].unread if left and left[-1] == chain[-1] else 0
        closed |= {name: ChainPlace(index, len(left), unread) for index, name in enumerate(left)}
    return closed


def block_path(container: str, name: str) -> str:
    """The path of a block in its network; the network itself may be the container."""
    return f"{container}.{name}" if container else name


def _check_without(chains: Sequence[Chain], mixers: Sequence[Mapping[str, LayerMixer]], without: Sequence[str]) -> None:
    if not without:
        return
    known = [block_path(chain.name, name) for chain in chains for name in chain.blocks]
    for path in without:
        if path not in known:
            raise ValueError(
                f"without must name blocks of the network's chains: got {path!r}{nearest(path, known)}; mrla.chains "
                f"lists them"
            )
    if not any(mixers):
        raise ValueError(
            f"without must leave a block that gets a mixer: got all of {', '.join(without)}; use the plain network"
        )


def _grid_source(model: nn.Module, chain: Chain) -> GridFromArgument | GridFromPatches | None:
    if chain.takes_grid:
        return GridFromArgument()
    if chain.patch_embed is None:
        return None
    return GridFromPatches(model.get_submodule(chain.patch_embed), chain.num_prefix_tokens)
