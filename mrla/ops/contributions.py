"""What a block takes from each block before it: of one mixer, and of a whole chain of them."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class Contribution(NamedTuple):
    """Per-image attention weights of one mixer, and the factors by which its update reaches later blocks.

    Attributes:
        weights: (b, t, g), what each head takes of the attended values, the block's own last: attention's weights
            of base and exact, light's gate (t is 1).
        decay: lambda, (c,), of light where something is carried; else None.
        passes_on: (c,), what multiplies the update o_t on its way into the block's output and so into the shortcut of
            the block behind; None where that is no fixed number.
        carries_update: Whether lambda multiplies the update before, not the shortcut.
    """

    weights: Tensor
    decay: Tensor | None = None
    residual_gain: Tensor | None = None
    carries_update: bool = False


class UpdateNorms(NamedTuple):
    """How long the two terms of light's update are, for each image.

    Attributes:
        attention: (b,), the Euclidean length of what the gate lets through.
        carried: (b,), that of the lambda term.
    """

    attention: Tensor
    carried: Tensor


def attention_over_layers(chain: Sequence[Contribution | None]) -> Float[Tensor, "b g t s"]:
    r"""How much each head of block t of a chain takes from each source s: the chain's input, and every block up to t.

    Base and exact: the weight of attention, softmax or sigmoid, itself. Light: what stands before the source when the
    recurrence is written out, as a magnitude, in the mean over a head's channels. With ``carry="output"``

    .. math:: o_t = \sum_{s \le t} \beta_{t,s} \odot g_s v_s, \qquad \beta_{t,s} = \lambda_t \cdots \lambda_{s+1}

    (arXiv:2302.03985, eq. 8 unrolled) that is :math:`|\beta_{t,s}|\, g_s`. With ``carry="shortcut"`` lambda multiplies
    the output of the block before, :math:`x_{t-1} + a_{t-1} \odot o_{t-1}`, with a what the BatchNorm multiplies (in
    eval mode, where that is fixed), so that written out

    .. math:: o_t = g_t v_t + \sum_{s < t} P_{t,s} \odot (x_s + a_s \odot g_s v_s) + P_{t,\mathrm{in}} \odot s_1, \qquad
              P_{t,s} = \lambda_t\, (a_{t-1} \lambda_{t-1}) \cdots (a_{s+1} \lambda_{s+1})

    but for constants, and it is :math:`|P_{t,s}|\,(1 + |a_s|\, g_s)`. Where a LayerNorm stands between, which scales
    every pixel by itself, only the block before is counted. What the network's own residual adds carry is not counted.

    Args:
        chain: The mixers' contributions, in order; None for a block that has none.

    Returns:
        For each image, head, block t and source s, in float32: source 0 is what came into the chain, source s the block
        s, counted from 1. NaN where t takes nothing from s.

    Raises:
        ValueError: If no block of the chain has contributions, or the mixers have different numbers of heads.

    Example:
        >>> one, half = torch.ones(1, 1, 1), torch.full((2,), 0.5)
        >>> one_block = Contribution(one, decay=half, carries_update=True)
        >>> rows = attention_over_layers([one_block._replace(decay=None), one_block, one_block])
        >>> rows[0, 0, 2].tolist()  # lambda^2, lambda, the own gate
        [nan, 0.25, 0.5, 1.0]
    """
    known = [one for one in chain if one is not None]
    if not known:
        raise ValueError("a chain must have a mixer that tells of its contributions: got none")
    images, _, heads = known[0].weights.shape
    if any(one.weights.shape[::2] != (images, heads) for one in known):
        shapes = ", ".join(str(tuple(one.weights.shape)) for one in known)
        raise ValueError(f"mixers of one chain must have the same images and heads: got weights (b, t, g) of {shapes}")
    rows = known[0].weights.new_full((len(chain), len(chain) + 1, images, heads), torch.nan, dtype=torch.float32)
    with_values: list[int] = []
    for at, contribution in enumerate(chain):
        if contribution is None:
            continue
        with_values.append(at + 1)
        of_sources = contribution.weights.float().unbind(1)
        for source, weight in zip(with_values[len(with_values) - len(of_sources) :], of_sources, strict=True):
            rows[at, source] = weight
        if contribution.decay is not None:
            _unroll(chain, at, rows[at])
    return rows.permute(2, 3, 0, 1)


def _unroll(chain: Sequence[Contribution | None], at: int, row: Tensor) -> None:
    """Fills in what the lambda term of block `at` takes from earlier blocks, going back block by block."""
    contribution = chain[at]
    assert contribution is not None
    heads, factor = row.shape[-1], contribution.decay
    for before in range(at - 1, -2, -1):
        assert factor is not None
        magnitude = factor.float().abs()
        if before < 0:
            if not contribution.carries_update:
                row[0] = _by_head(magnitude, heads)
            return
        other = chain[before]
        if contribution.carries_update:
            if other is None:
                continue  # such a block passes the update by
            row[before + 1] = _by_head(magnitude, heads) * other.weights[:, -1].float()
            factor = None if other.decay is None else factor * other.decay
        else:
            row[before + 1] = _by_head(magnitude, heads)
            gain = None if other is None else other.residual_gain
            if gain is not None and other is not None:
                own = _by_head(magnitude * gain.abs(), heads) * other.weights[:, -1].float()
                row[before + 1] = row[before + 1] + own
            factor = None if gain is None or other is None or other.decay is None else factor * gain * other.decay
        if factor is None:
            return


def _by_head(per_channel: Float[Tensor, " c"], heads: int) -> Float[Tensor, " g"]:
    return per_channel.unflatten(0, (heads, -1)).mean(1)
