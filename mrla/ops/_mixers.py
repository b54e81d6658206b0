"""Layer mixers: thin modules that own the parameters of one method and call its function."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from timm.layers import DropPath, LayerNorm2d
from torch import Tensor, nn
from torch.nn.functional import conv2d

from ._heads import channel_kernel_size, resolve_heads
from ._light import light_update

Carry = Literal["shortcut", "output"]
Norm = Literal["batch", "layer"]
Init = Literal["identity", "released", "notebook"]

_NORMS: dict[str, Callable[..., nn.Module]] = {"batch": nn.BatchNorm2d, "layer": LayerNorm2d}


class ChainPlace(NamedTuple):
    """Where in its chain a mixer stands: `index` of `length` blocks, counted from 0."""

    index: int = 0
    length: int = 1


ALONE = ChainPlace()
"""The place of a mixer that is a chain of one."""


class LayerMixer(nn.Module, ABC):
    """What stands behind a block and lets it hear the blocks before it.

    A mixer is called ``mixer(x, shortcut, memory) -> (x, memory)``: `x` is the block's output, `shortcut` what the
    block added to its branch (None where that is not known) and `memory` whatever the mixer before left (None at the
    head of a chain). It returns the block's new output, in x's dtype, and the memory for the next one. Memory is a
    value: a mixer never keeps it.
    """

    @abstractmethod
    def forward(
        self, x: Float[Tensor, "b c h w"], shortcut: Float[Tensor, "b c h w"] | None = None, memory: Any = None
    ) -> tuple[Float[Tensor, "b c h w"], Any]:
        """The block's new output and the memory for the next mixer of the chain."""

    @abstractmethod
    def reset_parameters(self, init: Init) -> None:
        """Draws every parameter anew, from torch's global generator."""

    def silent_parameters(self) -> tuple[str, ...]:
        """Names of own parameters whose gradient is zero by the maths, whatever the data."""
        return ()


class MRLALight(LayerMixer):
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
        norm: ``"batch"`` for BatchNorm, ``"layer"`` for LayerNorm over channels at each pixel.
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
        place: ChainPlace = ALONE,
        has_shortcut: bool = True,
        norm: Norm = "batch",
        drop_path: float = 0.0,
        init: Init = "identity",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.heads = resolve_heads(channels, head_dim=head_dim, heads=heads, default=32)
        self.carry = _one_of("carry", carry, ("shortcut", "output"))
        kernel_size = channel_kernel_size(channels)
        self.query_weight = nn.Parameter(torch.empty(1, 1, kernel_size, **factory))
        self.key_weight = nn.Parameter(torch.empty(1, 1, kernel_size, **factory))
        self.value_weight = nn.Parameter(torch.empty(channels, 1, 3, 3, **factory))
        has_decay = has_shortcut if carry == "shortcut" else place.index > 0
        self.decay = nn.Parameter(torch.empty(channels, **factory)) if has_decay else None
        self.norm = _make_norm(norm, channels, **factory)
        self.drop_path = _make_drop_path(drop_path)
        self.reset_parameters(init)

    def forward(
        self, x: Float[Tensor, "b c h w"], shortcut: Float[Tensor, "b c h w"] | None = None, memory: Any = None
    ) -> tuple[Float[Tensor, "b c h w"], Any]:
        """x_t + BN(o_t), and o_t where the next mixer needs it."""
        carried = shortcut if self.carry == "shortcut" else memory
        update = light_update(
            x, carried, self.query_weight, self.key_weight, self.value_weight, self.decay, heads=self.heads
        )
        out = x + self.drop_path(self.norm(update)).to(x.dtype)
        return out, update if self.carry == "output" else None

    @torch.no_grad()
    def reset_parameters(self, init: Init) -> None:
        r"""Draws every parameter anew, from torch's global generator.

        Args:
            init: ``"identity"``: norm weight 0, lambda 1, so that the mixer changes nothing until it is trained.
                ``"released"``: as the authors' code, norm weight 1, lambda from N(0, 1). ``"notebook"``: as the Paddle
                notebook, lambda from U(+-sqrt(6 / (c + 1))), kernels normal with standard deviation sqrt(2 / k).
        """
        _one_of("init", init, ("identity", "released", "notebook"))
        for weight in (self.query_weight, self.key_weight):
            kernel_size = weight.shape[-1]
            if init == "notebook":
                weight.normal_(std=math.sqrt(2 / kernel_size))
            else:
                weight.uniform_(-1 / math.sqrt(kernel_size), 1 / math.sqrt(kernel_size))  # torch's default for Conv1d
        _reset_depthwise(self.value_weight)
        _reset_norm(self.norm, init)
        if self.decay is not None:
            # NOTE the authors' N(0, 1) makes the lambda term 19 to 200 times the attention term at the start.
            if init == "identity":
                self.decay.fill_(1.0)
            elif init == "released":
                self.decay.normal_()
            else:
                bound = math.sqrt(6 / (self.decay.numel() + 1))
                self.decay.uniform_(-bound, bound)

    def extra_repr(self) -> str:
        channels = self.value_weight.shape[0]
        return f"{channels}, heads={self.heads}, head_dim={channels // self.heads}, carry={self.carry!r}"


class DepthwiseMixer(LayerMixer):
    """The control arm: MRLA-light's value and norm with no attention and no memory, x_t + BN(v_t).

    If MRLA gains nothing over this, what helped was one more depthwise 3x3 convolution a block.

    Args:
        channels: Channels c of the block's output.
        place: Accepted like every mixer's, not used.
        has_shortcut: Accepted like every mixer's, not used.
        norm: ``"batch"`` or ``"layer"``, as in `MRLALight`.
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
        place: ChainPlace = ALONE,
        has_shortcut: bool = True,
        norm: Norm = "batch",
        drop_path: float = 0.0,
        init: Init = "identity",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.value_weight = nn.Parameter(torch.empty(channels, 1, 3, 3, device=device, dtype=dtype))
        self.norm = _make_norm(norm, channels, device=device, dtype=dtype)
        self.drop_path = _make_drop_path(drop_path)
        self.reset_parameters(init)

    def forward(
        self, x: Float[Tensor, "b c h w"], shortcut: Float[Tensor, "b c h w"] | None = None, memory: Any = None
    ) -> tuple[Float[Tensor, "b c h w"], Any]:
        """x_t + BN(v_t)."""
        value = conv2d(x, self.value_weight, padding=1, groups=x.shape[1])
        return x + self.drop_path(self.norm(value)).to(x.dtype), None

    @torch.no_grad()
    def reset_parameters(self, init: Init) -> None:
        """Draws every parameter anew; `init` as in `MRLALight.reset_parameters`."""
        _one_of("init", init, ("identity", "released", "notebook"))
        _reset_depthwise(self.value_weight)
        _reset_norm(self.norm, init)


METHODS: dict[str, type[LayerMixer]] = {"light": MRLALight, "dw": DepthwiseMixer}
"""The methods that `mrla.attach` knows, by name."""


def _one_of(name: str, given: Any, allowed: tuple[str, ...]) -> Any:
    if given not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}: got {given!r}")
    return given


def _make_norm(norm: Norm, channels: int, **factory: Any) -> nn.Module:
    return _NORMS[_one_of("norm", norm, tuple(_NORMS))](channels, **factory)


def _make_drop_path(drop_path: float) -> nn.Module:
    if not 0 <= drop_path < 1:
        raise ValueError(f"drop_path must be a probability in [0, 1): got {drop_path}")
    return DropPath(drop_path) if drop_path else nn.Identity()


def _reset_norm(norm: nn.Module, init: Init) -> None:
    assert isinstance(norm.weight, Tensor)
    assert isinstance(norm.bias, Tensor)
    norm.weight.fill_(0.0 if init == "identity" else 1.0)
    norm.bias.zero_()
    if isinstance(norm, nn.BatchNorm2d):
        norm.reset_running_stats()


def _reset_depthwise(weight: Tensor) -> None:
    # Kaiming fan-out that does not divide by groups, in the authors' code and in the notebook alike.
    weight.normal_(std=math.sqrt(2 / (weight.shape[0] * weight.shape[2] * weight.shape[3])))
