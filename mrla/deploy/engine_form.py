"""Mixers written another way, with the same numbers, in operators that ONNX Runtime does without changing layouts."""

import copy
from typing import Any, NamedTuple, TypeGuard

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import conv1d, conv2d, one_hot, pad

from mrla.models import is_attached, mixed_chains
from mrla.models.mixed_blocks import MIXER
from mrla.ops import Grid, LayerMixer, MRLALight, unobserved

_WINDOW = 4  # side of the windows whose means are taken first; 4, 8 and 16 cost the same in a ResNet-50
_DIRECT = 8  # up to so many input channels a convolution is blocked whatever their number
_BLOCK = 16  # channels that lie together on processors with AVX-512; 8 with AVX2


class Ground(NamedTuple):
    """What every map of a chain shares, made once by the first mixer that needs it.

    Attributes:
        nothing: Zeros of the maps' size, one channel. A sum with it spreads numbers over space without asking for the
            size, which in a graph of dynamic sizes is a reader that wants the whole map in the plain layout.
        correction: What turns the mean of all windows' means into the mean over space, (b, 1, 1).
    """

    nothing: Float[Tensor, "b 1 h w"]
    correction: Float[Tensor, "b 1 1"]


def engine_form(model: nn.Module) -> nn.Module:
    r"""A copy of a network for export, whose mixers say the same in operators that suit ONNX Runtime on a CPU.

    .. math:: x + \mathrm{BN}(\sigma(q \cdot k / \sqrt d)\, \mathrm{DWConv}(x) + \lambda \odot s)
              = x + \mathrm{DWConv}'(g \odot x) + \lambda' \odot s + b'

    with the norm folded into the depthwise kernel, lambda and a bias, in float64. The gate g is one number for a
    channel, so it may be applied to x in front of the convolution. ONNX Runtime keeps maps in blocks of channels from
    one convolution to the next, and puts a map back into the plain layout for most other operators. Here every pass
    over a whole map is a convolution, with the sum that follows it, or a product of two maps of one shape: both stay
    blocked.

    Known is `MRLALight` in the released form: ``carry="shortcut"``, maps in NCHW, BatchNorm, no activations, no hooks.
    Every other mixer, and the rest of the network, stays as it is, so the copy of a network without mixers is a plain
    one. The copy says what the network says, but for rounding. For OpenVINO
    export the network itself, which is faster there.

    The copy is in eval mode and its parameters require no gradient; the network itself stays as it was.

    Args:
        model: A network with mixers or without; it is read in eval mode.

    Returns:
        The copy, to be exported; with dynamic batch and sizes too.

    Raises:
        TypeError: If `model` is not a module.

    Example:
        >>> import mrla, timm, torch
        >>> model = mrla.attach(timm.create_model("test_resnet", num_classes=10), "light", init="released").eval()
        >>> image = torch.randn(1, 3, 160, 160)
        >>> torch.allclose(engine_form(model)(image), model(image), atol=1e-4)
        True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"engine_form needs a torch.nn.Module: got {type(model).__name__}")
    copied = copy.deepcopy(model).requires_grad_(False)
    for chain in mixed_chains(copied) if is_attached(copied) else []:
        blocks = [copied.get_submodule(path) for path in chain.mixers]
        known = {block: mixer for block in blocks if _is_known(mixer := block._modules[MIXER])}
        # A mixer of another kind would not know what to do with a Ground.
        for block, mixer in known.items():
            block._modules[MIXER] = EngineLight(mixer, shares=len(known) == len(blocks))
    return copied.eval()


class EngineLight(LayerMixer):
    """`MRLALight` for inference alone, its norm folded in, in the operators that `engine_form` tells of.

    Args:
        mixer: A mixer in the released form, with a BatchNorm that keeps statistics.
        shares: Whether memory is a `Ground` that the mixers of a chain hand on; False where others stand among them.
    """

    def __init__(self, mixer: MRLALight, *, shares: bool = True):
        super().__init__()
        norm = mixer.plain_norm
        if norm is None or norm.running_mean is None or norm.running_var is None:
            raise ValueError("mixer must have a BatchNorm on NCHW maps that keeps statistics: use the mixer as it is")
        channels, heads, dtype = mixer.channels, mixer.heads, mixer.value_weight.dtype
        self.place = mixer.place
        self.shares = shares
        self.heads = heads
        extra = 0 if heads <= _DIRECT else -heads % _BLOCK
        self.extra_heads = extra
        scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
        bias = norm.bias.double() - scale * norm.running_mean.double()
        head_of = torch.arange(channels) // (channels // heads)
        spread = one_hot(head_of, heads + extra)
        queries = mixer.query_weight.double() * (channels // heads) ** -0.5
        tables = {
            "query_key": torch.cat((queries, mixer.key_weight.double())),
            "value": mixer.value_weight.double() * scale[:, None, None, None],
            "bias": bias,
            "decay": None if mixer.decay is None else (scale * mixer.decay.double())[:, None, None, None],
            "spread": spread[:, :, None, None],
            "window": torch.full((channels, 1, _WINDOW, _WINDOW), _WINDOW**-2),
            "nothing": torch.zeros(1, channels, 1, 1),
        }
        for name, table in tables.items():
            weight = None if table is None else table.detach().to(device=norm.weight.device, dtype=dtype)
            self.register_buffer(name, weight)

    query_key: Tensor
    value: Tensor
    bias: Tensor
    decay: Tensor | None
    spread: Tensor
    window: Tensor
    nothing: Tensor

    @property
    def carries_memory(self) -> bool:
        """Whether mixers of the chain hand a `Ground` on."""
        return self.shares

    def forward(
        self,
        x: Float[Tensor, "b c h w"],
        shortcut: Float[Tensor, "b c h w"] | None = None,
        memory: Any = None,
        *,
        grid: Grid | None = None,
    ) -> tuple[Float[Tensor, "b c h w"], Ground | None]:
        """The block's new output, and the ground for the next mixer."""
        ground = memory if isinstance(memory, Ground) else self._ground(x)
        gate = self._gate(x, ground)
        everywhere = conv2d(ground.nothing + gate.to(x.dtype)[:, :, None, None], self.spread)
        # In this order x has no reader after the first sum, nor that sum after the second, so each is written in place.
        out = conv2d(everywhere * x, self.value, self.bias, padding=1, groups=len(self.value)) + x
        if shortcut is not None and self.decay is not None:
            out = conv2d(shortcut, self.decay, groups=len(self.decay)) + out
        return out, ground if self.shares else None

    def _gate(self, x: Tensor, ground: Ground) -> Float[Tensor, "b g"]:
        """One number per image and head, and zeros for the heads that only fill up a block."""
        # A plain mean would put the whole map into the plain layout first; means of windows are a 16th of it.
        pooled = _means(x, self.window)[:, None] * ground.correction
        weight = self.query_key.to(pooled.dtype)
        product = conv1d(pooled, weight, padding=weight.shape[-1] // 2).prod(1)
        gate = product.unflatten(1, (self.heads, -1)).sum(-1).sigmoid()
        return pad(gate, (0, self.extra_heads)) if self.extra_heads else gate

    def _ground(self, x: Tensor) -> Ground:
        nothing = conv2d(x, self.nothing)
        return Ground(nothing, _means(nothing + 1, self.window[:1])[:, None].reciprocal())

    def reset_parameters(self, init: Any) -> None:
        """Raises: there are no parameters to draw."""
        raise ValueError("the engine form of a mixer has no parameters to draw: reset the network's, and make it anew")

    def extra_repr(self) -> str:
        """Channels and heads."""
        return f"{len(self.value)}, heads={self.heads}"


def _is_known(mixer: nn.Module | None) -> TypeGuard[MRLALight]:
    """Whether an `EngineLight` may stand for it: the exact class, since one made of it may do anything."""
    if type(mixer) is not MRLALight or not unobserved(mixer):
        return False
    released = mixer.carry == "shortcut" and mixer.value_act is None and mixer.out_act is None
    return released and mixer.plain_norm is not None and mixer.plain_norm.running_var is not None


def _means(x: Tensor, window: Tensor) -> Float[Tensor, "b c"]:
    """The mean of the means of windows that cover a map, what lies outside counted as zeros."""
    # So much in front that every map, of whatever size, is covered and each pixel is in one window.
    means = conv2d(x, window, stride=_WINDOW, padding=_WINDOW - 1, groups=len(window))
    return means.mean((2, 3), dtype=torch.promote_types(x.dtype, torch.float32))
