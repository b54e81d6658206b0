"""Whether a network is shown to lose less than a margin without some mixers: what `explain` and `prune` decide by."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..proportions import images_needed
from .effects import Outcomes, changes

MARGIN = 0.5
"""Points of accuracy that may be lost, where the user names no other number."""
SAME_IMAGES = (
    "The same images chose what is cut and judged it, so the scores flatter: mrla eval on other images says what was "
    "lost."
)
NAMED = "The blocks were named, not chosen by these images; if images chose them before, these should be others."


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """What images say of a network without some of its mixers, all cut at once.

    Attributes:
        removed: Paths of the blocks without their mixers.
        margin: What may be lost, in points of accuracy.
        images: How many images were looked at.
        gained: How many of them are right only without these mixers.
        lost: How many are right only with them.
        accuracy: Accuracy without these mixers.
        loss: Mean loss without these mixers.
        accuracy_change: ``mean``, ``low`` and ``high`` of the change against the whole network; Tango's 95 % interval.
        loss_change: The same of the loss; that of a paired t test.
        shown: Whether the lower end of the accuracy's interval is not below the margin.
        images_needed: How many images would show it if the shares gained and lost stay; None where more is seen to be
            lost than the margin.
        images_at_least: How many images show such a margin where none is gained or lost; None of the margin 0.
    """

    removed: tuple[str, ...]
    margin: float
    images: int
    gained: int
    lost: int
    accuracy: float
    loss: float
    accuracy_change: dict[str, Any]
    loss_change: dict[str, Any]
    shown: bool
    images_needed: int | None
    images_at_least: int | None

    def record(self) -> dict[str, Any]:
        """What a JSON file holds of it."""
        return {**asdict(self), "removed": list(self.removed)}


def check_margin(margin: float) -> None:
    """Refuses a margin that is no number of points of accuracy."""
    if not 0 <= margin <= 100:  # NaN neither
        raise ValueError(
            f"margin must be the points of accuracy that may be lost, from 0 to 100: got {margin}; {MARGIN} is usual"
        )


def judge(whole: Outcomes, left: Outcomes, *, removed: Sequence[str], margin: float) -> Judgement:
    """Whether a network is shown to lose less than a margin, a test of non-inferiority.

    It is shown where the lower end of the 95 % interval of the change of accuracy is not below ``-margin``; the loss
    stands beside it and decides nothing, for it may move while no answer changes, or stay while many do.

    Args:
        whole: What the network with all its mixers said of some images.
        left: What it says of them without those of `removed`.
        removed: Paths of blocks.
        margin: What may be lost, in points of accuracy.

    Returns:
        The judgement.

    Raises:
        ValueError: If the images are not the same.
    """
    changed, images = changes(whole, left), len(whole.labels)
    gained, lost = int((left.hits & ~whole.hits).sum()), int((whole.hits & ~left.hits).sum())
    return Judgement(
        removed=tuple(removed),
        margin=margin,
        images=images,
        gained=gained,
        lost=lost,
        **{name: changed[name] for name in ("accuracy", "loss", "accuracy_change", "loss_change")},
        shown=changed["accuracy_change"]["low"] >= -margin / 100,
        images_needed=images_needed(gained, lost, images, margin=margin / 100),
        images_at_least=images_needed(0, 0, images, margin=margin / 100),
    )


def removal_order(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Blocks with a mixer in the order in which mixers are taken off.

    Args:
        records: What each mixer's cut alone cost, see `mrla.analysis.explanation.effects.cut_records`.

    Returns:
        Paths of the blocks: first those without which the accuracy is highest, of equal ones those with the lower loss.
    """
    by_cost = sorted(records, key=lambda one: (-one["accuracy_change"]["mean"], one["loss_change"]["mean"]))
    return [record["block"] for record in by_cost]


def removal_candidates(records: Sequence[Mapping[str, Any]], margin: float) -> list[str]:
    """The blocks of `removal_order` whose cut alone is not seen to lose more than a margin.

    Args:
        records: As there.
        margin: What may be lost, in points of accuracy.

    Returns:
        Paths of the blocks.
    """
    lost = {record["block"]: -100 * record["accuracy_change"]["mean"] for record in records}
    return [block for block in removal_order(records) if lost[block] <= margin]


def judge_first(
    whole: Outcomes, found: Sequence[Outcomes], records: Sequence[Mapping[str, Any]], *, margin: float
) -> Judgement:
    """The judgement of the mixer whose cut costs least: where not even that one is shown, none is taken off.

    Args:
        whole: What the network with all its mixers said.
        found: What it said with each mixer cut.
        records: What each of these cuts cost, in the same order.
        margin: What may be lost, in points of accuracy.

    Returns:
        The judgement.
    """
    first = removal_order(records)[0]
    at = [record["block"] for record in records].index(first)
    return judge(whole, found[at], removed=[first], margin=margin)


def told(judgement: Judgement) -> str:
    """A judgement in words, to follow the name of what is judged."""
    margin = f"{judgement.margin:g} points of accuracy"
    numbers = (
        f"{change_of_accuracy(judgement.accuracy_change)}, loss {change_of_loss(judgement.loss_change)}, "
        f"{judgement.gained} of {count_of_images(judgement.images)} gained and {judgement.lost} lost"
    )
    if (judgement.loss_change["low"] or 0) > 0:
        numbers += "; its loss is shown to rise"
    if judgement.shown:
        return f"is shown to lose less than {margin}: {numbers}"
    if judgement.accuracy_change["high"] < -judgement.margin / 100:
        return f"is shown to lose more than {margin}: {numbers}"
    return f"is not shown to lose less than {margin}: {numbers}; {_evidence_missing(judgement)}"


def _evidence_missing(judgement: Judgement) -> str:
    """How many images would show what a judgement does not show."""
    at_least = None if judgement.images_at_least is None else f"at least {count_of_images(judgement.images_at_least)}"
    if judgement.images_needed is None:
        return "it is seen to lose as much" + (f", and to show such a margin takes {at_least}" if at_least else "")
    if not judgement.gained + judgement.lost:
        return f"that takes {at_least}, none of them changed"
    return f"that would take about {count_of_images(judgement.images_needed)} that change as these do"


def change_of_accuracy(change: Mapping[str, Any]) -> str:
    """A change of accuracy and its interval in points."""
    mean, low, high = (points(change[name]) for name in ("mean", "low", "high"))
    return f"{mean} points (95 % interval {low} to {high})"


def change_of_loss(change: Mapping[str, Any]) -> str:
    """A change of loss and its interval, where there is one."""
    interval = "" if change["low"] is None else f" (95 % interval {change['low']:+.3g} to {change['high']:+.3g})"
    return f"{change['mean']:+.3g}{interval}"


def points(fraction: float) -> str:
    """A change as points with two digits and its sign; what rounds to nothing has none."""
    rounded = round(100 * fraction, 2)
    return f"{rounded:+.2f}" if rounded else "0.00"


def margin_that_would_do(judgement: Judgement) -> float:
    """The smallest margin, in tenths of a point, that the images show."""
    # Rounded first, so that 0.3 is not 0.30000000000000004 and becomes 0.4.
    return math.ceil(round(-1000 * judgement.accuracy_change["low"], 6)) / 10


def count_of_images(count: int) -> str:
    """Such as ``1,000 images``."""
    return "1 image" if count == 1 else f"{count:,} images"
