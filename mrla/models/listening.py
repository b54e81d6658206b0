"""What the mixers of a network hear, noted while it runs; and the network with something cut out."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mrla.messages.suggestions import nearest
from mrla.ops import ChainPlace, Heard, LayerMixer, Terms, retrieval

from .attachment import ModelT, close_up
from .mixed_blocks import MIXER, MixedBlock
from .wiring import attach_recipe, wiring_of


class MixedChain(NamedTuple):
    """Blocks of a network that hear one another.

    Attributes:
        name: Path of the container that holds them.
        blocks: Paths of the blocks, from the first that has a mixer to the last; some between may have none.
        mixers: Paths of those that have one.
    """

    name: str
    blocks: tuple[str, ...]
    mixers: tuple[str, ...]


def mixed_chains(model: nn.Module) -> list[MixedChain]:
    """The chains of a network with mixers, in the order in which it holds them.

    Args:
        model: A network that `mrla.attach` has worked on, wrapped (DDP, compiled) or not.

    Returns:
        The chains.

    Raises:
        ValueError: If it has no mixers.

    Example:
        >>> import mrla, timm
        >>> [chain.blocks for chain in mixed_chains(mrla.attach(timm.create_model("resnet18")))][0]
        ('layer1.0', 'layer1.1')
    """
    chains = []
    for blocks in _blocks_by_chain(_unwrapped(model)):
        paths = list(blocks)
        mixers = [path for path, block in blocks.items() if _mixer_of(block) is not None]
        first, last = paths.index(mixers[0]), paths.index(mixers[-1])
        container, _, _ = mixers[0].rpartition(".")
        chains.append(MixedChain(container, tuple(paths[first : last + 1]), tuple(mixers)))
    if not chains:
        raise ValueError(
            f"this {type(model).__name__} has no mixers, so nothing is heard in it: add them with mrla.attach(model)"
        )
    return chains


class Recording:
    """What the mixers of a network heard, image by image, since it began or was last cleared."""

    def __init__(self, chains: Sequence[MixedChain]):
        self.chains = list(chains)
        self._heard: dict[str, list[Heard | None]] = {block: [] for chain in chains for block in chain.mixers}
        self._terms: dict[str, list[Terms]] = {}

    @torch.no_grad()
    def retrieval(self) -> list[tuple[MixedChain, Tensor]]:
        """How much each head of each block heard each source, by `mrla.ops.retrieval`.

        Returns:
            For each chain that ran and says what it hears: (images, heads, blocks, 1 + blocks); source 0 is what came
            into the chain. NaN where a block cannot hear a source.

        Raises:
            ValueError: If only a part of a chain was run.
        """
        maps = []
        for chain in self.chains:
            calls = [self._heard[block] for block in chain.mixers]
            if len({len(one) for one in calls}) > 1:
                counts = ", ".join(f"{block} {len(self._heard[block])}" for block in chain.mixers)
                raise ValueError(f"every block of a chain must run as often as the others to be recorded: got {counts}")
            passes = [dict(zip(chain.mixers, heard, strict=True)) for heard in zip(*calls, strict=True)]
            passes = [heard for heard in passes if any(one is not None for one in heard.values())]
            if passes:
                found = [retrieval([heard.get(block) for block in chain.blocks]) for heard in passes]
                maps.append((chain, torch.cat(found)))
        return maps

    def terms(self) -> dict[str, Terms]:
        """How long the two terms of each light mixer's update were for each image, by the block's path."""
        return {
            block: Terms(*(torch.cat(parts) for parts in zip(*noted, strict=True)))
            for block, noted in self._terms.items()
        }

    def clear(self) -> None:
        """Forgets what was noted, as before the next batch."""
        for noted in (*self._heard.values(), *self._terms.values()):
            noted.clear()

    def note(self, block: str, heard: Heard | None, terms: Terms | None) -> None:
        """Adds what one mixer heard of one batch."""
        if heard is not None and heard.decay is not None:
            heard = heard._replace(decay=heard.decay.detach().clone())  # as it was then: a step of training changes it
        self._heard[block].append(heard)
        if terms is not None:
            self._terms.setdefault(block, []).append(terms)


@contextmanager
def recording(model: nn.Module, *, terms: bool = False) -> Iterator[Recording]:
    """The body with everything noted that the mixers of a network hear in it.

    Outside nothing is noted and nothing is asked. Inside each mixer has a hook, so its block runs without the kernels
    that take in a block's end; compiled networks run as they were written. The network says the same, within rounding.

    Args:
        model: A network with mixers.
        terms: Whether the lengths of light's two terms are noted too; it makes every value a second time.

    Yields:
        What is noted.

    Raises:
        ValueError: If the network has no mixers.

    Example:
        >>> import mrla, timm
        >>> model = mrla.attach(timm.create_model("resnet18"), "base").eval()
        >>> with torch.no_grad(), recording(model) as heard:
        ...     _ = model(torch.randn(2, 3, 64, 64))
        >>> chain, weights = heard.retrieval()[0]
        >>> chain.name, tuple(weights.shape)
        ('layer1', (2, 4, 2, 3))
    """
    noted = Recording(mixed_chains(model))
    own = _unwrapped(model)
    handles = []
    try:
        for chain in noted.chains:
            for block in chain.mixers:
                handles.append(_listen(own, block, noted, terms))
        with _eager():
            yield noted
    finally:
        for handle in handles:
            handle.remove()


def _listen(model: nn.Module, block: str, noted: Recording, terms: bool) -> Any:
    def listen(mixer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        with torch.no_grad():
            heard = mixer.hears(*args, **kwargs)
            noted.note(block, heard, mixer.terms(*args, **kwargs) if terms else None)

    return model.get_submodule(f"{block}.{MIXER}").register_forward_pre_hook(listen, with_kwargs=True)


@contextmanager
def cut(model: nn.Module, block: str, *, back: int | None = None, head: int | None = None) -> Iterator[None]:
    """The body with one mixer taken out of a network, or one thing that it hears.

    Args:
        model: A network with mixers, in eval mode.
        block: Path of the mixer's block.
        back: The block so many before it is not heard, see `mrla.ops.LayerMixer.deaf`.
        head: This head retrieves nothing, likewise. With neither the mixer is out, as after `remove_mixers`.

    Yields:
        Nothing.

    Raises:
        ValueError: If there is no such mixer, block before it, or head.

    Example:
        >>> import mrla, timm
        >>> model = mrla.attach(timm.create_model("resnet18"), init="released").eval()
        >>> image = torch.randn(1, 3, 64, 64)
        >>> whole = model(image)
        >>> with cut(model, "layer4.1"):
        ...     torch.equal(model(image), whole)
        False
        >>> torch.equal(model(image), whole)
        True
    """
    own = _unwrapped(model)
    _check_mixed(own, [block])
    if back is None and head is None:
        with _eager(), _taken_out(own, block):
            yield
        return

    def instead(mixer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        return mixer.deaf(*args, **kwargs, back=back, head=head)

    handle = own.get_submodule(f"{block}.{MIXER}").register_forward_hook(instead, with_kwargs=True)
    try:
        with _eager():
            yield
    finally:
        handle.remove()


@contextmanager
def _taken_out(model: nn.Module, block: str) -> Iterator[None]:
    mixers = next(mixers for mixers in _mixers_by_chain(model) if block in mixers)
    before = {path: mixer.place for path, mixer in mixers.items()}
    after = _places_without(mixers, [block])
    holder = model.get_submodule(block)
    try:
        holder._modules[MIXER] = None  # its place among the children stays
        for path, place in after.items():
            mixers[path].place = place
        yield
    finally:
        holder._modules[MIXER] = mixers[block]
        for path, mixer in mixers.items():
            mixer.place = before[path]


def remove_mixers(model: ModelT, blocks: Sequence[str]) -> ModelT:
    """Takes the mixers of some blocks off for good; the others hear one another as if these stood in no chain.

    Args:
        model: A network with mixers; changed in place.
        blocks: Paths of the blocks.

    Returns:
        `model` itself; `mrla.save` and `mrla.load` keep it so.

    Raises:
        ValueError: If a block has no mixer, or none would be left.

    Example:
        >>> import mrla, timm
        >>> model = remove_mixers(mrla.attach(timm.create_model("resnet18")), ["layer1.0"])
        >>> mixed_chains(model)[0].mixers
        ('layer1.1',)
    """
    known = _check_mixed(model, blocks)
    if len(set(blocks)) == len(known):
        raise ValueError("a mixer must be left: got all of them; mrla.detach(model) gives the plain network back")
    for mixers in _mixers_by_chain(model):
        for path, place in _places_without(mixers, blocks).items():
            mixers[path].move(place)
        for path in mixers.keys() & set(blocks):
            del model.get_submodule(path)._modules[MIXER]
    recipe = attach_recipe(model)
    if recipe is not None:
        removed = {*recipe.get("without", ()), *blocks}
        model.mrla_recipe = {**recipe, "without": sorted(removed)}  # type: ignore[assignment]
    return model


def _check_mixed(model: nn.Module, blocks: Sequence[str]) -> list[str]:
    """The paths of all blocks with a mixer, `blocks` among them."""
    known = [path for chain in mixed_chains(model) for path in chain.mixers]
    for path in blocks:
        if path not in known:
            raise ValueError(f"a block with a mixer must be named: got {path!r}{nearest(path, known)}")
    return known


def _blocks_by_chain(model: nn.Module) -> list[dict[str, nn.Module]]:
    """The blocks of each chain that has mixers, by their paths; the first and the last may have none."""
    chains: list[dict[str, nn.Module]] = []
    before: str | None = None
    for path, block in model.named_modules():
        if not isinstance(block, MixedBlock):
            continue
        mixer, wiring = _mixer_of(block), wiring_of(block)
        assert wiring is not None
        # Two copies of a network may stand in one: then the chain's name is that of the chain before.
        is_head = mixer is not None and (mixer.place is None or mixer.place.index == 0)
        if not chains or is_head or wiring.chain != before:
            chains.append({})
        chains[-1][path] = block
        before = wiring.chain
    return [blocks for blocks in chains if any(_mixer_of(block) is not None for block in blocks.values())]


def _mixers_by_chain(model: nn.Module) -> list[dict[str, LayerMixer]]:
    return [
        {path: mixer for path, block in blocks.items() if (mixer := _mixer_of(block)) is not None}
        for blocks in _blocks_by_chain(model)
    ]


def _places_without(mixers: Mapping[str, LayerMixer], blocks: Sequence[str]) -> dict[str, ChainPlace]:
    places = {path: mixer.place for path, mixer in mixers.items() if mixer.place is not None}
    return close_up(places, [path for path in mixers if path not in blocks])


def _mixer_of(block: nn.Module) -> LayerMixer | None:
    mixer = block._modules.get(MIXER)
    return mixer if isinstance(mixer, LayerMixer) else None


def _unwrapped(model: nn.Module) -> nn.Module:
    """The network in wrappers that hold it under a name of their own, such as DDP's and torch.compile's."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and type(model).__name__ in ("DistributedDataParallel", "DataParallel"):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _eager() -> Any:
    """Compiled code would pass by what is put on a network after it was compiled."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
