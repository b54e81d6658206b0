"""What a fused operator is called with and what it returns, as values with names; a backend gets these."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from torch import Tensor, nn


class MixerCall(NamedTuple):
    """The tensors that one mixer's call would read, by which a backend decides whether it supports the call.

    The shapes fit one another and the mixer's kernels.

    Attributes:
        method: Which operator.
        x: The block's output; with `epilogue` the branch that it is relu(norm(branch) + shortcut) of.
        shortcut: What the block added, where it is read.
        parameters: Every small tensor that is read: kernels, scales, and the weights and statistics of norms.
        norm: The mixer's norm.
        epilogue: Whether the end of the residual block is computed too.
        values: Those of earlier blocks, for base.
        keys: As `forward` had it.
    """

    method: Literal["light", "base"]
    x: Tensor
    shortcut: Tensor | None
    parameters: tuple[Tensor | None, ...]
    norm: nn.BatchNorm2d
    epilogue: bool = False
    values: Sequence[Tensor] = ()
    keys: Sequence[Tensor] = ()


class ResidualEpilogue(NamedTuple):
    """What a residual block still has to do: relu(norm(branch) + shortcut).

    Attributes:
        branch: The output of the block's last convolution.
        norm: A BatchNorm, or the identity where it has been folded into the convolution.
        shortcut: What the block adds.
        owned: Whether nobody else holds `branch`, so that it may be overwritten where no gradient is wanted.
    """

    branch: Tensor
    norm: nn.Module
    shortcut: Tensor
    owned: bool


class ResidualNorm(NamedTuple):
    """The norm behind a block's branch as kernels read it: weight * (branch - mean) / deviation + bias, in float32.

    Attributes:
        weight: Per channel; None for ones.
        bias: Per channel; None for zeros.
        mean: Per channel; None where there is no norm.
        spread: The norm's variance; with `training` one over the batch's deviation.
        eps: The norm's.
        training: Whether mean and deviation are those of the batch.
    """

    weight: Tensor | None = None
    bias: Tensor | None = None
    mean: Tensor | None = None
    spread: Tensor | None = None
    eps: float = 0.0
    training: bool = False


class Begun(NamedTuple):
    """A residual epilogue as far as torch has to compute it before the kernels go on.

    Attributes:
        map: What the kernels read: the branch, or what torch's norm has made of it.
        rest: The norm that is still to be applied to that.
        norm: The norm behind the branch.
        owned: Whether nobody else holds `map`, see `ResidualEpilogue`.
    """

    map: Tensor
    rest: ResidualNorm
    norm: ResidualNorm
    owned: bool


class LightWeights(NamedTuple):
    """What MRLA-light and the BatchNorm behind it own, in float32."""

    query: Tensor
    key: Tensor
    value: Tensor
    decay: Tensor | None
    norm_weight: Tensor
    norm_bias: Tensor


class LightState(NamedTuple):
    """What the gradient needs beside the maps: some numbers for each plane, and the norm's mean and variance."""

    means: Tensor
    gates: Tensor
    moments: Tensor
    mean: Tensor
    variance: Tensor


class BaseWeights(NamedTuple):
    """What MRLA-base, the BatchNorm behind it and its scale own, in float32."""

    query: Tensor
    key: Tensor
    value: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    scale: Tensor | None


class BaseForm(NamedTuple):
    """What kind of MRLA-base it is."""

    heads: int
    eps: float
    softmax: bool
    rectify: bool


class BaseState(NamedTuple):
    """The block's own value and key for the memory, and what else the gradient needs beside the maps.

    Attributes:
        value: v_t.
        key: k_t, one row an image.
        query: q_t, one row an image.
        weights: What each head takes from each block, (b, g, t).
        means: Means of x over space, with zeros on both sides of the channels.
        mean: The norm's.
        variance: The norm's, biased.
    """

    value: Tensor
    key: Tensor
    query: Tensor
    weights: Tensor
    means: Tensor
    mean: Tensor
    variance: Tensor


class DeferredGrad(NamedTuple):
    """A gradient that a later block defers to an earlier one: that of its y, and what it took of the earlier value.

    Attributes:
        grad_update: The gradient of the later block's y.
        attn: What the later block's heads take from each block, `BaseState.weights`.
        block: The place of the earlier block among those.
    """

    grad_update: Tensor
    attn: Tensor
    block: int
