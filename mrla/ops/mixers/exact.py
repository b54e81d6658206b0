"""Layer attention as the paper defines it: keys and values of all earlier outputs made anew in every block."""

from typing import Any, Unpack

from jaxtyping import Float
from torch import Tensor

from ..base import layer_weights, recent
from ..contributions import Contribution
from ..exact import OutputMemory, exact_update
from ..projections import pool, slide
from .layer_query import LayerQueryMixer, LayerQueryOptions
from .memory import expected_memory, fitting_memory
from .registry import register_method


@register_method("exact")
class LayerAttention(LayerQueryMixer):
    r"""Layer attention as the paper defines it: every block makes keys and values of all earlier outputs anew.

    .. math:: x_t + \mathrm{BN}(\sum_{s \le t} \mathrm{softmax}_s(q_t \cdot k_s^t / \sqrt d)\, v_s^t)

    arXiv:2302.03985, eq. 4, right for any number of heads (the released layer is so for one only).

    Args:
        channels: Channels c of the block's output.
        head_dim: Width d of a head; 32 where neither this nor `heads` is given (less where 32 does not divide c).
        heads: Number of heads g, in place of `head_dim`.
        weighting: ``"softmax"`` over the blocks, or ``"sigmoid"`` for each alone.
        last: Ask the last so many blocks only, this one counted; None for all.
        residual: Whether x_t is added; the released code gives BN(o_t) alone.
        place: Where in its chain the mixer stands; a memory that is longer than that is refused.
        has_shortcut: Accepted like every mixer's, not used.
        layout: As in `MRLALight`, like the arguments that follow.
        num_prefix_tokens: Tokens in front of the patches.
        norm: ``"batch"``, ``"layer"`` or ``"pre_layer"``.
        value_act: Activation on the values; with one, every value is computed by itself.
        out_act: Activation after the norm.
        drop_path: Probability of leaving the branch out for an image, in training.
        init: ``"identity"``, ``"released"`` or ``"notebook"``.
        device: Where the parameters are made.
        dtype: Their type.

    Raises:
        ValueError: If a given width or count does not divide the channels, or an option is not one of those named.

    Example:
        >>> import torch
        >>> x = torch.randn(2, 64, 8, 8)
        >>> torch.equal(LayerAttention(64)(x)[0], x)
        True
    """

    def __init__(self, channels: int, *, residual: bool = True, **options: Unpack[LayerQueryOptions]):
        super().__init__(channels, default_head_dim=32, residual=residual, **options)

    def update(
        self, x: Float[Tensor, "b c h w"], shortcut: Float[Tensor, "b c h w"] | None, memory: Any
    ) -> tuple[Float[Tensor, "b c h w"], Any]:
        """o_t, and the outputs so far."""
        return exact_update(
            x,
            fitting_memory(expected_memory(memory, OutputMemory, self), self.place),
            self.query_weight,
            self.key_weight,
            self.value_weight,
            self.heads,
            self.weighting,
            self.value_act,
            self.last,
        )

    def contributions_of_update(
        self, x: Float[Tensor, "b c h w"], shortcut: Float[Tensor, "b c h w"] | None, memory: Any
    ) -> Contribution:
        """What the query takes from each block that it attends to."""
        before = recent(
            fitting_memory(expected_memory(memory, OutputMemory, self), self.place) or OutputMemory(), self.last
        )
        pooled = (*before.pooled, pool(x))
        (query,), keys = slide(pooled[-1], self.query_weight), [slide(one, self.key_weight)[0] for one in pooled]
        by_head = [key.unflatten(1, (self.heads, -1)) for key in keys]
        return Contribution(layer_weights(query.unflatten(1, (self.heads, -1)), by_head, self.weighting))

    def zero_grad_kernels(self) -> tuple[str, ...]:
        """A block that attends to itself alone: its query and its key, which no other block uses."""
        silent = self.weighting == "softmax" and self.attends_to_itself_alone
        return ("query_weight", "key_weight") if silent else ()
