"""The chains of a network with mixers, whatever it is wrapped in."""

import sys
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn

from mrla.ops import LayerMixer

from .mixed_blocks import MIXER, MixedBlock
from .wiring import wiring_of


class MixedChain(NamedTuple):
    """Blocks of a network that attend to one another.

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
    for blocks in _blocks_by_chain(unwrapped(model)):
        paths = list(blocks)
        mixers = [path for path, block in blocks.items() if _mixer_of(block) is not None]
        first, last = paths.index(mixers[0]), paths.index(mixers[-1])
        container, _, _ = mixers[0].rpartition(".")
        chains.append(MixedChain(container, tuple(paths[first : last + 1]), tuple(mixers)))
    if not chains:
        raise ValueError(f"this {type(model).__name__} has no mixers: add them with mrla.attach(model)")
    return chains


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


def mixers_by_chain(model: nn.Module) -> list[dict[str, LayerMixer]]:
    """The mixers of each chain that has some, by the paths of their blocks."""
    return [
        {path: mixer for path, block in blocks.items() if (mixer := _mixer_of(block)) is not None}
        for blocks in _blocks_by_chain(model)
    ]


def unwrapped(model: nn.Module) -> nn.Module:
    """The network in wrappers that hold it under a name of their own, such as DDP's and torch.compile's."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and type(model).__name__ in ("DistributedDataParallel", "DataParallel"):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def eager() -> Any:
    """The body with compiled networks run as written: compiled code passes by what is put on them later."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


def _mixer_of(block: nn.Module) -> LayerMixer | None:
    mixer = block._modules.get(MIXER)
    return mixer if isinstance(mixer, LayerMixer) else None
