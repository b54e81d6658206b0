"""A comparison's numbers as cells for a reader: what the report, and a terminal, show of them."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

COLUMNS = {
    "train_accuracy": "train acc. (%)",
    "val_accuracy": "val acc. (%), last epoch",
    "best_val_accuracy": "val acc. (%), best epoch",
    "val_box_ap": "box AP (%), last epoch",
    "best_val_box_ap": "box AP (%), best epoch",
    "val_box_ap50": "box AP50 (%)",
    "val_mask_ap": "mask AP (%)",
}
"""The scores that the table shows where a comparison has them, and their headings."""


class Cell(NamedTuple):
    """One number of a table.

    Attributes:
        key: Its name in the JSON.
        value: The number as it is there, or None.
        text: What a reader sees.
    """

    key: str
    value: float | int | None
    text: str


def comparison_table(content: Mapping[str, Any]) -> tuple[list[str], dict[str, list[Cell]]]:
    """The headings and each arm's cells: scores over seeds, parameters, multiply-accumulates, speed.

    Args:
        content: The content of ``compare.json``.

    Returns:
        The headings without that of the arms' names, and as many cells for each arm.

    Example:
        >>> spread = {"mean": 0.9822, "sd": 0.0035, "values": []}
        >>> rate = {"median": 1234.5, "p10": 1200.0, "p90": 1300.0}
        >>> entry = {"val_accuracy": spread, "parameters": {"trainable": 9}, "macs": None, "images_per_second": rate}
        >>> headings, rows = comparison_table({"arms": ["plain"], "table": {"plain": entry}})
        >>> headings
        ['val acc. (%), last epoch', 'params', 'MACs (M)', 'images/s (10 to 90 %)']
        >>> [cell.text for cell in rows["plain"]]
        ['98.22 ± 0.35', '9', '-', '1,234 (1,200 to 1,300)']
    """
    table = content["table"]
    scores = [name for name in COLUMNS if name in table[content["arms"][0]]]
    rows = {}
    for arm in content["arms"]:
        entry = table[arm]
        rate, macs, parameters = entry["images_per_second"], entry["macs"], entry["parameters"]["trainable"]
        rows[arm] = [
            *(Cell(name, entry[name]["mean"], percent(entry[name])) for name in scores),
            Cell("parameters", parameters, f"{parameters:,}"),
            Cell("macs", macs, "-" if macs is None else f"{macs / 1e6:.2f}"),
            Cell("images_per_second", rate["median"], speed(rate)),
        ]
    return [*(COLUMNS[name] for name in scores), "params", "MACs (M)", "images/s (10 to 90 %)"], rows


def speed(rate: Mapping[str, float]) -> str:
    """Images a second, their median and in brackets p10 and p90, such as ``1,234 (1,200 to 1,300)``."""
    return f"{rate['median']:,.0f} ({rate['p10']:,.0f} to {rate['p90']:,.0f})"


def percent(spread: Mapping[str, Any]) -> str:
    """A mean and its standard deviation over seeds, in percent.

    Args:
        spread: ``mean`` and ``sd`` as fractions; ``sd`` is None for one seed.

    Returns:
        Such as ``98.22 ± 0.35``.
    """
    sd = "" if spread["sd"] is None else f" ± {100 * spread['sd']:.2f}"
    return f"{100 * spread['mean']:.2f}{sd}"


def told(difference: Mapping[str, Any]) -> str:
    """A difference in words, to stand under a heading that names its verdict.

    Args:
        difference: One of ``differences`` of ``compare.json``.

    Returns:
        The reason as a sentence, without the verdict before its colon.

    Example:
        >>> arms = {"arm": "light", "baseline": "plain"}
        >>> told({**arms, "verdict": "not resolved", "reason": "not resolved: the difference may be chance"})
        'The difference may be chance.'
        >>> told({**arms, "verdict": "better", "reason": "light is better than plain by 2 points"})
        'light is better than plain by 2 points.'
    """
    reason = difference["reason"]
    rest = reason.removeprefix(f"{difference['verdict']}: ")
    # A sentence may begin with an arm's name, which is written as it is.
    starts_with_name = rest.startswith((difference["arm"], difference["baseline"]))
    return f"{rest if starts_with_name else rest[:1].upper() + rest[1:]}."


def flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings as rows, in their order.

    Args:
        settings: Containers and plain values.
        prefix: What goes before every name.

    Yields:
        A dotted name and the value as text; None is ``none``.

    Example:
        >>> list(flat({"optim": {"lr": 0.1, "milestones": [3, 6]}, "detector": None}))
        [('optim.lr', '0.1'), ('optim.milestones', '3, 6'), ('detector', 'none')]
    """
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", _text(value)


def _text(value: Any) -> str:
    if value is None or (isinstance(value, (list, tuple, Mapping)) and not value):
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(_text(entry) for entry in value)
    return str(value)
