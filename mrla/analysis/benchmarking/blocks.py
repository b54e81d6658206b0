"""One block of a chain with its mixer, at any place, so that the cost of attending to many blocks can be timed."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mrla.data.randomness import derive_seed, seeded
from mrla.models import Chain, find_chains
from mrla.models.mixed_blocks import mix_block, with_memory
from mrla.models.wiring import Wiring
from mrla.ops import ChainPlace, ChainSite, LayerMixer, method_named
from mrla.ops.torch_internals import tree_flatten, tree_unflatten
from mrla.train.arm_names import parse_arm

from .arms import draw_mixer


class BlockAt(nn.Module):
    """A block, its mixer if it has one, and the memory that the mixers before it left."""

    def __init__(self, block: nn.Module, memory: Any):
        super().__init__()
        self.block = block
        leaves, self._structure = tree_flatten(memory)
        for index, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor):
                self.register_buffer(f"memory{index}", leaf.clone())
                leaves[index] = f"memory{index}"
        self._leaves = leaves

    def forward(self, x: Tensor) -> Tensor:
        """The block's new output; in training the gradient goes on to the input and to the memory, as in a network."""
        leaves = [self._fed(self.get_buffer(leaf)) if isinstance(leaf, str) else leaf for leaf in self._leaves]
        x, memory = self._fed(x), tree_unflatten(leaves, self._structure)
        return self.block(x if memory is None else with_memory(x, self.block, memory))

    def _fed(self, tensor: Tensor) -> Tensor:
        return tensor.detach().requires_grad_() if torch.is_grad_enabled() else tensor


def longest_chain(plain: nn.Module, shape: tuple[int, ...]) -> tuple[Chain, str]:
    """The longest chain of a network, and a block in it that adds its input.

    Args:
        plain: The network.
        shape: Shape of its input, the batch included.

    Returns:
        The chain and the block's name in its container.

    Raises:
        ValueError: If no block adds its input.
    """
    chain = max(find_chains(plain, example=shape), key=lambda chain: len(chain.served))
    block = next((name for name in chain.served[1:] if chain.shortcuts.get(name) == "input"), None)
    if block is None:
        raise ValueError(
            f"a sweep over blocks times one that adds its input and is not its chain's first: the longest chain of "
            f"this {type(plain).__name__}, {chain.name}, has none; choose another model"
        )
    return chain, block


def block_at(
    plain: nn.Module, chain: Chain, name: str, network: str, position: int, x: Tensor, *, seed: int
) -> BlockAt:
    """A chain's block as it stands at a position, with what the blocks before it left.

    Args:
        plain: The plain network, whose block is used.
        chain: The chain.
        name: Of the block in its container.
        network: ``plain``, or the method of the mixers.
        position: From 1, the head of the chain, where there is no memory.
        x: What goes into it.
        seed: Seed of the mixers, and of the maps that the blocks before it are given.

    Returns:
        The block.
    """
    block = plain.get_submodule(chain.name).get_submodule(name)
    if network == "plain":
        return BlockAt(block, None)
    memory = None
    with seeded(derive_seed(seed, "bench", network, position)), torch.no_grad():
        mixers = [draw_mixer(mixer).eval() for mixer in _chain_of(network, chain, position)]
        for mixer in mixers[:-1]:
            _, memory = mixer(torch.randn_like(x), torch.randn_like(x), memory)
    mix_block(block, mixers[-1], Wiring(name, name))
    return BlockAt(block, memory)


def _chain_of(method: str, chain: Chain, length: int) -> Sequence[LayerMixer]:
    sites = [
        ChainSite(
            channels=chain.channels,  # type: ignore[arg-type]
            place=ChainPlace(index=index, length=length),
            has_shortcut=True,
            layout=chain.layout,
            num_prefix_tokens=chain.num_prefix_tokens,
            device="cpu",
        )
        for index in range(length)
    ]
    name, options = parse_arm(method)
    return method_named(name).build_chain(sites, **options)
