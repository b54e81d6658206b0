"""What a block takes from each block before it: of one mixer, and of a whole chain of them."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class Heard(NamedTuple):
    """What one mixer hears of each image, and what of it is handed on.

    Attributes:
        weights: (b, t, g), what each head takes of the values that are asked, the block's own last: attention's weights
            of base and exact, light's gate (t is 1).
        decay: lambda, (c,), of light where something is carried; else None.
        passes_on: (c,), what multiplies the update o_t on its way into the block's output and so into the shortcut of
            the block behind; None where that is no fixed number.
        carries_update: Whether lambda multiplies the update before, not the shortcut.
    """

    weights: Tensor
    decay: Tensor | None = None
    passes_on: Tensor | None = None
    carries_update: bool = False


class Terms(NamedTuple):
    """How long the two terms of light's update are, for each image.

    Attributes:
        attention: (b,), the Euclidean length of what the gate lets through.
        carried: (b,), that of the lambda term.
    """

    attention: Tensor
    carried: Tensor


def retrieval(chain: Sequence[Heard | None]) -> Float[Tensor, "b g t s"]:
    r"""How much each head of block t of a chain hears each source s: what came in, and every block up to t.

    Base and exact: the weight of attention, softmax or sigmoid, itself. Light: what stands before the source when the
    recurrence is written out, as a magnitude, in the mean over a head's channels. With ``carry="output"``

    .. math:: o_t = \sum_{s \le t} \beta_{t,s} \odot g_s v_s, \qquad \beta_{t,s} = \lambda_t \cdots \lambda_{s+1}

    (arXiv:2302.03985, eq. 8 unrolled) that is :math:`|\beta_{t,s}|\, g_s`. With ``carry="shortcut"`` lambda multiplies
    the output of the block before, :math:`x_{t-1} + a_{t-1} \odot o_{t-1}`, with a what the BatchNorm multiplies (in
    eval mode, where that is fixed), so that written out

    .. math:: o_t = g_t v_t + \sum_{s < t} P_{t,s} \odot (x_s + a_s \odot g_s v_s) + P_{t,\mathrm{in}} \odot s_1, \qquad
              P_{t,s} = \lambda_t\, (a_{t-1} \lambda_{t-1}) \cdots (a_{s+1} \lambda_{s+1})

    but for constants, and it is :math:`|P_{t,s}|\,(1 + |a_s|\, g_s)`. Where a LayerNorm stands between, which scales
    every pixel by itself, only the block before is heard. What the network's own adds carry on is not counted.

    Args:
        chain: What the mixers heard, in order; None for a block that has none.

    Returns:
        For each image, head, block t and source s, in float32: source 0 is what came into the chain, source s the block
        s, counted from 1. NaN where t cannot hear s.

    Raises:
        ValueError: If no block of the chain hears, or the mixers have different numbers of heads.

    Example:
        >>> one, half = torch.ones(1, 1, 1), torch.full((2,), 0.5)
        >>> heard = Heard(one, decay=half, carries_update=True)
        >>> retrieval([heard._replace(decay=None), heard, heard])[0, 0, 2].tolist()  # lambda^2, lambda, the own gate
        [nan, 0.25, 0.5, 1.0]
    """
    hearing = [heard for heard in chain if heard is not None]
    if not hearing:
        raise ValueError("a chain must have a mixer that says what it hears: got none")
    images, _, heads = hearing[0].weights.shape
    if any(heard.weights.shape[::2] != (images, heads) for heard in hearing):
        shapes = ", ".join(str(tuple(heard.weights.shape)) for heard in hearing)
        raise ValueError(f"mixers of one chain must have the same images and heads: got weights (b, t, g) of {shapes}")
    rows = hearing[0].weights.new_full((len(chain), len(chain) + 1, images, heads), torch.nan, dtype=torch.float32)
    speakers: list[int] = []
    for at, heard in enumerate(chain):
        if heard is None:
            continue
        speakers.append(at + 1)
        asked = heard.weights.float().unbind(1)
        for source, weight in zip(speakers[len(speakers) - len(asked) :], asked, strict=True):
            rows[at, source] = weight
        if heard.decay is not None:
            _write_out(chain, at, rows[at])
    return rows.permute(2, 3, 0, 1)


def _write_out(chain: Sequence[Heard | None], at: int, row: Tensor) -> None:
    """Fills in what the lambda term of block `at` hears, going back block by block."""
    heard = chain[at]
    assert heard is not None
    heads, factor = row.shape[-1], heard.decay
    for before in range(at - 1, -2, -1):
        assert factor is not None
        magnitude = factor.float().abs()
        if before < 0:
            if not heard.carries_update:
                row[0] = _by_head(magnitude, heads)
            return
        other = chain[before]
        if heard.carries_update:
            if other is None:
                continue  # such a block passes the update by
            row[before + 1] = _by_head(magnitude, heads) * other.weights[:, -1].float()
            factor = None if other.decay is None else factor * other.decay
        else:
            row[before + 1] = _by_head(magnitude, heads)
            on = None if other is None else other.passes_on
            if on is not None and other is not None:
                row[before + 1] = row[before + 1] + _by_head(magnitude * on.abs(), heads) * other.weights[:, -1].float()
            factor = None if on is None or other is None or other.decay is None else factor * on * other.decay
        if factor is None:
            return


def _by_head(per_channel: Float[Tensor, " c"], heads: int) -> Float[Tensor, " g"]:
    return per_channel.unflatten(0, (heads, -1)).mean(1)
