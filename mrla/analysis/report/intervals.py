"""Intervals on a common scale, as positions in percent of its width: drawn by style sheet, without an image."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Mark(NamedTuple):
    """One interval on the scale; all in percent of its width.

    Attributes:
        at: Where the value is.
        start: Where the interval begins, or None where there is none.
        width: How wide it is.
    """

    at: float
    start: float | None
    width: float | None


class Track(NamedTuple):
    """A scale and what is marked on it.

    Attributes:
        zero: Where zero is, in percent.
        ticks: Positions and labels.
        marks: One for each interval.
    """

    zero: float
    ticks: list[tuple[float, str]]
    marks: list[Mark]


def track(intervals: Sequence[Mapping[str, Any]], *, unit: float = 1.0) -> Track:
    """A scale that holds all intervals and zero.

    Args:
        intervals: What is marked on it; at least one. Each has a ``mean``, ``low`` and ``high``; the last two may be
            None.
        unit: How much of them is one of the scale, such as 0.01 for a scale in percent.

    Returns:
        The scale; its ticks are multiples of 1, 2 or 5 times a power of ten.

    Raises:
        ValueError: If there is no interval.

    Example:
        >>> scale = track([{"mean": 1.0, "low": -1.0, "high": 3.0}, {"mean": 2.0, "low": None, "high": None}])
        >>> [label for _, label in scale.ticks]
        ['-1', '0', '1', '2', '3']
        >>> scale.marks[1].start is None
        True
    """
    if not intervals:
        raise ValueError("a scale needs an interval: got none; leave the plot out")
    known = [[one[name] for name in ("mean", "low", "high") if one[name] is not None] for one in intervals]
    reached = [0.0, *(end / unit for ends in known for end in ends)]
    low, high = min(reached), max(reached)
    margin = 0.06 * (high - low) or 1.0
    low, high = low - margin, high + margin

    def position(value: float) -> float:
        return round(100 * (value - low) / (high - low), 3)

    marks = []
    for ends in known:
        mean, *interval = (position(end / unit) for end in ends)
        start, end = interval if len(interval) == 2 else (None, None)
        marks.append(Mark(mean, start, None if start is None or end is None else round(end - start, 3)))
    return Track(position(0.0), [(position(tick), label) for tick, label in _ticks(low, high)], marks)


def _ticks(low: float, high: float) -> list[tuple[float, str]]:
    rough = (high - low) / 6
    power = math.floor(math.log10(rough))
    step = next(step for factor in (1, 2, 5, 10) if (step := factor * 10.0**power) >= rough * 0.99)
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    count = range(math.ceil(low / step), math.floor(high / step) + 1)
    return [(index * step, f"{index * step:.{digits}f}") for index in count]
