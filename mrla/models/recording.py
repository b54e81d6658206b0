"""What the mixers of a network take from whom, noted while it runs."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mrla.ops import Contribution, UpdateNorms, attention_over_layers

from .mixed_blocks import MIXER
from .mixed_chains import MixedChain, eager, mixed_chains, unwrapped


class Recording:
    """What the mixers of a network took from whom, image by image, since it began or was last cleared."""

    def __init__(self, chains: Sequence[MixedChain]):
        self.chains = list(chains)
        blocks = [block for chain in chains for block in chain.mixers]
        self._contributions: dict[str, list[Contribution | None]] = {block: [] for block in blocks}
        self._update_norms: dict[str, list[UpdateNorms]] = {}

    @torch.no_grad()
    def attention_over_layers(self) -> list[tuple[MixedChain, Tensor]]:
        """How much each head of each block took from each source, by `mrla.ops.attention_over_layers`.

        Returns:
            For each chain that ran and tells of its contributions: (images, heads, blocks, 1 + blocks); source 0 is the
            chain's input. NaN where a block takes nothing from a source.

        Raises:
            ValueError: If only a part of a chain was run.
        """
        maps = []
        for chain in self.chains:
            calls = [self._contributions[block] for block in chain.mixers]
            if len({len(one) for one in calls}) > 1:
                counts = ", ".join(f"{block} {len(self._contributions[block])}" for block in chain.mixers)
                raise ValueError(f"every block of a chain must run as often as the others to be recorded: got {counts}")
            passes = [dict(zip(chain.mixers, contribution, strict=True)) for contribution in zip(*calls, strict=True)]
            passes = [contribution for contribution in passes if any(one is not None for one in contribution.values())]
            if passes:
                found = [
                    attention_over_layers([contribution.get(block) for block in chain.blocks])
                    for contribution in passes
                ]
                maps.append((chain, torch.cat(found)))
        return maps

    def update_norms(self) -> dict[str, UpdateNorms]:
        """How long the two terms of each light mixer's update were for each image, by the block's path."""
        return {
            block: UpdateNorms(*(torch.cat(parts) for parts in zip(*noted, strict=True)))
            for block, noted in self._update_norms.items()
        }

    def clear(self) -> None:
        """Forgets what was noted, as before the next batch."""
        for noted in (*self._contributions.values(), *self._update_norms.values()):
            noted.clear()

    def note(self, block: str, contribution: Contribution | None, update_norms: UpdateNorms | None) -> None:
        """Adds the contributions of one mixer for one batch."""
        if contribution is not None and contribution.decay is not None:
            # A copy: a step of training changes the parameter.
            contribution = contribution._replace(decay=contribution.decay.detach().clone())
        self._contributions[block].append(contribution)
        if update_norms is not None:
            self._update_norms.setdefault(block, []).append(update_norms)


@contextmanager
def recording(model: nn.Module, *, update_norms: bool = False) -> Iterator[Recording]:
    """Records, in its body, what each mixer of a network takes from whom.

    Outside the body nothing is recorded and nothing costs. Inside each mixer has a hook, so its block runs without the
    kernels that fuse a block's epilogue; compiled networks run as they were written. The outputs are the same, within
    rounding.

    Args:
        model: A network with mixers.
        update_norms: Whether the lengths of light's two terms are noted too; it makes every value a second time.

    Yields:
        What is noted.

    Raises:
        ValueError: If the network has no mixers.

    Example:
        >>> import mrla, timm
        >>> model = mrla.attach(timm.create_model("resnet18"), "base").eval()
        >>> with torch.no_grad(), recording(model) as contribution:
        ...     _ = model(torch.randn(2, 3, 64, 64))
        >>> chain, weights = contribution.attention_over_layers()[0]
        >>> chain.name, tuple(weights.shape)
        ('layer1', (2, 4, 2, 3))
    """
    noted = Recording(mixed_chains(model))
    own = unwrapped(model)
    handles = []
    try:
        for chain in noted.chains:
            for block in chain.mixers:
                handles.append(_add_hook(own, block, noted, update_norms))
        with eager():
            yield noted
    finally:
        for handle in handles:
            handle.remove()


def _add_hook(model: nn.Module, block: str, noted: Recording, update_norms: bool) -> Any:
    def note(mixer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        with torch.no_grad():
            contribution = mixer.contributions(*args, **kwargs)
            noted.note(block, contribution, mixer.update_norms(*args, **kwargs) if update_norms else None)

    return model.get_submodule(f"{block}.{MIXER}").register_forward_pre_hook(note, with_kwargs=True)
