"""What an explanation says, in a few sentences."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..statistics import Verdict
from .margins import Judgement, change_of_accuracy, change_of_loss, count_of_images, points, told

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
        ['In layer1 the others attend to a most: 0.7 in the mean over later blocks.']
    """
    sentences = _of_cuts(content["cuts"]) if content["cuts"] else []
    sentences += _of_attention(content["chains"])
    if content["terms"]:
        sentences.append(_of_terms(content["terms"]))
    return sentences or [f"Blocks take nothing from other blocks in these {content['images']['count']} images."]


def _of_cuts(cuts: Mapping[str, Any]) -> list[str]:
    everything = cuts["all"]
    right = 100 * (everything["accuracy"] - everything["accuracy_change"]["mean"])
    sentences = [
        f"{_headline(everything['shown'])}: with all of them cut the accuracy of {right:.2f} % changes by "
        f"{change_of_accuracy(everything['accuracy_change'])}, the loss by "
        f"{change_of_loss(everything['loss_change'])}, on {count_of_images(cuts['images'])}. It was trained with them; "
        f"what training with them gains, mrla compare measures."
    ]
    for kind, word in (("mixers", "mixer"), ("links", "link"), ("heads", "head")):
        if kind in cuts:
            sentences.append(_of_kind(cuts[kind], word))
    if "least" in cuts:
        least = Judgement(**cuts["least"])
        sentences.append(f"Without the mixer of {least.removed[0]}, whose cut costs least, the network {told(least)}.")
    return sentences


def _headline(shown: Mapping[str, Verdict]) -> str:
    if shown["accuracy"] == "worse":
        return "This network relies on its mixers"
    if shown["accuracy"] == "better":
        return "This network does better without its mixers"
    if shown["loss"] == "not resolved":
        return "That the mixers do anything is not resolved"
    direction = "lower" if shown["loss"] == "worse" else "raise"
    return f"The mixers {direction} this network's loss; that they change its accuracy is not resolved"


def _of_kind(records: Sequence[Mapping[str, Any]], word: str) -> str:
    """What is shown of the cuts of one kind, and of how many nothing is."""
    if not records:
        return f"There is no {word} to cut."
    found = []
    for score, said in (
        ("accuracy", {"worse": "lower the accuracy", "better": "raise the accuracy"}),
        ("loss", {"worse": "raise the loss", "better": "lower the loss"}),
    ):
        for verdict, effect in said.items():
            those = [record for record in records if record["shown"][score] == verdict]
            those.sort(key=lambda record: -abs(record[f"{score}_change"]["mean"]))
            if those:
                found.append(
                    f"{len(those)} {'is' if len(those) == 1 else 'are'} shown to {effect}: {_list(those, score)}"
                )
    silent = sum(set(record["shown"].values()) == {"not resolved"} for record in records)
    if silent == len(records):
        return (
            f"Of {len(records)} {word}{'s' if len(records) > 1 else ''}, cut alone, none is shown to change anything, "
            f"nor that it changes nothing."
        )
    if silent:
        found.append(f"of {silent} neither an effect is shown nor that there is none")
    return f"Of {len(records)} {word}{'s' if len(records) > 1 else ''}, cut alone, {'; '.join(found)}."


def _list(records: Sequence[Mapping[str, Any]], score: str) -> str:
    unit = (lambda change: f"{points(change)} points") if score == "accuracy" else (lambda change: f"{change:+.3g}")
    named = [f"{_name(record)} ({unit(record[f'{score}_change']['mean'])})" for record in records[:_NAMED]]
    more = len(records) - len(named)
    return ", ".join(named) + (f" and {more} more" if more else "")


def _name(record: Mapping[str, Any]) -> str:
    if "source" in record:
        return f"{record['block']} attending to {record['source']}"
    return f"head {record['head']} of {record['block']}" if "head" in record else record["block"]


def _of_attention(chains: Sequence[Mapping[str, Any]]) -> list[str]:
    """Of each chain the block that others attend to most, where there is one."""
    found = []
    for chain in chains:
        mean = np.array(chain["mean"], dtype=float)
        # Column 0 is what came in; block at row r is column r + 1.
        attended = [
            (float(column[np.isfinite(column)].mean()), chain["blocks"][at])
            for at in range(len(chain["blocks"]) - 1)
            if np.isfinite(column := mean[at + 1 :, at + 1]).any()
        ]
        if attended:
            strength, block = max(attended)
            found.append((chain["name"], block, strength))
    if not found:
        return []
    if len(found) == 1:
        ((name, block, strength),) = found
        return [f"In {name} the others attend to {block} most: {strength:.3g} in the mean over later blocks."]
    listed = ", ".join(f"{block} ({strength:.3g})" for _, block, strength in found)
    return [f"The block of each stage that the others attend to most, in the mean over later blocks: {listed}."]


def _of_terms(terms: Sequence[Mapping[str, Any]]) -> str:
    ratios = [record["carried"] / record["attention"] for record in terms if record["attention"] > 0]
    if not ratios:
        return "The attention term is zero in every block."
    return (
        f"The lambda term is {min(ratios):.2g} to {max(ratios):.2g} times as long as the attention term, by block "
        f"(median {np.median(ratios):.2g})."
    )
