"""Taking off the mixers without which a network is shown to lose less than a margin."""

import copy
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from torch import nn

from mrla.messages.brief import Brief
from mrla.models import detach, mixed_chains, remove_mixers
from mrla.train.arms import count_parameters
from mrla.train.packages import need

from ..measure import measure_throughput
from ..proportions import proportion_interval
from .effects import (
    Batches,
    Outcomes,
    changes,
    check_limit,
    cut_records,
    limited,
    outcomes,
    outcomes_in,
    possible_cuts,
    without_mixers,
)
from .margins import (
    MARGIN,
    NAMED,
    SAME_IMAGES,
    Judgement,
    check_margin,
    judge,
    judge_first,
    margin_that_would_do,
    removal_candidates,
    removal_order,
    told,
)
from .passes import OnProgress, Passes


@dataclass(frozen=True, kw_only=True, repr=False)
class Pruning(Brief):
    """What was taken off a network, and what that did.

    Attributes:
        kept: Paths of the blocks that still have a mixer.
        removed: Paths of those that have none any more; empty where the network is as it was.
        cuts: What each mixer's cut alone cost, see `mrla.analysis.explanation.effects.cut_records`.
        before: ``accuracy``, ``accuracy_interval`` (``low``, ``high``), ``loss``, ``parameters`` and
            ``images_per_second`` of the network as it was.
        after: The same of what is left, on the same images, with the changes and their intervals.
        margin: How many points of accuracy might be lost.
        steps: What the images say of the network without the mixer whose cut costs least, then without that and the
            next, and so on up to the first step that is not shown to lose less than the margin; see
            `mrla.analysis.explanation.margins.Judgement`. Where `keep` was given, the one judgement of what was asked.
        verdict: What was taken off and why no more, in words.
        note: That the same images chose and judged, where they did: blocks named in `keep` were chosen by the caller.
    """

    kept: tuple[str, ...]
    removed: tuple[str, ...]
    cuts: list[dict[str, Any]]
    before: dict[str, Any]
    after: dict[str, Any]
    margin: float
    steps: list[dict[str, Any]]
    verdict: str
    note: str

    def _brief(self) -> dict[str, object]:
        return {
            "kept": f"{len(self.kept)} of {len(self.kept) + len(self.removed)} mixers",
            "accuracy": f"{self.before['accuracy']:.4f} before, {self.after['accuracy']:.4f} after",
            "loss": f"{self.before['loss']:.4f} before, {self.after['loss']:.4f} after",
            "removed": ", ".join(self.removed) or "none",
        }


def prune(
    model: nn.Module,
    loader: Batches,
    *,
    keep: int | Sequence[str] | None = None,
    margin: float = MARGIN,
    max_images: int | None = 1000,
    on_progress: OnProgress | None = None,
) -> Pruning:
    """Takes mixers off, in place, as far as the network is shown to lose less accuracy than a margin.

    Each mixer is cut alone, on the images of the loader, which gives their order: first those without which the
    accuracy is highest. Then the first of them, the first two, and so on are cut together. The largest such set goes up
    to which every one is shown to lose less than the margin, and then the network that is left is looked at once more.
    Shown is what the lower end of the interval of the change of accuracy says (a test of non-inferiority, with
    `mrla.analysis.proportions.paired_interval`). A mixer whose cut alone is seen to lose more than the margin stays.
    Where the images do not suffice all stay.

    Steps up to the first that fails need no correction for their number if their order is settled beforehand. Here the
    same images choose the order and judge, so the scores flatter: of 8 mixers that each cost exactly the margin one is
    taken off in 18 of 100 tries, not in 2.5. To judge by other images, name in `keep` what was kept with a loader of
    these.

    Args:
        model: A classifier with mixers, changed in place; `mrla.save` keeps it as it then is.
        loader: Batches of images (b, c, h, w) and labels (b,), the same ones in the same order each time.
        keep: How many mixers stay, those whose cut costs most, or the paths of their blocks; None for those that are
            needed. With none left the network is plain again, as by `mrla.detach`.
        margin: How many points of accuracy may be lost, from 0 to 100; 100 takes off what `keep` says in any case.
        max_images: How many of the loader's images are used; None for all.
        on_progress: Called with the passes over a batch done and those in all.

    Returns:
        What was kept and removed and on what evidence, with accuracy and speed before and after.

    Raises:
        ValueError: If the network has no mixers, `keep`, `margin` or `max_images` is not as described, the loader gives
            other images later, or the network that `keep` asks for is not shown to lose less than the margin; `model`
            is then as it was.

    Example:
        >>> import mrla, timm, torch
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> model = mrla.attach(timm.create_model("resnet18", channels=(8, 8, 16, 16), num_classes=3), "base")
        >>> data = TensorDataset(torch.randn(6, 3, 32, 32), torch.arange(6) % 3)
        >>> mrla.prune(model, DataLoader(data, batch_size=3)).removed  # six images show nothing
        ()
        >>> pruned = mrla.prune(model, DataLoader(data, batch_size=3), keep=3, margin=100)
        >>> len(pruned.kept), len(pruned.removed)
        (3, 5)
    """
    need("scipy")
    known = [block for chain in mixed_chains(model) for block in chain.mixers]
    _check_keep(keep, known)
    check_margin(margin)
    check_limit(max_images)
    cuts = possible_cuts(model, ["mixers"])
    passes = Passes(loader, max_images, len(cuts) + 2 if keep is not None else 2 * len(cuts) + 1, on_progress)
    states = [nullcontext, *(one.of(model) for one in cuts)]
    whole, *found = outcomes_in(model, loader, states, images=max_images, on_pass=passes.step)
    records = cut_records(whole, found, cuts)
    steps: list[Judgement] = []
    if keep is None:
        steps = _steps(model, loader, whole, found, records, margin=margin, max_images=max_images, passes=passes)
        removed = next((one.removed for one in reversed(steps) if one.shown), ())
    else:
        removed = _not_kept(keep, removal_order(records))
    less, left = model, whole
    if removed:
        less = _without(copy.deepcopy(model), removed)
        left = outcomes(less, loader, images=max_images, on_pass=passes.step)
        last = judge(whole, left, removed=removed, margin=margin)
        if keep is not None:
            steps = [last]
            _check_shown(last, whole, len(known))
        elif not last.shown:  # by the rounding of a network that is built otherwise
            steps, removed, less, left = [last], (), model, whole
    rates = _rates(model, less, loader)
    if removed:
        _without(model, removed)
    passes.end()
    return Pruning(
        kept=tuple(block for block in known if block not in removed),
        removed=tuple(block for block in known if block in removed),
        cuts=records,
        before={**_scores(whole), **rates["before"]},
        after={**_scores(left), **changes(whole, left), **rates["after"]},
        margin=margin,
        steps=[step.record() for step in steps],
        verdict=_verdict(removed, steps, len(known)),
        note=SAME_IMAGES if keep is None or isinstance(keep, int) else NAMED,
    )


def _steps(
    model: nn.Module,
    loader: Batches,
    whole: Outcomes,
    found: Sequence[Outcomes],
    records: Sequence[Mapping[str, Any]],
    *,
    margin: float,
    max_images: int | None,
    passes: Passes,
) -> list[Judgement]:
    """The judgements of ever more mixers cut together, up to the first that is not shown to lose less."""
    steps = [judge_first(whole, found, records, margin=margin)]
    candidates = removal_candidates(records, margin)
    sets = [candidates[:count] for count in range(2, len(candidates) + 1)]
    if not steps[0].shown or not sets:
        return steps
    states = [partial(without_mixers, model, blocks) for blocks in sets]
    together = outcomes_in(model, loader, states, images=max_images, on_pass=passes.step)
    for blocks, left in zip(sets, together, strict=True):
        steps.append(judge(whole, left, removed=blocks, margin=margin))
        if not steps[-1].shown:
            break
    return steps


def _without(model: nn.Module, removed: Sequence[str]) -> nn.Module:
    """The network itself, with the mixers of these blocks taken off for good."""
    known = [block for chain in mixed_chains(model) for block in chain.mixers]
    return detach(model) if set(removed) == set(known) else remove_mixers(model, removed)


def _check_shown(judgement: Judgement, whole: Outcomes, mixers: int) -> None:
    if not judgement.shown:
        interval = _scores_interval(judgement)
        raise ValueError(
            f"what is left must be shown to lose less than the margin: without {len(judgement.removed)} of {mixers} "
            f"mixers the accuracy is {100 * judgement.accuracy:.2f} % ({interval}) in place of "
            f"{100 * whole.scores()['accuracy']:.2f} %, which {told(judgement)}; keep more mixers, take more images, "
            f"or allow more with --margin {margin_that_would_do(judgement):g}"
        )


def _verdict(removed: Sequence[str], steps: Sequence[Judgement], mixers: int) -> str:
    """What was taken off, and why no more."""
    failed = [step for step in steps if not step.shown]
    if not removed:
        if not failed:
            return "All mixers stay, as was asked for."
        first = failed[0]
        least = (
            f"without {', '.join(first.removed)}, whose cut costs least," if len(first.removed) == 1 else "without them"
        )
        return f"All {mixers} mixers stay: even {least} the network {told(first)}."
    taken = next(step for step in reversed(steps) if step.shown)
    said = f"Without {len(removed)} of {mixers} mixers the network {told(taken)}."
    if failed:
        (more,) = [block for block in failed[0].removed if block not in taken.removed]
        said += f" Without {more} too it {told(failed[0])}."
    return said


def _scores(said: Outcomes) -> dict[str, Any]:
    low, high = proportion_interval(int(said.hits.sum()), len(said.hits))
    return {**said.scores(), "accuracy_interval": {"low": low, "high": high}}


def _scores_interval(judgement: Judgement) -> str:
    low, high = proportion_interval(round(judgement.accuracy * judgement.images), judgement.images)
    return f"95 % interval {100 * low:.2f} to {100 * high:.2f}"


def _rates(before: nn.Module, after: nn.Module, loader: Batches) -> dict[str, dict[str, Any]]:
    images, _ = next(iter(limited(loader, None)))
    images = images.to(next(after.parameters()).device)
    rates = measure_throughput({"before": before, "after": after}, images)
    return {
        name: {
            "parameters": count_parameters(network)["trainable"],
            "images_per_second": asdict(rates[name]),
        }
        for name, network in (("before", before), ("after", after))
    }


def _check_keep(keep: int | Sequence[str] | None, known: Sequence[str]) -> None:
    if isinstance(keep, int) and not 0 <= keep <= len(known):
        raise ValueError(f"keep must be from 0 to {len(known)}, the mixers of this network: got {keep}")
    if keep is not None and not isinstance(keep, int):
        for block in keep:
            if block not in known:
                raise ValueError(
                    f"keep must be a number, or paths of blocks with a mixer: got {block!r}; choose of "
                    f"{', '.join(known)}"
                )


def _not_kept(keep: int | Sequence[str], order: Sequence[str]) -> tuple[str, ...]:
    """The blocks that lose their mixer, of all in the order in which mixers are taken off."""
    if isinstance(keep, int):
        return tuple(order[: len(order) - keep])
    return tuple(block for block in order if block not in keep)
