"""Tables at every width: no number is broken and nothing is lost."""

import io
import re

import pytest
from rich.console import Console

from mrla.cli import main
from mrla.cli.tables import number_tables

HEADINGS = ["arm", "train acc. (%)", "val acc. (%), last epoch", "val acc. (%), best epoch", "params", "MACs (M)"]
HEADINGS += ["images/s (10 to 90 %)"]
ROWS = [
    ["plain", "100.00 ± 0.00", "98.13 ± 0.34", "98.49 ± 0.43", "709,674", "2.71", "20,348 (19,986 to 20,558)"],
    ["light", "100.00 ± 0.00", "98.22 ± 0.35", "98.49 ± 0.37", "715,490", "2.75", "13,948 (13,745 to 14,082)"],
]


def printed(tables, width: int) -> str:
    file = io.StringIO()
    for table in tables:
        Console(file=file, width=width).print(table)
    return file.getvalue()


@pytest.mark.parametrize("width", [40, 60, 80, 101, 140])
def test_every_cell_is_whole_and_in_the_width(width):
    tables = number_tables("digits", HEADINGS, ROWS, width=width)
    text = printed(tables, width)
    assert max(map(len, text.splitlines())) <= width
    for row in ROWS:
        for cell in row:
            assert cell in text
    words = {word for heading in HEADINGS for word in heading.split()}
    assert words <= set(re.findall(r"[^\s┃│]+", text))
    assert all(table.columns[0].header == "arm" for table in tables)


def test_a_wide_table_is_one_and_a_narrow_one_wraps_before_it_is_split():
    assert len(number_tables("digits", HEADINGS, ROWS, width=140)) == 1
    assert len(number_tables("digits", HEADINGS, ROWS, width=100)) == 1
    assert [len(table.columns) for table in number_tables("digits", HEADINGS, ROWS, width=80)] == [6, 2]


def test_sections_and_keys():
    tables = number_tables(
        None, ["batch", "arm", "a b c d e f", "g"], [["1", "x", "1", "2"]] * 4, width=16, keys=2, section=2
    )
    assert [[column.header for column in table.columns] for table in tables] == [
        ["batch", "arm", "a\nb\nc\nd\ne\nf"],
        ["batch", "arm", "g"],
    ]
    assert [row.end_section for row in tables[0].rows] == [False, True, False, True]


def test_the_list_of_networks_in_80_columns(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["models"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    assert "87,467,336 │ 17.673" in text
    assert text.endswith("Left out in 80 columns: with BN statistics, image.\n")
