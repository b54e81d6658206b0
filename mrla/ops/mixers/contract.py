"""What a layer mixer is, for the blocks that call it and the methods that fill it in."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from jaxtyping import Float
from torch import Tensor, nn

from ..calls import ResidualEpilogue
from ..contributions import Contribution, UpdateNorms
from ..kernels.residual_epilogue import finish
from ..layouts import Grid, Layout

Init = Literal["identity", "released", "notebook"]


class ChainPlace(NamedTuple):
    """Where in its chain a mixer stands: `index` of `length` mixers, counted from 0.

    `unread` counts the mixers at the end of the chain whose patches the network never reads: one, where a transformer
    reads only its class token after the last block. What such a mixer does to the patches cannot be learnt.
    """

    index: int
    length: int
    unread: int = 0


class ChainSite(NamedTuple):
    """What `attach` has found out of a block that is to get a mixer; the constructor of a mixer takes each by its name.

    Attributes:
        channels: Channels of the block's output.
        place: Where in its chain the mixer will stand.
        has_shortcut: Whether the map that the block adds to its branch is known, and so given to the mixer.
        layout: ``"NCHW"`` or ``"NHWC"`` maps, or ``"NLC"`` tokens.
        num_prefix_tokens: Tokens in front of the patches.
        device: Where the parameters are made: the CPU, or the meta device for a network without numbers. `attach` moves
            the mixer to the block's device and type.
    """

    channels: int
    place: ChainPlace
    has_shortcut: bool
    layout: Layout
    num_prefix_tokens: int
    device: str

    def arguments(self) -> dict[str, Any]:
        """What a mixer's constructor is given by name, the channels aside."""
        arguments = self._asdict()
        del arguments["channels"]
        return arguments


class LayerMixer(nn.Module, ABC):
    """A module that runs after a block and lets it attend to the outputs of the blocks before it.

    A mixer is called ``mixer(x, shortcut, memory) -> (x, memory)``: `x` is the block's output, `shortcut` what the
    block added to its branch (None where that is not known) and `memory` whatever the mixer before left (None at the
    head of a chain). It returns the block's new output, in x's dtype, and the memory for the next one. Memory is a
    value: a mixer never keeps it.

    Attributes:
        place: Where in its chain the mixer stands; None where that is not known, as for a mixer used on its own.
    """

    place: ChainPlace | None = None

    @classmethod
    def build_chain(cls, sites: Sequence[ChainSite], **options: Any) -> Sequence["LayerMixer"]:
        """The mixers of one chain, one for each site.

        A method whose mixers share a module overrides this, makes the module once and gives it to each by `share`.

        Args:
            sites: The blocks of the chain that get a mixer, in order.
            options: The method's, as the caller of `attach` gave them.

        Returns:
            The mixers, in the order of their sites.
        """
        return [cls(site.channels, **site.arguments(), **options) for site in sites]

    def share(self, name: str, module: nn.Module) -> None:
        """Gives the mixer a module that all mixers of its chain hold, as the attribute `name`.

        The mixer at the head of the chain registers it, so its parameters are listed, saved, moved and trained once,
        under that mixer's path. The others hold it without registering; copying and pickling the network keep it one.
        `move` has another mixer register it when the head of the chain is taken off.

        Args:
            name: The attribute's name, the same in every mixer of the chain.
            module: The module.

        Example:
            >>> import torch
            >>> from mrla.ops import ChainPlace, DepthwiseMixer
            >>> first, second = (DepthwiseMixer(4, place=ChainPlace(index, 2)) for index in range(2))
            >>> cell = torch.nn.LSTMCell(4, 4)
            >>> first.share("cell", cell), second.share("cell", cell)
            (None, None)
            >>> second.cell is first.cell
            True
            >>> ["cell" in dict(mixer.named_children()) for mixer in (first, second)]
            [True, False]
        """
        vars(self).setdefault("_shared", {})[name] = module
        self._place_shared()

    def _place_shared(self) -> None:
        """Registers the shared modules where the mixer stands at the head of its chain; else holds them as values."""
        is_head = self.place is None or self.place.index == 0
        values = vars(self)
        for name, module in values.get("_shared", {}).items():
            values.pop(name, None)
            self._modules.pop(name, None)
            if is_head:
                self.add_module(name, module)
            else:
                values[name] = module

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
            shortcut: What the block added, in the same layout.
            memory: What the mixer before returned.
            grid: Rows and columns of patch tokens, where `x` is tokens and their grid is known.
        """

    @property
    def carries_memory(self) -> bool:
        """Whether the mixers of a chain hand memory on to one another; a call in a chain's middle then needs it."""
        return False

    @property
    def fuses_epilogue(self) -> bool:
        """Whether the mixer would rather have the end of a residual block to do itself, by `forward_fused`."""
        return False

    def forward_fused(self, epilogue: ResidualEpilogue, memory: Any = None) -> tuple[Tensor, Any]:
        """Like a call with x = relu(norm(branch) + shortcut), where the block has left that to the mixer."""
        return self(finish(epilogue), epilogue.shortcut, memory)

    def contributions(
        self,
        x: Float[Tensor, "*shape"],
        shortcut: Float[Tensor, "*shape"] | None = None,
        memory: Any = None,
        *,
        grid: Grid | None = None,
    ) -> Contribution | None:
        """What a call with these arguments would take from each block; None where the method does not tell."""
        return None

    def update_norms(
        self,
        x: Float[Tensor, "*shape"],
        shortcut: Float[Tensor, "*shape"] | None = None,
        memory: Any = None,
        *,
        grid: Grid | None = None,
    ) -> UpdateNorms | None:
        """The norms of the terms of a call's update; None where it has but one."""
        return None

    @property
    def max_lag(self) -> int:
        """The largest lag: how many blocks back the mixer reads directly, its own not counted."""
        return 0

    @property
    def num_heads(self) -> int:
        """How many heads attend, each for its own channels; 0 of a mixer that has none."""
        return 0

    def forward_ablated(
        self,
        x: Float[Tensor, "*shape"],
        shortcut: Float[Tensor, "*shape"] | None = None,
        memory: Any = None,
        *,
        lag: int | None = None,
        head: int | None = None,
        grid: Grid | None = None,
    ) -> tuple[Float[Tensor, "*shape"], Any]:
        """Forward pass with one source block or head ablated; the memory for the next mixer is whole.

        Args:
            x: The block's output.
            shortcut: What the block added.
            memory: What the mixer before returned.
            lag: The block so many before this one, from 1 to `max_lag`, contributes nothing: base and exact weigh the
                others alone, light has no lambda term.
            head: This head, from 0, retrieves nothing: its channels of the update are zero.
            grid: Rows and columns of patch tokens.

        Returns:
            The block's new output and the memory for the next mixer.

        Raises:
            ValueError: If there is no such block or head.
        """
        check_ablation(self, lag, head)
        raise NotImplementedError(f"{type(self).__name__} does not implement ablation: define forward_ablated")

    def move(self, place: ChainPlace) -> None:
        """Takes another place in its chain, as when mixers before it are taken out; drops what has no use there."""
        self.place = place
        self._place_shared()

    @abstractmethod
    def reset_parameters(self, init: Init | None = None) -> None:
        """Draws every parameter anew, from torch's global generator."""

    def zero_grad_parameters(self) -> tuple[str, ...]:
        """Names of own parameters whose gradient is zero by the maths, whatever the data."""
        return ()


def check_ablation(mixer: LayerMixer, lag: int | None, head: int | None) -> None:
    """Raises ValueError unless the mixer has such a block before it and such a head."""
    kind = type(mixer).__name__
    if lag is not None and not 1 <= lag <= mixer.max_lag:
        raise ValueError(
            f"lag must be from 1 to {mixer.max_lag}, the blocks before this {kind} that it reads: got {lag}"
        )
    if head is not None and not 0 <= head < mixer.num_heads:
        raise ValueError(f"head must be one of the {mixer.num_heads} heads of this {kind}, from 0: got {head}")
