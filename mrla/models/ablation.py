"""A network with a mixer, an earlier block or a head left out: for the time of a context, or for good."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from mrla.messages.suggestions import nearest
from mrla.ops import ChainPlace, LayerMixer

from .attachment import ModelT, close_up
from .mixed_blocks import MIXER
from .mixed_chains import eager, mixed_chains, mixers_by_chain, unwrapped
from .wiring import attach_recipe


@contextmanager
def ablate(model: nn.Module, block: str, *, lag: int | None = None, head: int | None = None) -> Iterator[None]:
    """Runs its body with one mixer left out of a network, or with one source block or head of it ablated.

    Args:
        model: A network with mixers, in eval mode.
        block: Path of the mixer's block.
        lag: The block so many before it contributes nothing, see `mrla.ops.LayerMixer.forward_ablated`.
        head: This head retrieves nothing, see `forward_ablated`. With neither the mixer is out, as after
            `remove_mixers`.

    Yields:
        Nothing.

    Raises:
        ValueError: If there is no such mixer, block before it, or head.

    Example:
        >>> import mrla, timm, torch
        >>> model = mrla.attach(timm.create_model("resnet18"), init="released").eval()
        >>> image = torch.randn(1, 3, 64, 64)
        >>> whole = model(image)
        >>> with ablate(model, "layer4.1"):
        ...     torch.equal(model(image), whole)
        False
        >>> torch.equal(model(image), whole)
        True
    """
    own = unwrapped(model)
    _check_mixed(own, [block])
    if lag is None and head is None:
        with eager(), _without_mixer(own, block):
            yield
        return

    def instead(mixer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        return mixer.forward_ablated(*args, **kwargs, lag=lag, head=head)

    handle = own.get_submodule(f"{block}.{MIXER}").register_forward_hook(instead, with_kwargs=True)
    try:
        with eager():
            yield
    finally:
        handle.remove()


@contextmanager
def _without_mixer(model: nn.Module, block: str) -> Iterator[None]:
    mixers = next(mixers for mixers in mixers_by_chain(model) if block in mixers)
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
    """Removes the mixers of some blocks for good; the others attend to one another as if these stood in no chain.

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
    for mixers in mixers_by_chain(model):
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


def _places_without(mixers: Mapping[str, LayerMixer], blocks: Sequence[str]) -> dict[str, ChainPlace]:
    places = {path: mixer.place for path, mixer in mixers.items() if mixer.place is not None}
    return close_up(places, [path for path in mixers if path not in blocks])
