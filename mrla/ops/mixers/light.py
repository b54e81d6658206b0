"""MRLA-light: a gated value of the block's own, and an earlier map times lambda."""

import math
from typing import Any, Literal, Unpack, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..batch_norm import as_float32, kept_statistics, track
from ..calls import LightWeights, ResidualEpilogue
from ..contributions import Contribution, UpdateNorms
from ..heads import resolve_heads
from ..kernels.light import light, light_with_epilogue
from ..kernels.residual_epilogue import epilogue_parameters
from ..layouts import Grid
from ..light import light_gate, light_update
from ..projections import ACTIVATIONS, Activation, depthwise_value
from .branch import BranchMixer, BranchOptions, factory_of, one_of, runs_its_class
from .contract import ChainPlace, Init
from .memory import expected_memory
from .projection_kernels import projection_kernels, reset_projection_kernels, width_text
from .registry import register_method

Carry = Literal["shortcut", "output"]


@register_method("light")
class MRLALight(BranchMixer):
    r"""MRLA-light: a block's own value, gated by its query and key, plus a decayed earlier map.

    .. math:: x_t + \mathrm{BN}(\sigma(q_t \cdot k_t / \sqrt d)\, v_t + \lambda_t \odot u_t)

    arXiv:2302.03985, section 3.3. `carry` says what u_t is: ``"shortcut"`` the map that the block itself added, as in
    the authors' code and the Paddle notebook; ``"output"`` the update before, o_{t-1}, as the paper prints it.

    Args:
        channels: Channels c of the block's output.
        head_dim: Width d of a head; 32 where neither this nor `heads` is given (less where 32 does not divide c).
        heads: Number of heads g, in place of `head_dim`.
        carry: What lambda multiplies.
        place: Where in its chain the mixer stands; with ``carry="output"`` the head of a chain has no lambda.
        has_shortcut: False where the block's shortcut is not known; then ``carry="shortcut"`` has no lambda.
        layout: ``"NCHW"`` or ``"NHWC"`` maps, or ``"NLC"`` tokens.
        num_prefix_tokens: Tokens in front of the patches.
        norm: ``"batch"`` for BatchNorm, ``"layer"`` for LayerNorm over channels at each pixel, ``"pre_layer"`` for
            LayerNorm of what goes in and none of what comes out (released DeiT). None: BatchNorm for NCHW, else
            LayerNorm.
        value_act: Activation on the value; ``"gelu"`` in the released DeiT.
        out_act: Activation after the norm.
        drop_path: Probability of leaving the branch out for an image, in training.
        init: See `reset_parameters`.
        device: Where the parameters are made.
        dtype: Their type.

    Raises:
        ValueError: If a given width or count does not divide the channels, or an option is not one of those named.

    Example:
        >>> mixer = MRLALight(64)
        >>> x = torch.randn(2, 64, 8, 8)
        >>> out, memory = mixer(x, shortcut=torch.randn_like(x))
        >>> torch.equal(out, x)  # it starts as the identity
        True
    """

    operator = "light"

    def __init__(
        self,
        channels: int,
        *,
        head_dim: int | None = None,
        heads: int | None = None,
        carry: Carry = "shortcut",
        value_act: Activation | None = None,
        **options: Unpack[BranchOptions],
    ):
        super().__init__(channels, uses_shortcut=one_of("carry", carry, get_args(Carry)) == "shortcut", **options)
        self.heads = resolve_heads(channels, head_dim=head_dim, heads=heads, default=32)
        self.carry: Carry = carry
        self.value_act: Activation | None = one_of("value_act", value_act, (None, *ACTIVATIONS))
        self.query_weight, self.key_weight, self.value_weight = projection_kernels(channels, **factory_of(options))
        has_decay = self.uses_shortcut if carry == "shortcut" else self.place is None or self.place.index > 0
        self.decay = nn.Parameter(torch.empty(channels, **factory_of(options))) if has_decay else None
        self.reset_parameters()

    def forward(
        self,
        x: Float[Tensor, "*shape"],
        shortcut: Float[Tensor, "*shape"] | None = None,
        memory: Any = None,
        *,
        grid: Grid | None = None,
    ) -> tuple[Float[Tensor, "*shape"], Any]:
        """The block's new output, in x's dtype, and the memory for the next mixer."""
        carried = shortcut if self.uses_shortcut else None
        fits = self._is_released_form and (shortcut is None or shortcut.shape == x.shape)
        taps, decay = self._taps, self.decay if carried is not None else None
        fused = self.fused_by(x, carried, taps, decay) if fits else None
        if fused is None:
            return super().forward(x, shortcut, memory, grid=grid)
        backend, norm = fused
        weights = _light_weights(taps, decay, norm)
        drop_scale, eps = self.drop_scale(x), float(norm.eps)
        out, mean, variance = light(x, carried, weights, kept_statistics(norm), drop_scale, self.heads, eps, backend)
        track(norm, mean, variance, x.numel() // self.channels)
        return out, None

    @property
    def carries_memory(self) -> bool:
        """With ``carry="output"``: each update is the next one's."""
        return self.carry == "output"

    @property
    def fuses_epilogue(self) -> bool:
        """Whether the kernels know this mixer: the released form, with nothing between the update and its norm."""
        return self._is_released_form and self.uses_shortcut and self.plain_norm is not None

    def forward_fused(self, epilogue: ResidualEpilogue, memory: Any = None) -> tuple[Tensor, Any]:
        """The block's new output, of a residual block that has left its last norm, add and ReLU to the mixer."""
        takes = self._is_released_form and self.uses_shortcut
        of_epilogue, taps, decay = epilogue_parameters(epilogue), self._taps, self.decay
        fused = None
        if takes and of_epilogue is not None:
            fused = self.fused_by(epilogue.branch, epilogue.shortcut, taps, decay, of_epilogue)
        if fused is None:
            return super().forward_fused(epilogue, memory)
        backend, norm = fused
        weights, drop_scale = _light_weights(taps, decay, norm), self.drop_scale(epilogue.branch)
        statistics, eps = kept_statistics(norm), float(norm.eps)
        out, mean, variance = light_with_epilogue(epilogue, weights, statistics, drop_scale, self.heads, eps, backend)
        track(norm, mean, variance, epilogue.branch.numel() // self.channels)
        return out, None

    @property
    def _is_released_form(self) -> bool:
        as_here = type(self) is MRLALight and runs_its_class(self)  # a class made of this one may say otherwise
        return as_here and self.carry == "shortcut" and self.value_act is None and self.out_act is None

    @property
    def _taps(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.query_weight, self.key_weight, self.value_weight

    def update(
        self, x: Float[Tensor, "b c h w"], shortcut: Float[Tensor, "b c h w"] | None, memory: Any
    ) -> tuple[Float[Tensor, "b c h w"], Any]:
        """o_t, and o_t again where the next mixer needs it."""
        carried, decay = self._carried(shortcut, memory)
        update = light_update(
            x, carried, self.query_weight, self.key_weight, self.value_weight, decay, self.heads, self.value_act
        )
        return update, update if self.carry == "output" else None

    def _carried(self, shortcut: Tensor | None, memory: Any) -> tuple[Tensor | None, Tensor | None]:
        """u_t and its lambda, or neither."""
        carried = shortcut
        if self.carry == "output":
            carried = expected_memory(memory, Tensor, self)
            if carried is not None and self.place is not None and self.place.index == 0:
                raise ValueError(
                    "the memory is from another chain: this mixer stands at the head of its own; pass None"
                )
        decay = self.decay if carried is not None else None
        return carried if decay is not None else None, decay

    def contributions_of_update(
        self, x: Float[Tensor, "b c h w"], shortcut: Float[Tensor, "b c h w"] | None, memory: Any
    ) -> Contribution:
        """The gate, and lambda where there is something for it."""
        _, decay = self._carried(shortcut, memory)
        gate = light_gate(x, self.query_weight, self.key_weight, self.heads)
        return Contribution(gate[:, None], decay, self.residual_gain, carries_update=self.carry == "output")

    def norms_of_update(
        self, x: Float[Tensor, "b c h w"], shortcut: Float[Tensor, "b c h w"] | None, memory: Any
    ) -> UpdateNorms | None:
        """How long what the gate lets through is, and the lambda term."""
        carried, decay = self._carried(shortcut, memory)
        if carried is None or decay is None:
            return None
        value = depthwise_value(x, self.value_weight.to(x.dtype), self.value_act)
        gate = light_gate(x, self.query_weight, self.key_weight, self.heads)
        let_through = gate.square() * _squares(value).unflatten(1, (self.heads, -1)).sum(-1)
        return UpdateNorms(let_through.sum(1).sqrt(), (_squares(carried) @ decay.float().square()).sqrt())

    def update_ablated(
        self, x: Float[Tensor, "b c h w"], shortcut: Float[Tensor, "b c h w"] | None, memory: Any, lag: int
    ) -> tuple[Float[Tensor, "b c h w"], Any]:
        """o_t without the lambda term."""
        return self.update(x, None, None)

    @property
    def max_lag(self) -> int:
        """One block, where there is a lambda."""
        return int(self.decay is not None)

    @property
    def num_heads(self) -> int:
        """Heads, each with a gate of its own."""
        return self.heads

    def move(self, place: ChainPlace) -> None:
        """Takes another place in its chain; with ``carry="output"`` the head of one has no lambda."""
        super().move(place)
        if self.carry == "output" and place.index == 0:
            self.decay = None

    @torch.no_grad()
    def reset_kernels(self, init: Init) -> None:
        """Draws the kernels, and lambda: 1 for "identity", N(0, 1) as released, U(+-sqrt(6 / (c + 1))) as the notebook.

        NOTE the authors' N(0, 1) makes the lambda term 19 to 200 times the attention term at the start.
        """
        reset_projection_kernels(self, init)
        if self.decay is not None:
            if init == "identity":
                self.decay.fill_(1.0)
            elif init == "released":
                self.decay.normal_()
            else:
                bound = math.sqrt(6 / (self.decay.numel() + 1))
                self.decay.uniform_(-bound, bound)

    def extra_repr(self) -> str:
        return f"{width_text(self)}, carry={self.carry!r}"


def _light_weights(taps: tuple[Tensor, Tensor, Tensor], decay: Tensor | None, norm: nn.BatchNorm2d) -> LightWeights:
    query, key, value = taps
    decay = None if decay is None else as_float32(decay)
    return LightWeights(
        as_float32(query), as_float32(key), as_float32(value), decay, as_float32(norm.weight), as_float32(norm.bias)
    )


def _squares(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c"]:
    """The sum of squares over space, without a map beside x."""
    return torch.linalg.vector_norm(x, dim=(2, 3), dtype=torch.promote_types(x.dtype, torch.float32)).square()
