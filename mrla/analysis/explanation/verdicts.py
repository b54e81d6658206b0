"""What an explanation says, in a few sentences."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

_NAMED = 4
"""So many names are listed; of more it is said how many there are."""


def verdict_of(content: Mapping[str, Any]) -> list[str]:
    """The findings of an explanation as sentences, the most important one first.

    Args:
        content: What ``explain.json`` holds, but for this.

    Returns:
        The sentences; at least one.

    Example:
        >>> chain = {"blocks": ["a", "b"], "sources": ["input", "a", "b"], "mean": [[None, 1, None], [None, 0.7, 0.3]],
        ...          "name": "layer1", "quantity": "weight of attention", "mixers": ["a", "b"]}
        >>> verdict_of({"cuts": None, "terms": None, "chains": [chain], "images": {"count": 2}})
        ['In layer1 the block that the others hear most is a: 0.7 in the mean over those behind it.']
    """
    sentences = _of_cuts(content["cuts"]) if content["cuts"] else []
    sentences += _of_retrieval(content["chains"])
    if content["terms"]:
        sentences.append(_of_terms(content["terms"]))
    return sentences or [f"Nothing is heard from other blocks in these {content['images']['count']} images."]


def _of_cuts(cuts: Mapping[str, Any]) -> list[str]:
    everything, images = cuts["all"], cuts["images"]
    change, points = everything["loss_change"], 100 * everything["accuracy_change"]["mean"]
    right = 100 * (everything["accuracy"] - everything["accuracy_change"]["mean"])
    interval = "" if change["low"] is None else f" (95 % interval {change['low']:+.3g} to {change['high']:+.3g})"
    if change["low"] is not None and change["low"] > 0:
        headline = "This network relies on its mixers"
    elif change["low"] is not None and change["high"] < 0:
        headline = "This network does better without its mixers"
    else:
        headline = "That the mixers do anything is not resolved"
    sentences = [
        f"{headline}: with all of them cut {points:+.2f} points of {right:.2f} % accuracy and {change['mean']:+.3g} of "
        f"loss{interval} on {images} images. It was trained with them; what training with them gains, mrla compare "
        f"measures."
    ]
    for kind, word in (("mixers", "mixer"), ("links", "link"), ("heads", "head")):
        if kind in cuts:
            sentences.append(_of_kind(cuts[kind], word))
    return sentences


def _of_kind(records: Sequence[Mapping[str, Any]], word: str) -> str:
    if not records:
        return f"There is no {word} to cut."
    known = [record for record in records if record["loss_change"]["low"] is not None]
    needed = sorted(
        (record for record in known if record["loss_change"]["low"] > 0),
        key=lambda record: -record["loss_change"]["mean"],
    )
    harmful = [record for record in known if record["loss_change"]["high"] < 0]
    all_of = f"Of {len(records)} {word}{'s' if len(records) > 1 else ''}"
    if not needed:
        said = f"{all_of}, none is shown to be needed when cut alone"
    else:
        raises = f"{len(needed)} raise{'s' if len(needed) == 1 else ''} the loss beyond chance when cut alone"
        said = f"{all_of}, {raises}: {_list(needed)}"
    if harmful:
        said += f"; without {_list(harmful)} the loss is lower"
    return f"{said}."


def _list(records: Sequence[Mapping[str, Any]]) -> str:
    named = [f"{_name(record)} ({record['loss_change']['mean']:+.3g})" for record in records[:_NAMED]]
    more = len(records) - len(named)
    return ", ".join(named) + (f" and {more} more" if more else "")


def _name(record: Mapping[str, Any]) -> str:
    if "source" in record:
        return f"{record['block']} hearing {record['source']}"
    return f"head {record['head']} of {record['block']}" if "head" in record else record["block"]


def _of_retrieval(chains: Sequence[Mapping[str, Any]]) -> list[str]:
    """Of each chain the block that others hear most, where there is one."""
    found = []
    for chain in chains:
        mean = np.array(chain["mean"], dtype=float)
        # Column 0 is what came in; block at row r is column r + 1.
        heard = [
            (float(column[np.isfinite(column)].mean()), chain["blocks"][at])
            for at in range(len(chain["blocks"]) - 1)
            if np.isfinite(column := mean[at + 1 :, at + 1]).any()
        ]
        if heard:
            strength, block = max(heard)
            found.append((chain["name"], block, strength))
    if not found:
        return []
    if len(found) == 1:
        ((name, block, strength),) = found
        return [
            f"In {name} the block that the others hear most is {block}: {strength:.3g} in the mean over those behind "
            f"it."
        ]
    listed = ", ".join(f"{block} ({strength:.3g})" for _, block, strength in found)
    return [f"The block of each stage that the others hear most, in the mean over those behind it: {listed}."]


def _of_terms(terms: Sequence[Mapping[str, Any]]) -> str:
    ratios = [record["carried"] / record["attention"] for record in terms if record["attention"] > 0]
    if not ratios:
        return "The attention term is zero in every block."
    return (
        f"The lambda term is {min(ratios):.2g} to {max(ratios):.2g} times as long as the attention term, by block "
        f"(median {np.median(ratios):.2g})."
    )
