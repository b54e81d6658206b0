"""MRLA-base: every block makes one key and one value, and later blocks read them."""

from typing import Any, Unpack

from jaxtyping import Float
from torch import Tensor, nn

from ..base import LayerMemory, attended_memory, base_update, layer_weights, recent
from ..batch_norm import as_float32, kept_statistics, track
from ..calls import BaseForm, BaseWeights, ResidualEpilogue
from ..contributions import Contribution
from ..kernels.base import base, base_with_epilogue
from ..kernels.residual_epilogue import epilogue_parameters
from ..layouts import Grid
from ..projections import pool, slide
from .branch import runs_its_class
from .layer_query import LayerQueryMixer, LayerQueryOptions
from .memory import expected_memory, fitting_memory
from .registry import register_method


@register_method("base")
class MRLABase(LayerQueryMixer):
    r"""MRLA-base: a block's query attends to the keys and values that the blocks so far have made once.

    .. math:: x_t + \mathrm{ReLU}(\mathrm{BN}(\sum_{s \le t} \mathrm{softmax}_s(q_t \cdot k_s / \sqrt d)\, v_s))

    arXiv:2302.03985, eq. 6; the ReLU is the released code's and not the paper's: ``out_act=None`` leaves it out.

    Args:
        channels: Channels c of the block's output.
        head_dim: Width d of a head; 16 where neither this nor `heads` is given (less where 16 does not divide c).
        heads: Number of heads g, in place of `head_dim`.
        weighting: ``"softmax"`` over the blocks, or ``"sigmoid"`` for each alone.
        last: Ask the last so many blocks only, this one counted; None for all.
        place: Where in its chain the mixer stands; a memory that is longer than that is refused.
        has_shortcut: Accepted like every mixer's, not used.
        layout: As in `MRLALight`, like the arguments that follow.
        num_prefix_tokens: Tokens in front of the patches.
        norm: ``"batch"``, ``"layer"`` or ``"pre_layer"``.
        value_act: Activation on the value.
        out_act: Activation after the norm, ``"relu"`` as released.
        drop_path: Probability of leaving the branch out for an image, in training.
        init: ``"identity"`` (with `out_act` a zero scale follows it), ``"released"`` or ``"notebook"``.
        device: Where the parameters are made.
        dtype: Their type.

    Raises:
        ValueError: If a given width or count does not divide the channels, or an option is not one of those named.

    Example:
        >>> import torch
        >>> first, second = MRLABase(64, init="released"), MRLABase(64, init="released")
        >>> x = torch.randn(2, 64, 8, 8)
        >>> x, memory = first(x)
        >>> x, memory = second(x, memory=memory)
        >>> len(memory.values)
        2
    """

    operator = "base"

    def __init__(self, channels: int, **options: Unpack[LayerQueryOptions]):
        options.setdefault("out_act", "relu")
        super().__init__(channels, default_head_dim=16, **options)

    def forward(
        self,
        x: Float[Tensor, "*shape"],
        shortcut: Float[Tensor, "*shape"] | None = None,
        memory: Any = None,
        *,
        grid: Grid | None = None,
    ) -> tuple[Float[Tensor, "*shape"], Any]:
        """The block's new output, in x's dtype, and the memory for the next mixer."""
        fused = self._fused(x, None, memory) if shortcut is None or shortcut.shape == x.shape else None
        if fused is None:
            return super().forward(x, shortcut, memory, grid=grid)
        norm, before, *rest = fused
        out, *state = base(x, *before, *rest)
        return out, self._remember(norm, before, x, *state)

    @property
    def fuses_epilogue(self) -> bool:
        """Whether the kernels know this mixer: no activation on the values, and at most a ReLU behind the norm."""
        return self._has_kernels

    def forward_fused(self, epilogue: ResidualEpilogue, memory: Any = None) -> tuple[Tensor, Any]:
        """The block's new output, of a residual block that has left its last norm, add and ReLU to the mixer."""
        of_epilogue = epilogue_parameters(epilogue)
        fused = None
        if of_epilogue is not None and epilogue.shortcut.shape == epilogue.branch.shape:
            fused = self._fused(epilogue.branch, epilogue.shortcut, memory, of_epilogue)
        if fused is None:
            return super().forward_fused(epilogue, memory)
        norm, before, *rest = fused
        last = self.place is not None and self.place.index + 1 == self.place.length
        out, *state = base_with_epilogue(epilogue, *before, *rest, last=last)
        return out, self._remember(norm, before, epilogue.branch, *state)

    @property
    def _has_kernels(self) -> bool:
        as_here = type(self) is MRLABase and runs_its_class(self)  # a class made of this one may say otherwise
        return as_here and self.value_act is None and self.out_act in (None, "relu") and self.plain_norm is not None

    def _fused(
        self, x: Tensor, shortcut: Tensor | None, memory: Any, epilogue: tuple[Tensor | None, ...] | None = None
    ) -> tuple[Any, ...] | None:
        """Norm, attended memory, and what else the kernels take, where they can do all of the mixer's work."""
        if not self._has_kernels or x.ndim != 4 or x.shape[1] != self.channels or x.numel() == 0:
            return None
        before = fitting_memory(expected_memory(memory, LayerMemory, self), self.place)
        before = attended_memory(x, before, self.heads, self.last)
        query, key, value, scale = self.query_weight, self.key_weight, self.value_weight, self.scale
        fused = self.fused_by(x, shortcut, (query, key, value), scale, epilogue, before.values, before.keys)
        if fused is None:
            return None
        backend, norm = fused
        scale = None if scale is None else as_float32(scale)
        own = as_float32(query), as_float32(key), as_float32(value)
        weights = BaseWeights(*own, as_float32(norm.weight), as_float32(norm.bias), scale)
        form = BaseForm(self.heads, float(norm.eps), self.weighting == "softmax", self.out_act == "relu")
        return norm, before, weights, kept_statistics(norm), self.drop_scale(x), form, backend

    def _remember(
        self,
        norm: nn.BatchNorm2d,
        before: LayerMemory,
        x: Tensor,
        key: Tensor,
        value: Tensor,
        mean: Tensor,
        variance: Tensor,
    ) -> LayerMemory | None:
        """The memory for the next mixer, after the norm has taken note of its batch; None where there is no next."""
        track(norm, mean, variance, x.numel() // self.channels)
        if value.numel() == 0:
            return None
        key = key.unflatten(1, (self.heads, -1))
        return recent(LayerMemory((*before.keys, key), (*before.values, value)), self.last)

    def update(
        self, x: Float[Tensor, "b c h w"], shortcut: Float[Tensor, "b c h w"] | None, memory: Any
    ) -> tuple[Float[Tensor, "b c h w"], Any]:
        """o_t, and the keys and values so far."""
        return base_update(
            x,
            fitting_memory(expected_memory(memory, LayerMemory, self), self.place),
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
        before = fitting_memory(expected_memory(memory, LayerMemory, self), self.place)
        before = attended_memory(x, before, self.heads, self.last)
        both = slide(pool(x), self.query_weight, self.key_weight)
        query, key = (one.unflatten(1, (self.heads, -1)) for one in both)
        return Contribution(layer_weights(query, (*before.keys, key), self.weighting))

    def zero_grad_kernels(self) -> tuple[str, ...]:
        """A block that attends to itself alone: its query; its key too where no later block attends to it."""
        if self.weighting != "softmax" or not self.attends_to_itself_alone:
            return ()
        place = self.place
        key_unread = self.last == 1 or (place is not None and place.index + 1 >= place.length - place.unread)
        return ("query_weight", "key_weight") if key_unread else ("query_weight",)
