"""Layer mixers: thin modules that own the parameters of one method and call its function."""

import math
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ._base import LayerMemory, Weighting, asked_memory, base_update, layer_weights, recent
from ._base_operator import base, base_behind
from ._batch_norm import as_float32, kept_statistics, track
from ._block_tail import BlockTail, tail_parameters
from ._branch import BranchMixer, Norm, one_of, reset_channel_kernel, reset_depthwise_kernel
from ._checks import check_map, check_window
from ._contract import ChainPlace, Init, LayerMixer
from ._exact import OutputMemory, exact_update
from ._fused_base import BaseForm, BaseWeights
from ._fused_light import LightWeights
from ._heads import channel_kernel_size, resolve_heads
from ._hearing import Heard, Terms
from ._layouts import Grid, Layout
from ._light import light_gate, light_update
from ._light_operator import light, light_behind
from ._projections import ACTIVATIONS, Activation, depthwise_value, pool, slide

Carry = Literal["shortcut", "output"]


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

    def __init__(
        self,
        channels: int,
        *,
        head_dim: int | None = None,
        heads: int | None = None,
        carry: Carry = "shortcut",
        place: ChainPlace | None = None,
        has_shortcut: bool = True,
        layout: Layout = "NCHW",
        num_prefix_tokens: int = 0,
        norm: Norm | None = None,
        value_act: Activation | None = None,
        out_act: Activation | None = None,
        drop_path: float = 0.0,
        init: Init = "identity",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        carries_shortcut = one_of("carry", carry, get_args(Carry)) == "shortcut" and has_shortcut
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(
            channels,
            place=place,
            uses_shortcut=carries_shortcut,
            layout=layout,
            num_prefix_tokens=num_prefix_tokens,
            norm=norm,
            out_act=out_act,
            residual=True,
            drop_path=drop_path,
            init=init,
            **factory,
        )
        self.heads = resolve_heads(channels, head_dim=head_dim, heads=heads, default=32)
        self.carry: Carry = carry
        self.value_act: Activation | None = one_of("value_act", value_act, (None, *ACTIVATIONS))
        self.query_weight, self.key_weight, self.value_weight = _kernels(channels, **factory)
        has_decay = carries_shortcut if carry == "shortcut" else place is None or place.index > 0
        self.decay = nn.Parameter(torch.empty(channels, **factory)) if has_decay else None
        self.reset_parameters(init)

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
        norm = self.fused_norm(x, carried, taps, decay) if fits else None
        if norm is None:
            return super().forward(x, shortcut, memory, grid=grid)
        weights = _light_weights(taps, decay, norm)
        kept, eps = self.kept(x), float(norm.eps)
        out, mean, variance = light(x, carried, weights, kept_statistics(norm), kept, self.heads, eps)
        track(norm, mean, variance, x.numel() // self.channels)
        return out, None

    @property
    def carries_memory(self) -> bool:
        """With ``carry="output"``: each update is the next one's."""
        return self.carry == "output"

    @property
    def takes_tails(self) -> bool:
        """Whether the kernels know this mixer: the released form, with nothing between the update and its norm."""
        return self._is_released_form and self.uses_shortcut and self.plain_norm is not None

    def behind(self, tail: BlockTail, memory: Any = None) -> tuple[Tensor, Any]:
        """The block's new output, of a residual block that has left its last norm, add and ReLU to the mixer."""
        takes = self._is_released_form and self.uses_shortcut
        of_tail, taps, decay = tail_parameters(tail), self._taps, self.decay
        norm = None
        if takes and of_tail is not None:
            norm = self.fused_norm(tail.branch, tail.shortcut, taps, decay, of_tail)
        if norm is None:
            return super().behind(tail, memory)
        weights, kept = _light_weights(taps, decay, norm), self.kept(tail.branch)
        out, mean, variance = light_behind(tail, weights, kept_statistics(norm), kept, self.heads, float(norm.eps))
        track(norm, mean, variance, tail.branch.numel() // self.channels)
        return out, None

    @property
    def _is_released_form(self) -> bool:
        as_here = type(self) is MRLALight and _is_as_its_class(self)  # a class made of this one may say otherwise
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
            carried = _expected(memory, Tensor, self)
            if carried is not None and self.place is not None and self.place.index == 0:
                raise ValueError(
                    "the memory is from another chain: this mixer stands at the head of its own; pass None"
                )
        decay = self.decay if carried is not None else None
        return carried if decay is not None else None, decay

    def heard(self, x: Float[Tensor, "b c h w"], shortcut: Float[Tensor, "b c h w"] | None, memory: Any) -> Heard:
        """The gate, and lambda where there is something for it."""
        _, decay = self._carried(shortcut, memory)
        gate = light_gate(x, self.query_weight, self.key_weight, self.heads)
        return Heard(gate[:, None], decay, self.passes_on, carries_update=self.carry == "output")

    def terms_of_update(
        self, x: Float[Tensor, "b c h w"], shortcut: Float[Tensor, "b c h w"] | None, memory: Any
    ) -> Terms | None:
        """How long what the gate lets through is, and the lambda term."""
        carried, decay = self._carried(shortcut, memory)
        if carried is None or decay is None:
            return None
        value = depthwise_value(x, self.value_weight.to(x.dtype), self.value_act)
        gate = light_gate(x, self.query_weight, self.key_weight, self.heads)
        let_through = gate.square() * _squares(value).unflatten(1, (self.heads, -1)).sum(-1)
        return Terms(let_through.sum(1).sqrt(), (_squares(carried) @ decay.float().square()).sqrt())

    def update_without(
        self, x: Float[Tensor, "b c h w"], shortcut: Float[Tensor, "b c h w"] | None, memory: Any, back: int
    ) -> tuple[Float[Tensor, "b c h w"], Any]:
        """o_t without the lambda term."""
        return self.update(x, None, None)

    @property
    def reach(self) -> int:
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
        _reset_kernels(self, init)
        if self.decay is not None:
            if init == "identity":
                self.decay.fill_(1.0)
            elif init == "released":
                self.decay.normal_()
            else:
                bound = math.sqrt(6 / (self.decay.numel() + 1))
                self.decay.uniform_(-bound, bound)

    def extra_repr(self) -> str:
        return f"{_width(self)}, carry={self.carry!r}"


class _AskingMixer(BranchMixer):
    """What base and exact share: a block's query asks several blocks, all so far or the last ones."""

    def __init__(
        self,
        channels: int,
        *,
        default_head_dim: int,
        head_dim: int | None,
        heads: int | None,
        weighting: Weighting,
        last: int | None,
        value_act: Activation | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        **branch: Any,
    ):
        super().__init__(channels, uses_shortcut=False, device=device, dtype=dtype, **branch)
        self.heads = resolve_heads(channels, head_dim=head_dim, heads=heads, default=default_head_dim)
        self.weighting: Weighting = one_of("weighting", weighting, get_args(Weighting))
        self.value_act: Activation | None = one_of("value_act", value_act, (None, *ACTIVATIONS))
        check_window(last)
        self.last = last
        self.query_weight, self.key_weight, self.value_weight = _kernels(channels, device=device, dtype=dtype)
        self.reset_parameters(branch["init"])

    @property
    def carries_memory(self) -> bool:
        """The blocks before are asked, of which memory tells."""
        return True

    @property
    def asks_itself_alone(self) -> bool:
        """Whether the query has but one block to choose from: the head of a chain, or a window of one."""
        return self.last == 1 or (self.place is not None and self.place.index == 0)

    @property
    def reach(self) -> int:
        """The blocks before this one that are asked."""
        before = 0 if self.place is None else self.place.index
        return before if self.last is None else min(before, self.last - 1)

    @property
    def num_heads(self) -> int:
        """Heads, each with weights of its own."""
        return self.heads

    def update_without(
        self, x: Float[Tensor, "b c h w"], shortcut: Float[Tensor, "b c h w"] | None, memory: Any, back: int
    ) -> tuple[Float[Tensor, "b c h w"], Any]:
        """o_t with one block less to choose from, and the memory with it."""
        known = 0 if memory is None else len(memory[0])
        if memory is None or back > known:
            raise ValueError(f"back must be from 1 to {known}, the blocks in the memory: got {back}")
        at = known - back
        update, after = self.update(x, shortcut, type(memory)(*(part[:at] + part[at + 1 :] for part in memory)))
        whole = type(memory)(*(old + new[-1:] for old, new in zip(memory, after, strict=True)))
        return update, recent(whole, self.last)

    @torch.no_grad()
    def reset_kernels(self, init: Init) -> None:
        """Draws the three kernels."""
        _reset_kernels(self, init)

    def extra_repr(self) -> str:
        return f"{_width(self)}, weighting={self.weighting!r}, last={self.last}"


class MRLABase(_AskingMixer):
    r"""MRLA-base: a block's query asks the keys and values that the blocks so far have made, each once.

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
        >>> first, second = MRLABase(64, init="released"), MRLABase(64, init="released")
        >>> x = torch.randn(2, 64, 8, 8)
        >>> x, memory = first(x)
        >>> x, memory = second(x, memory=memory)
        >>> len(memory.values)
        2
    """

    def __init__(
        self,
        channels: int,
        *,
        head_dim: int | None = None,
        heads: int | None = None,
        weighting: Weighting = "softmax",
        last: int | None = None,
        place: ChainPlace | None = None,
        has_shortcut: bool = True,
        layout: Layout = "NCHW",
        num_prefix_tokens: int = 0,
        norm: Norm | None = None,
        value_act: Activation | None = None,
        out_act: Activation | None = "relu",
        drop_path: float = 0.0,
        init: Init = "identity",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(
            channels,
            default_head_dim=16,
            head_dim=head_dim,
            heads=heads,
            weighting=weighting,
            last=last,
            residual=True,
            place=place,
            layout=layout,
            num_prefix_tokens=num_prefix_tokens,
            norm=norm,
            value_act=value_act,
            out_act=out_act,
            drop_path=drop_path,
            init=init,
            device=device,
            dtype=dtype,
        )

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
    def takes_tails(self) -> bool:
        """Whether the kernels know this mixer: no activation on the values, and at most a ReLU behind the norm."""
        return self._has_kernels

    def behind(self, tail: BlockTail, memory: Any = None) -> tuple[Tensor, Any]:
        """The block's new output, of a residual block that has left its last norm, add and ReLU to the mixer."""
        of_tail = tail_parameters(tail)
        fused = None
        if of_tail is not None and tail.shortcut.shape == tail.branch.shape:
            fused = self._fused(tail.branch, tail.shortcut, memory, of_tail)
        if fused is None:
            return super().behind(tail, memory)
        norm, before, *rest = fused
        last = self.place is not None and self.place.index + 1 == self.place.length
        out, *state = base_behind(tail, *before, *rest, last=last)
        return out, self._remember(norm, before, tail.branch, *state)

    @property
    def _has_kernels(self) -> bool:
        as_here = type(self) is MRLABase and _is_as_its_class(self)  # a class made of this one may say otherwise
        return as_here and self.value_act is None and self.out_act in (None, "relu") and self.plain_norm is not None

    def _fused(
        self, x: Tensor, shortcut: Tensor | None, memory: Any, more: tuple[Tensor | None, ...] = ()
    ) -> tuple[Any, ...] | None:
        """Norm, memory that is asked, and what else the kernels take, where they can do all of the mixer's work."""
        if not self._has_kernels or x.ndim != 4 or x.shape[1] != self.channels or x.numel() == 0:
            return None
        before = _fitting(_expected(memory, LayerMemory, self), self.place)
        before = asked_memory(x, before, self.heads, self.last)
        query, key, value, scale = self.query_weight, self.key_weight, self.value_weight, self.scale
        norm = self.fused_norm(x, shortcut, (query, key, value), scale, more, before.values, before.keys)
        if norm is None:
            return None
        scale = None if scale is None else as_float32(scale)
        own = as_float32(query), as_float32(key), as_float32(value)
        weights = BaseWeights(*own, as_float32(norm.weight), as_float32(norm.bias), scale)
        form = BaseForm(self.heads, float(norm.eps), self.weighting == "softmax", self.out_act == "relu")
        return norm, before, weights, kept_statistics(norm), self.kept(x), form

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
            _fitting(_expected(memory, LayerMemory, self), self.place),
            self.query_weight,
            self.key_weight,
            self.value_weight,
            self.heads,
            self.weighting,
            self.value_act,
            self.last,
        )

    def heard(self, x: Float[Tensor, "b c h w"], shortcut: Float[Tensor, "b c h w"] | None, memory: Any) -> Heard:
        """What the query takes from each block that it asks."""
        before = _fitting(_expected(memory, LayerMemory, self), self.place)
        before = asked_memory(x, before, self.heads, self.last)
        both = slide(pool(x), self.query_weight, self.key_weight)
        query, key = (one.unflatten(1, (self.heads, -1)) for one in both)
        return Heard(layer_weights(query, (*before.keys, key), self.weighting))

    def silent_kernels(self) -> tuple[str, ...]:
        """A block that asks itself alone: its query; its key too where no later block asks for it."""
        if self.weighting != "softmax" or not self.asks_itself_alone:
            return ()
        place = self.place
        unasked = self.last == 1 or (place is not None and place.index + 1 >= place.length - place.unread)
        return ("query_weight", "key_weight") if unasked else ("query_weight",)


class LayerAttention(_AskingMixer):
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
        >>> x = torch.randn(2, 64, 8, 8)
        >>> torch.equal(LayerAttention(64)(x)[0], x)
        True
    """

    def __init__(
        self,
        channels: int,
        *,
        head_dim: int | None = None,
        heads: int | None = None,
        weighting: Weighting = "softmax",
        last: int | None = None,
        residual: bool = True,
        place: ChainPlace | None = None,
        has_shortcut: bool = True,
        layout: Layout = "NCHW",
        num_prefix_tokens: int = 0,
        norm: Norm | None = None,
        value_act: Activation | None = None,
        out_act: Activation | None = None,
        drop_path: float = 0.0,
        init: Init = "identity",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(
            channels,
            default_head_dim=32,
            head_dim=head_dim,
            heads=heads,
            weighting=weighting,
            last=last,
            residual=residual,
            place=place,
            layout=layout,
            num_prefix_tokens=num_prefix_tokens,
            norm=norm,
            value_act=value_act,
            out_act=out_act,
            drop_path=drop_path,
            init=init,
            device=device,
            dtype=dtype,
        )

    def update(
        self, x: Float[Tensor, "b c h w"], shortcut: Float[Tensor, "b c h w"] | None, memory: Any
    ) -> tuple[Float[Tensor, "b c h w"], Any]:
        """o_t, and the outputs so far."""
        return exact_update(
            x,
            _fitting(_expected(memory, OutputMemory, self), self.place),
            self.query_weight,
            self.key_weight,
            self.value_weight,
            self.heads,
            self.weighting,
            self.value_act,
            self.last,
        )

    def heard(self, x: Float[Tensor, "b c h w"], shortcut: Float[Tensor, "b c h w"] | None, memory: Any) -> Heard:
        """What the query takes from each block that it asks."""
        before = recent(_fitting(_expected(memory, OutputMemory, self), self.place) or OutputMemory(), self.last)
        pooled = (*before.pooled, pool(x))
        (query,), keys = slide(pooled[-1], self.query_weight), [slide(one, self.key_weight)[0] for one in pooled]
        by_head = [key.unflatten(1, (self.heads, -1)) for key in keys]
        return Heard(layer_weights(query.unflatten(1, (self.heads, -1)), by_head, self.weighting))

    def silent_kernels(self) -> tuple[str, ...]:
        """A block that asks itself alone: its query and its key, which no other block uses."""
        silent = self.weighting == "softmax" and self.asks_itself_alone
        return ("query_weight", "key_weight") if silent else ()


class DepthwiseMixer(BranchMixer):
    """The control arm: MRLA-light's value and norm with no attention and no memory, x_t + BN(v_t).

    If MRLA gains nothing over this, what helped was one more depthwise 3x3 convolution a block.

    Args:
        channels: Channels c of the block's output.
        place: Accepted like every mixer's, not used.
        has_shortcut: Accepted like every mixer's, not used.
        layout: As in `MRLALight`, like the arguments that follow.
        num_prefix_tokens: Tokens in front of the patches.
        norm: ``"batch"``, ``"layer"`` or ``"pre_layer"``.
        value_act: Activation on the value.
        out_act: Activation after the norm.
        drop_path: Probability of leaving the branch out for an image, in training.
        init: As in `MRLALight`.
        device: Where the parameters are made.
        dtype: Their type.

    Raises:
        ValueError: If an option is not one of those named.

    Example:
        >>> x = torch.randn(2, 16, 8, 8)
        >>> torch.equal(DepthwiseMixer(16)(x)[0], x)
        True
    """

    def __init__(
        self,
        channels: int,
        *,
        place: ChainPlace | None = None,
        has_shortcut: bool = True,
        layout: Layout = "NCHW",
        num_prefix_tokens: int = 0,
        norm: Norm | None = None,
        value_act: Activation | None = None,
        out_act: Activation | None = None,
        drop_path: float = 0.0,
        init: Init = "identity",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(
            channels,
            place=place,
            uses_shortcut=False,
            layout=layout,
            num_prefix_tokens=num_prefix_tokens,
            norm=norm,
            out_act=out_act,
            residual=True,
            drop_path=drop_path,
            init=init,
            **factory,
        )
        self.value_act: Activation | None = one_of("value_act", value_act, (None, *ACTIVATIONS))
        self.value_weight = nn.Parameter(torch.empty(channels, 1, 3, 3, **factory))
        self.reset_parameters(init)

    def update(
        self, x: Float[Tensor, "b c h w"], shortcut: Float[Tensor, "b c h w"] | None, memory: Any
    ) -> tuple[Float[Tensor, "b c h w"], Any]:
        """v_t, and no memory."""
        check_map(x)
        return depthwise_value(x, self.value_weight, self.value_act), None

    @torch.no_grad()
    def reset_kernels(self, init: Init) -> None:
        """Draws the value's kernel."""
        reset_depthwise_kernel(self.value_weight)


METHODS: dict[str, type[LayerMixer]] = {
    "light": MRLALight,
    "base": MRLABase,
    "exact": LayerAttention,
    "dw": DepthwiseMixer,
}
"""The methods that `mrla.attach` knows, by name."""


def _kernels(channels: int, **factory: Any) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter]:
    """Room for a query's, a key's and a value's kernel."""
    along, depthwise = (1, 1, channel_kernel_size(channels)), (channels, 1, 3, 3)
    query, key, value = (nn.Parameter(torch.empty(shape, **factory)) for shape in (along, along, depthwise))
    return query, key, value


def _light_weights(taps: tuple[Tensor, Tensor, Tensor], decay: Tensor | None, norm: nn.BatchNorm2d) -> LightWeights:
    query, key, value = taps
    decay = None if decay is None else as_float32(decay)
    return LightWeights(
        as_float32(query), as_float32(key), as_float32(value), decay, as_float32(norm.weight), as_float32(norm.bias)
    )


def _is_as_its_class(mixer: LayerMixer) -> bool:
    """Whether no method that kernels do the work of has been put in the place of the class's own."""
    own = mixer.__dict__
    # One by one: the dynamo of torch 2.11 follows no method of a module's __dict__.
    return not ("forward" in own or "update" in own or "behind" in own or "kept" in own)


def _reset_kernels(mixer: MRLALight | _AskingMixer, init: Init) -> None:
    reset_channel_kernel(mixer.query_weight, init)
    reset_channel_kernel(mixer.key_weight, init)
    reset_depthwise_kernel(mixer.value_weight)


def _width(mixer: MRLALight | _AskingMixer) -> str:
    return f"{mixer.channels}, heads={mixer.heads}, head_dim={mixer.channels // mixer.heads}"


def _squares(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c"]:
    """The sum of squares over space, without a map beside x."""
    return torch.linalg.vector_norm(x, dim=(2, 3), dtype=torch.promote_types(x.dtype, torch.float32)).square()


def _expected(memory: Any, kind: type, mixer: LayerMixer) -> Any:
    if memory is None or isinstance(memory, kind):
        return memory
    raise ValueError(
        f"memory must be what a {type(mixer).__name__} before this one returned, or None at the head of a chain: "
        f"got {type(memory).__name__}"
    )


def _fitting(memory: LayerMemory | OutputMemory | None, place: ChainPlace | None) -> Any:
    """`memory`, unless it holds more blocks than stand before this one."""
    if memory is not None and place is not None and len(memory[0]) > place.index:
        raise ValueError(
            f"the memory is from another chain: it holds {len(memory[0])} blocks, and {place.index} stand before this "
            f"one in its chain of {place.length}; pass what the mixer before returned, or None at the head"
        )
    return memory
