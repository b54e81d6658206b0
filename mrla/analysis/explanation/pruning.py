"""Taking off the mixers that a network can do without, by what cutting each of them costs."""

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from mrla.models import detach, mixed_chains, remove_mixers
from mrla.models.brief import Brief
from mrla.train.arms import count_parameters
from mrla.train.packages import need

from ..measure import measure_throughput
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
)
from .passes import OnProgress, Passes


@dataclass(frozen=True, kw_only=True, repr=False)
class Pruning(Brief):
    """What was taken off a network, and what that did.

    Attributes:
        kept: Paths of the blocks that still have a mixer.
        removed: Paths of those that have none any more.
        cuts: What each mixer's cut alone cost, see `mrla.analysis.explanation.effects.cut_records`.
        before: ``accuracy``, ``loss``, ``parameters`` and ``images_per_second`` of the network as it was.
        after: The same of what is left, on the same images, with the changes and their intervals.
    """

    kept: tuple[str, ...]
    removed: tuple[str, ...]
    cuts: list[dict[str, Any]]
    before: dict[str, Any]
    after: dict[str, Any]

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
    max_images: int | None = 1000,
    on_progress: OnProgress | None = None,
) -> Pruning:
    """Takes off the mixers whose cut costs least, in place, and measures what that does to accuracy and speed.

    Each mixer is cut alone, on the images of the loader; those whose cut raises the loss most are kept. Several cuts
    together may cost more than each alone: `Pruning.after` is measured on what is left. Choose on other images than
    those on which you report.

    Args:
        model: A classifier with mixers, changed in place; `mrla.save` keeps it as it then is.
        loader: Batches of images (b, c, h, w) and labels (b,), the same ones in the same order each time.
        keep: How many mixers stay, or the paths of their blocks; None for those whose cut raises the loss beyond chance
            (95 % for all of them together). With none left the network is plain again, as by `mrla.detach`.
        max_images: How many of the loader's images are used; None for all.
        on_progress: Called with the passes over a batch done and those in all.

    Returns:
        What was kept and removed, with accuracy and speed before and after.

    Raises:
        ValueError: If the network has no mixers, `keep` or `max_images` is not as described, or the loader gives other
            images later.

    Example:
        >>> import mrla, timm, torch
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> model = mrla.attach(timm.create_model("resnet18", channels=(8, 8, 16, 16), num_classes=3), "base")
        >>> data = TensorDataset(torch.randn(6, 3, 32, 32), torch.arange(6) % 3)
        >>> pruned = mrla.prune(model, DataLoader(data, batch_size=3), keep=3)
        >>> len(pruned.kept), len(pruned.removed)
        (3, 5)
    """
    need("scipy")
    known = [block for chain in mixed_chains(model) for block in chain.mixers]
    _check_keep(keep, known)
    check_limit(max_images)
    cuts = possible_cuts(model, ["mixers"])
    passes = Passes(loader, max_images, len(cuts) + 2, on_progress)
    states = [nullcontext, *(one.of(model) for one in cuts)]
    whole, *found = outcomes_in(model, loader, states, images=max_images, on_pass=passes.step)
    records = cut_records(whole, found, cuts)
    kept = _chosen(keep, known, records)
    removed = tuple(block for block in known if block not in kept)
    before = copy.deepcopy(model)
    if not kept:
        detach(model)
    elif removed:
        remove_mixers(model, removed)
    left = outcomes(model, loader, images=max_images, on_pass=passes.step)
    passes.end()
    return Pruning(kept=kept, removed=removed, cuts=records, **_before_and_after(before, model, loader, whole, left))


def _before_and_after(
    before: nn.Module, after: nn.Module, loader: Batches, whole: Outcomes, left: Outcomes
) -> dict[str, dict[str, Any]]:
    images, _ = next(iter(limited(loader, None)))
    images = images.to(next(after.parameters()).device)
    rates = measure_throughput({"before": before, "after": after}, images)
    scores = {"before": whole.scores(), "after": changes(whole, left)}
    return {
        name: {
            **scores[name],
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


def _chosen(
    keep: int | Sequence[str] | None, known: Sequence[str], records: Sequence[dict[str, Any]]
) -> tuple[str, ...]:
    if keep is None:
        needed = {record["block"] for record in records if (record["loss_change"]["low"] or 0) > 0}
    elif isinstance(keep, int):
        by_cost = sorted(records, key=lambda record: -record["loss_change"]["mean"])
        needed = {record["block"] for record in by_cost[:keep]}
    else:
        needed = set(keep)
    return tuple(block for block in known if block in needed)
