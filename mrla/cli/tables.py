"""Tables of numbers for any width: no number is broken, headings wrap, and columns that do not fit go below."""

import textwrap
from collections.abc import Sequence

from rich.cells import cell_len
from rich.table import Table

_EDGES, _BETWEEN = 1, 3  # of a table: the line at its left, and each column's margins with the line behind it


def number_tables(
    title: str | None,
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    width: int,
    keys: int = 1,
    section: int | None = None,
) -> list[Table]:
    """A table, or several that stand below one another, each with the first columns.

    Args:
        title: Stands above the first.
        headings: One for each column; line breaks in them stay.
        rows: As many cells each.
        width: Of the terminal.
        keys: How many of the first columns say what a row is; the last of them is text, all other columns numbers.
        section: After how many rows a line is drawn.

    Returns:
        The tables.

    Example:
        >>> rows = [["plain", "98.13 ± 0.34", "709,674"]]
        >>> [len(table.columns) for table in number_tables(None, ["arm", "val acc. (%)", "params"], rows, width=30)]
        [2, 2]
    """
    cells = [max([0, *(cell_len(row[at]) for row in rows)]) for at in range(len(headings))]
    if _width(_columns(headings, cells)) > width:
        headings = [_wrapped(text, one) for text, one in zip(headings, cells, strict=True)]
    narrow = _columns(headings, cells)
    first = list(range(keys))
    groups: list[list[int]] = [[]]
    for at in range(keys, len(headings)):
        if groups[-1] and _width([narrow[one] for one in (*first, *groups[-1], at)]) > width:
            groups.append([])
        groups[-1].append(at)
    tables = []
    for number, group in enumerate(groups):
        table = Table(title=None if number else title)
        for at in (*first, *group):
            table.add_column(headings[at], justify="left" if at == keys - 1 else "right", no_wrap=True)
        for index, row in enumerate(rows):
            ends = section is not None and (index + 1) % section == 0
            table.add_row(*(row[at] for at in (*first, *group)), end_section=ends)
        tables.append(table)
    return tables


def _columns(headings: Sequence[str], cells: Sequence[int]) -> list[int]:
    """The width of each column."""
    return [max(cells[at], *map(cell_len, text.split("\n"))) for at, text in enumerate(headings)]


def _width(columns: Sequence[int]) -> int:
    return _EDGES + sum(one + _BETWEEN for one in columns)


def _wrapped(heading: str, cells: int) -> str:
    """The heading in lines no longer than its longest word or the column's cells."""
    longest = max([cells, 1, *(cell_len(word) for word in heading.split())])
    lines = heading.split("\n")
    return "\n".join(part for line in lines for part in textwrap.wrap(line, longest, break_long_words=False) or [""])


def counted(number: int, what: str) -> str:
    """A number of something.

    Example:
        >>> counted(1, "image"), counted(2, "image")
        ('1 image', '2 images')
    """
    return f"{number} {what}{'' if number == 1 else 's'}"
