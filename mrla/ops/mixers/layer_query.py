"""What base and exact share: a block's query attends to several blocks, all so far or the last ones."""

from typing import Any, Unpack, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from ..base import Weighting, recent
from ..checks import check_window
from ..heads import resolve_heads
from ..projections import ACTIVATIONS, Activation
from .branch import BranchMixer, BranchOptions, factory_of, one_of
from .contract import Init
from .projection_kernels import projection_kernels, reset_projection_kernels, width_text


class LayerQueryOptions(BranchOptions, total=False):
    """The options of a `LayerQueryMixer`."""

    head_dim: int | None
    heads: int | None
    weighting: Weighting
    last: int | None
    value_act: Activation | None


class LayerQueryMixer(BranchMixer):
    """What base and exact share: a block's query attends to several blocks, all so far or the last ones."""

    def __init__(
        self,
        channels: int,
        *,
        default_head_dim: int,
        head_dim: int | None = None,
        heads: int | None = None,
        weighting: Weighting = "softmax",
        last: int | None = None,
        residual: bool = True,
        value_act: Activation | None = None,
        **options: Unpack[BranchOptions],
    ):
        super().__init__(channels, residual=residual, **options)
        self.heads = resolve_heads(channels, head_dim=head_dim, heads=heads, default=default_head_dim)
        self.weighting: Weighting = one_of("weighting", weighting, get_args(Weighting))
        self.value_act: Activation | None = one_of("value_act", value_act, (None, *ACTIVATIONS))
        check_window(last)
        self.last = last
        self.query_weight, self.key_weight, self.value_weight = projection_kernels(channels, **factory_of(options))
        self.reset_parameters()

    @property
    def carries_memory(self) -> bool:
        """It attends to the blocks before, through memory."""
        return True

    @property
    def attends_to_itself_alone(self) -> bool:
        """Whether the query has but one block to choose from: the head of a chain, or a window of one."""
        return self.last == 1 or (self.place is not None and self.place.index == 0)

    @property
    def max_lag(self) -> int:
        """The blocks before this one that it attends to."""
        before = 0 if self.place is None else self.place.index
        return before if self.last is None else min(before, self.last - 1)

    @property
    def num_heads(self) -> int:
        """Heads, each with weights of its own."""
        return self.heads

    def update_ablated(
        self, x: Float[Tensor, "b c h w"], shortcut: Float[Tensor, "b c h w"] | None, memory: Any, lag: int
    ) -> tuple[Float[Tensor, "b c h w"], Any]:
        """o_t with one block less to choose from, and the memory with it."""
        known = 0 if memory is None else len(memory[0])
        if memory is None or lag > known:
            raise ValueError(f"lag must be from 1 to {known}, the blocks in the memory: got {lag}")
        at = known - lag
        update, after = self.update(x, shortcut, type(memory)(*(part[:at] + part[at + 1 :] for part in memory)))
        whole = type(memory)(*(old + new[-1:] for old, new in zip(memory, after, strict=True)))
        return update, recent(whole, self.last)

    @torch.no_grad()
    def reset_kernels(self, init: Init) -> None:
        """Draws the three kernels."""
        reset_projection_kernels(self, init)

    def extra_repr(self) -> str:
        return f"{width_text(self)}, weighting={self.weighting!r}, last={self.last}"
