"""What a network loses without one of its mixers, one head of it or one link: loss and accuracy, image by image."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from mrla.models import MixedChain, ablate, mixed_chains
from mrla.models.mixed_blocks import MIXER
from mrla.models.modes import in_eval_mode

from ..proportions import paired_interval
from ..statistics import Verdict

CutKind = Literal["mixers", "links", "heads"]
CUT_KINDS: tuple[str, ...] = get_args(CutKind)
Batches = Iterable[Any]
"""Batches of images (b, c, h, w) and labels (b,)."""
State = Callable[[], AbstractContextManager[Any]]
"""Makes a context in which a network is looked at."""
ALPHA = 0.05


@dataclass(frozen=True, kw_only=True)
class Outcomes:
    """What a network said of each image.

    Attributes:
        losses: Cross-entropy, without label smoothing.
        hits: Whether the most likely class was the right one.
        labels: The right ones.
    """

    losses: np.ndarray
    hits: np.ndarray
    labels: np.ndarray

    def scores(self) -> dict[str, float]:
        """Mean loss and accuracy."""
        return {"accuracy": float(self.hits.mean()), "loss": float(self.losses.mean())}


@dataclass(frozen=True, kw_only=True)
class Cut:
    """One thing that can be cut out of a network.

    Attributes:
        kind: Whether it is a whole mixer, a link to one block before, or a head.
        block: Path of the mixer's block.
        source: Path of the block that contributes nothing, or ``input``; of a link.
        lag: How many blocks before this one the source stands; of a link.
        head: Number of the head, from 0.
    """

    kind: CutKind
    block: str
    source: str | None = None
    lag: int | None = None
    head: int | None = None

    def of(self, model: nn.Module) -> State:
        """The state of a network in which it is cut."""
        return partial(ablate, model, self.block, lag=self.lag, head=self.head)

    @property
    def names(self) -> dict[str, Any]:
        """What it is called in a record."""
        return {name: value for name in ("block", "source", "head") if (value := getattr(self, name)) is not None}


def possible_cuts(model: nn.Module, kinds: Sequence[str] = CUT_KINDS) -> list[Cut]:
    """Everything of some kinds that can be cut out of a network.

    Args:
        model: A network with mixers.
        kinds: Of ``mixers``, ``links`` and ``heads``.

    Returns:
        The cuts, kind by kind and block by block.

    Raises:
        ValueError: If a kind is not known, or the network has no mixers.

    Example:
        >>> import mrla, timm
        >>> model = mrla.attach(timm.create_model("resnet18"), "base")
        >>> [(cut.block, cut.source) for cut in possible_cuts(model, ["links"])][0]
        ('layer1.1', 'layer1.0')
    """
    for kind in kinds:
        if kind not in CUT_KINDS:
            raise ValueError(f"cuts must be of {', '.join(CUT_KINDS)}: got {kind!r}")
    of_kind: dict[str, list[Cut]] = {kind: [] for kind in CUT_KINDS}
    for chain in mixed_chains(model):
        for block in chain.mixers:
            mixer: Any = model.get_submodule(f"{block}.{MIXER}")
            of_kind["mixers"].append(Cut(kind="mixers", block=block))
            of_kind["heads"] += [Cut(kind="heads", block=block, head=head) for head in range(mixer.num_heads)]
            for lag in range(mixer.max_lag, 0, -1):
                of_kind["links"].append(Cut(kind="links", block=block, source=_source(chain, block, lag), lag=lag))
    return [found for kind in CUT_KINDS if kind in kinds for found in of_kind[kind]]


def _source(chain: MixedChain, block: str, lag: int) -> str:
    """The mixer so many before `block`; what a shortcut brings to the first block is what came into the chain."""
    at = chain.mixers.index(block) - lag
    return chain.mixers[at] if at >= 0 else "input"


@contextmanager
def without_mixers(model: nn.Module, blocks: Sequence[str] | None = None) -> Iterator[None]:
    """The body with the mixers of some blocks cut out together; of all if none are named."""
    with ExitStack() as stack:
        for block in [block for chain in mixed_chains(model) for block in chain.mixers] if blocks is None else blocks:
            stack.enter_context(ablate(model, block))
        yield


def outcomes(
    model: nn.Module, batches: Batches, *, images: int | None = None, on_pass: Callable[[int], None] | None = None
) -> Outcomes:
    """What a classifier says of each image: `outcomes_in` its state as it is."""
    (found,) = outcomes_in(model, batches, [nullcontext], images=images, on_pass=on_pass)
    return found


def outcomes_in(
    model: nn.Module,
    batches: Batches,
    states: Sequence[State],
    *,
    images: int | None = None,
    on_pass: Callable[[int], None] | None = None,
) -> list[Outcomes]:
    """What a classifier says of each image in each of several states.

    Every batch is taken from the loader once and shown to all states in turn, so they are compared on the same images
    whatever the loader's order, and no image is read or decoded twice.

    Args:
        model: Network from images to logits; it is looked at in eval mode.
        batches: Images and labels.
        states: Each makes a context in which the network is as it is to be looked at.
        images: How many images at most; None for all.
        on_pass: Called after each state's pass over a batch with the images in it.

    Returns:
        For each state one loss, hit and label an image.

    Raises:
        ValueError: If there is no image, or the network does not give logits.
    """
    device = next(model.parameters()).device
    losses: list[list[Tensor]] = [[] for _ in states]
    hits: list[list[Tensor]] = [[] for _ in states]
    labels: list[Tensor] = []
    with in_eval_mode(model), torch.inference_mode():
        for shown, right in limited(batches, images):
            shown, right = shown.to(device), right.to(device)
            labels.append(right.cpu())
            for at, state in enumerate(states):
                with state():
                    logits = model(shown)
                if not isinstance(logits, Tensor) or logits.ndim != 2:
                    raise ValueError(
                        f"the effect is measured on classifiers, whose output is logits (b, classes): this "
                        f"{type(model).__name__} gives {_kind(logits)}; leave the cuts out"
                    )
                losses[at].append(cross_entropy(logits.float(), right, reduction="none").double().cpu())
                hits[at].append((logits.argmax(1) == right).cpu())
                if on_pass is not None:
                    on_pass(len(right))
    if not sum(map(len, labels)):
        raise ValueError("the loader must have at least one image: it has none")
    return [
        Outcomes(losses=_joined(of_losses), hits=_joined(of_hits), labels=_joined(labels))
        for of_losses, of_hits in zip(losses, hits, strict=True)
    ]


def cut_records(whole: Outcomes, found: Sequence[Outcomes], cuts: Sequence[Cut]) -> list[dict[str, Any]]:
    """What each cut costs, by itself.

    A change is that with the cut minus that without, image by image. Intervals have Bonferroni's correction for as many
    cuts as there are, so that all of the list together hold with 95 %, those of the accuracy and those of the loss.

    Args:
        whole: What the uncut network said of some images.
        found: What it said of them with each cut.
        cuts: The cuts.

    Returns:
        For each cut ``block`` (and ``source`` or ``head``) and what `changes` gives.
    """
    return [{**one.names, **changes(whole, said, comparisons=len(cuts))} for one, said in zip(cuts, found, strict=True)]


def changes(whole: Outcomes, found: Outcomes, *, comparisons: int = 1) -> dict[str, Any]:
    """Scores of a cut network, and what has changed against the whole one.

    The accuracy's interval is Tango's (`mrla.analysis.proportions.paired_interval`), since a t test would be sure of
    zero where no image changes; the loss's is that of a paired t test over the images.

    Args:
        whole: Without the cut.
        found: With it, on the same images.
        comparisons: For how many intervals together 95 % are to hold.

    Returns:
        ``accuracy`` and ``loss``; ``accuracy_change`` and ``loss_change``, each with ``mean``, ``low`` and ``high``;
        and ``shown``: of both whether they are shown to be ``better`` or ``worse`` than the whole network's, or
        ``not resolved``.

    Raises:
        ValueError: If the images are not the same.
    """
    if not np.array_equal(whole.labels, found.labels):
        raise ValueError(
            "the loader must give the same images in the same order each time: their labels differ between two passes; "
            "use shuffle=False"
        )
    accuracy, loss = (
        _change_of_hits(whole.hits, found.hits, comparisons),
        _interval(found.losses - whole.losses, comparisons),
    )
    return {
        **found.scores(),
        "accuracy_change": accuracy,
        "loss_change": loss,
        "shown": {
            "accuracy": _shown(accuracy, higher_is_better=True),
            "loss": _shown(loss, higher_is_better=False),
        },
    }


def check_limit(images: int | None) -> None:
    """Refuses a number of images that is none at all."""
    if images is not None and images < 1:
        raise ValueError(f"max_images must be at least 1, or None for all: got {images}")


def limited(batches: Batches, images: int | None) -> Iterator[tuple[Any, Any]]:
    """Batches up to so many images, the last one cut short if need be."""
    left = images
    for batch in batches:
        shown, right = batch[0], batch[1]
        if left is None:
            yield shown, right
            continue
        if left <= 0:
            return
        yield shown[:left], right[:left]
        left -= len(right)


def _change_of_hits(whole: np.ndarray, found: np.ndarray, comparisons: int) -> dict[str, float]:
    gained, lost = int((found & ~whole).sum()), int((whole & ~found).sum())
    low, high = paired_interval(gained, lost, len(whole), alpha=ALPHA / comparisons)
    return {"mean": (gained - lost) / len(whole), "low": low, "high": high}


def _shown(change: dict[str, Any], *, higher_is_better: bool) -> Verdict:
    """Which side of zero an interval lies on; one of no width says nothing, for there is no spread to judge by."""
    low, high = change["low"], change["high"]
    if low is None or low == high or low <= 0 <= high:
        return "not resolved"
    return "better" if (low > 0) == higher_is_better else "worse"


def _interval(values: np.ndarray, comparisons: int) -> dict[str, float | None]:
    """Mean and interval of a t test; no interval for one image."""
    from scipy.stats import t

    mean = float(values.mean())
    if len(values) < 2:
        return {"mean": mean, "low": None, "high": None}
    error = float(values.std(ddof=1)) / len(values) ** 0.5
    half = float(t.ppf(1 - ALPHA / comparisons / 2, len(values) - 1)) * error
    return {"mean": mean, "low": mean - half, "high": mean + half}


def _joined(parts: list[Tensor]) -> np.ndarray:
    return torch.cat(parts).numpy() if parts else np.zeros(0)


def _kind(value: Any) -> str:
    return f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
