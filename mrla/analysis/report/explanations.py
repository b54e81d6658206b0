"""What an explanation says, put in order for a page: maps, terms, cuts."""

from collections.abc import Mapping, Sequence
from itertools import chain as joined
from typing import Any

from .intervals import track

Grid = Sequence[Sequence[float | None]]
"""Numbers by block and source, None where a block takes nothing from a source."""
CUTS = {
    "all": ("Without all mixers", "All mixers are left out at once."),
    "mixers": ("Without a block's mixer", "One mixer at a time is left out."),
    "links": ("Without one link", "One block no longer attends to one source."),
    "heads": ("Without one head", "One head of one mixer is left out."),
}
"""The kinds of cuts: heading, and what was done."""
SHOWN = 12
"""Rows of a table of cuts that are seen at once; the others can be unfolded."""


def layer_attention_map(chain: Mapping[str, Any], pictures: Mapping[str, Grid]) -> dict[str, Any]:
    """A chain's map as a table with colours, and what the page can show in its place.

    The colour of a cell is the size of its number against the largest one of the chain, over all heads and pictures,
    so that those may be compared.

    Args:
        chain: One of ``chains`` of ``explain.json``.
        pictures: The map of single images, by their names.

    Returns:
        ``name``, ``quantity``, ``heads``, ``head_dim``, ``sources``, ``scale`` (the largest size), ``digits`` (after
        the point), ``signed``, ``rows`` (each with ``block`` and ``cells``: ``source``, ``value``, ``sd``) and
        ``others``: a ``label`` and a ``grid`` for each head and picture.
    """
    # The only head is the mean over heads.
    heads = {f"head {head}": grid for head, grid in enumerate(chain["by_head"])} if chain["heads"] > 1 else {}
    others = [{"label": label, "grid": grid} for label, grid in (*heads.items(), *pictures.items())]
    grids = [chain["mean"], *(other["grid"] for other in others)]
    values = [value for value in joined.from_iterable(joined.from_iterable(grids)) if value is not None]
    scale = max((abs(value) for value in values), default=0.0)
    rows = [
        {
            "block": block,
            "cells": [
                {"source": source, "value": value, "sd": sd}
                for source, value, sd in zip(chain["sources"], means, sds, strict=True)
            ],
        }
        for block, means, sds in zip(chain["blocks"], chain["mean"], chain["sd"], strict=True)
    ]
    taken = {name: chain[name] for name in ("name", "quantity", "heads", "head_dim", "sources")}
    digits = 2 if scale >= 0.1 else 3 if scale >= 0.01 else 4
    signed = min(values, default=0.0) < 0
    return {**taken, "scale": scale, "digits": digits, "signed": signed, "rows": rows, "others": others}


def term_rows(terms: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The share of attention in each block, with its bar.

    Args:
        terms: ``terms`` of ``explain.json``.

    Returns:
        The same, each with ``start`` and ``width`` of its spread in percent, or None.
    """
    rows = []
    for term in terms:
        start = width = None
        if term["share_sd"] is not None:
            start = max(0.0, term["share"] - term["share_sd"])
            width = min(1.0, term["share"] + term["share_sd"]) - start
        rows.append(
            {
                **term,
                "start": None if start is None else round(100 * start, 2),
                "width": None if width is None else round(100 * width, 2),
            }
        )
    return rows


def cut_tables(cuts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The kinds of cuts that were made, each as rows in the order of what they cost, with a scale.

    Args:
        cuts: ``cuts`` of ``explain.json``.

    Returns:
        For each kind that has cuts ``kind``, ``heading``, ``text``, ``scale`` (a `Track` of the change of accuracy, in
        points) and ``rows`` (each a cut with ``name``, ``mark`` and ``apart``: whether a change of the accuracy is
        shown).
    """
    tables = []
    for kind, (heading, text) in CUTS.items():
        found = cuts.get(kind) or ()
        made = sorted([found] if isinstance(found, Mapping) else found, key=_benefit)
        if not made:
            continue
        scale = track([cut["accuracy_change"] for cut in made], unit=0.01)
        rows = [
            {**cut, "name": _name(cut), "mark": mark, "apart": cut["shown"]["accuracy"] != "not resolved"}
            for cut, mark in zip(made, scale.marks, strict=True)
        ]
        tables.append({"kind": kind, "heading": heading, "text": text, "scale": scale, "rows": rows})
    return tables


def _name(cut: Mapping[str, Any]) -> str:
    if cut.get("source") is not None:
        return f"{cut['block']} attending to {cut['source']}"
    return f"{cut['block']}, head {cut['head']}" if cut.get("head") is not None else cut["block"]


def _benefit(cut: Mapping[str, Any]) -> tuple[float, float]:
    """Of the cut, not of what was cut: below zero where the network misses it."""
    return cut["accuracy_change"]["mean"], -cut["loss_change"]["mean"]
