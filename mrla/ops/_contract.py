"""What a layer mixer is, for the stages that call it and the methods that fill it in."""

from abc import ABC, abstractmethod
from typing import Any, Literal, NamedTuple

from jaxtyping import Float
from torch import Tensor, nn

from ._block_tail import BlockTail, finish
from ._hearing import Heard, Terms
from ._layouts import Grid

Init = Literal["identity", "released", "notebook"]


class ChainPlace(NamedTuple):
    """Where in its chain a mixer stands: `index` of `length` mixers, counted from 0.

    `unread` counts the mixers at the end of the chain whose patches the network never reads: one, where a transformer
    reads only its class token after the last block. What such a mixer does to the patches cannot be learnt.
    """

    index: int
    length: int
    unread: int = 0


class LayerMixer(nn.Module, ABC):
    """What stands behind a block and lets it hear the blocks before it.

    A mixer is called ``mixer(x, shortcut, memory) -> (x, memory)``: `x` is the block's output, `shortcut` what the
    block added to its branch (None where that is not known) and `memory` whatever the mixer before left (None at the
    head of a chain). It returns the block's new output, in x's dtype, and the memory for the next one. Memory is a
    value: a mixer never keeps it.

    Attributes:
        place: Where in its chain the mixer stands; None where that is not known, as for a mixer used on its own.
    """

    place: ChainPlace | None

    @abstractmethod
    def forward(
        self,
        x: Float[Tensor, "*shape"],
        shortcut: Float[Tensor, "*shape"] | None = None,
        memory: Any = None,
        *,
        grid: Grid | None = None,
    ) -> tuple[Float[Tensor, "*shape"], Any]:
        """The block's new output and the memory for the next mixer of the chain.

        Args:
            x: The block's output, in the layout that the mixer was made for.
            shortcut: What the block added, likewise.
            memory: What the mixer before returned.
            grid: Rows and columns of patch tokens, where `x` is tokens and their grid is known.
        """

    @property
    def carries_memory(self) -> bool:
        """Whether the mixers of a chain hand memory on to one another; a call in a chain's middle then needs it."""
        return False

    @property
    def takes_tails(self) -> bool:
        """Whether the mixer would rather have the end of a residual block to do itself, by `behind`."""
        return False

    def behind(self, tail: BlockTail, memory: Any = None) -> tuple[Tensor, Any]:
        """Like a call with x = relu(norm(branch) + shortcut), where the block has left that to the mixer."""
        return self(finish(tail), tail.shortcut, memory)

    def hears(
        self,
        x: Float[Tensor, "*shape"],
        shortcut: Float[Tensor, "*shape"] | None = None,
        memory: Any = None,
        *,
        grid: Grid | None = None,
    ) -> Heard | None:
        """What a call with these arguments would take from whom; None where the method does not say."""
        return None

    def terms(
        self,
        x: Float[Tensor, "*shape"],
        shortcut: Float[Tensor, "*shape"] | None = None,
        memory: Any = None,
        *,
        grid: Grid | None = None,
    ) -> Terms | None:
        """How long the terms of a call's update would be; None where it has but one."""
        return None

    @property
    def reach(self) -> int:
        """How many blocks back the mixer hears directly, its own not counted."""
        return 0

    @property
    def num_heads(self) -> int:
        """How many heads ask, each for its own channels; 0 of a mixer that has none."""
        return 0

    def deaf(
        self,
        x: Float[Tensor, "*shape"],
        shortcut: Float[Tensor, "*shape"] | None = None,
        memory: Any = None,
        *,
        back: int | None = None,
        head: int | None = None,
        grid: Grid | None = None,
    ) -> tuple[Float[Tensor, "*shape"], Any]:
        """Like a call, but something is not heard; the next mixer may hear it all the same.

        Args:
            x: As in a call, like the next two and `grid`.
            shortcut: Likewise.
            memory: Likewise.
            back: The block so many before this one, from 1 to `reach`, is not heard: base and exact weigh the others
                alone, light has no lambda term.
            head: This head, from 0, retrieves nothing: its channels of the update are zero.
            grid: Rows and columns of patch tokens.

        Returns:
            The block's new output and the memory for the next mixer.

        Raises:
            ValueError: If there is no such block or head.
        """
        check_deaf(self, back, head)
        raise NotImplementedError(f"{type(self).__name__} does not say how it is to hear less")

    def move(self, place: ChainPlace) -> None:
        """Takes another place in its chain, as when mixers before it are taken out; drops what has no use there."""
        self.place = place

    @abstractmethod
    def reset_parameters(self, init: Init | None = None) -> None:
        """Draws every parameter anew, from torch's global generator."""

    def silent_parameters(self) -> tuple[str, ...]:
        """Names of own parameters whose gradient is zero by the maths, whatever the data."""
        return ()


def check_deaf(mixer: LayerMixer, back: int | None, head: int | None) -> None:
    kind = type(mixer).__name__
    if back is not None and not 1 <= back <= mixer.reach:
        raise ValueError(f"back must be from 1 to {mixer.reach}, the blocks that this {kind} hears: got {back}")
    if head is not None and not 0 <= head < mixer.num_heads:
        raise ValueError(f"head must be one of the {mixer.num_heads} heads of this {kind}, from 0: got {head}")
