"""What the commands print: tables, verdicts, and bars while they work."""

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from mrla.train.progress_lines import CountedLines

from .tables import number_tables


def print_comparison(content: Mapping[str, Any], folder: Path) -> None:
    """Prints what ``compare.json`` holds: the table, the differences and the verdict.

    Args:
        content: The content of ``compare.json``.
        folder: Where it is.
    """
    from mrla.analysis.report.tables import comparison_table

    console = console_of_width()
    recipe = content["recipe"]
    title = f"{recipe['recipe']}: {recipe['model']}, {len(content['seeds'])} seeds, {recipe['epochs']} epochs"
    headings, rows = comparison_table(content)
    lines = [[arm, *(cell.text for cell in cells)] for arm, cells in rows.items()]
    for table in number_tables(title, ["arm", *headings], lines, width=console.width):
        console.print(table)
    for arm, difference in content["differences"].items():
        console.print(f"[bold]{arm} against {difference['baseline']}:[/bold] {difference['reason']}", highlight=False)
    console.print(f"\n{content['note']}", style="dim")
    console.print(
        f"{content['seconds']:.0f} s. {folder}/report.html, compare.json, table.csv, history.csv, curves.png",
        highlight=False,
    )


def print_benchmark(content: Mapping[str, Any], folder: Path) -> None:
    """Prints what ``bench.json`` holds as one table.

    Args:
        content: The content of ``bench.json``.
        folder: Where it is.
    """
    from mrla.analysis.benchmark_tables import table, title

    headings, lines = table(content)
    console = console_of_width()
    sweep = content["configuration"]["sweep"] is not None
    of_a_value = {"keys": 2, "section": len(content["configuration"]["arms"])} if sweep else {}
    for shown in number_tables(title(content), headings, lines, width=console.width, **of_a_value):
        console.print(shown)
    for note in content["notes"]:
        console.print(note, highlight=False, soft_wrap=True, markup=False)
    console.print(f"\n{content['note']}", style="dim")
    console.print(f"{content['seconds']:.0f} s. {folder}/bench.json, bench.png, bench.svg", highlight=False)


def print_pruning(pruned: Any, folder: Path) -> None:
    """Prints what cutting each mixer cost, which of them stay, and the network before and after.

    Args:
        pruned: A `mrla.analysis.Pruning`.
        folder: Where the pruned network is.
    """
    from mrla.analysis.report.tables import speed

    console = console_of_width()
    cuts: list[list[str]] = []
    for record in sorted(pruned.cuts, key=lambda one: -one["loss_change"]["mean"]):
        loss, accuracy = record["loss_change"], record["accuracy_change"]
        between = "none" if loss["low"] is None else f"{loss['low']:+.4f} to {loss['high']:+.4f}"
        stays = "stays" if record["block"] in pruned.kept else "taken off"
        cuts.append([record["block"], f"{loss['mean']:+.4f}", between, f"{100 * accuracy['mean']:+.2f}", stays])
    title = f"{len(pruned.kept)} of {len(pruned.cuts)} mixers stay"
    headings = ["mixer", "loss when it is cut", "interval", "accuracy (points)", ""]
    for table in number_tables(title, headings, cuts, width=console.width):
        console.print(table)
    lines: list[list[str]] = []
    for name, scores in (("before", pruned.before), ("after", pruned.after)):
        accuracy, counted = f"{100 * scores['accuracy']:.2f}", f"{scores['parameters']:,}"
        lines.append([name, accuracy, f"{scores['loss']:.4f}", counted, speed(scores["images_per_second"])])
    headings = ["", "accuracy (%)", "loss", "params", "images/s (10 to 90 %)"]
    for table in number_tables(None, headings, lines, width=console.width):
        console.print(table)
    console.print(
        "Chosen by these images, so the scores flatter: mrla eval on others says what was lost. "
        f"{folder}/model.safetensors, config.json, prune.json",
        highlight=False,
        markup=False,
    )


class progress_bar:
    """A bar over all epochs of all runs, or all rounds, with the time that is left; lines where there is no terminal.

    Args:
        shown: Whether either is shown.
        text: What is counted.
    """

    def __init__(self, shown: bool, text: str = "epochs of all runs"):
        self.lines = CountedLines(text) if shown and not sys.stderr.isatty() else None
        shown = shown and self.lines is None
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = TextColumn(text), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        self.bar = Progress(*columns, console=Console(stderr=True), disable=not shown, transient=True)

    def __enter__(self) -> Callable[[int, int], None]:
        if self.lines is not None:
            return self.lines.say
        self.bar.start()
        task = self.bar.add_task("", total=None)
        return lambda done, total: self.bar.update(task, completed=done, total=total)

    def __exit__(self, *_: object) -> None:
        self.bar.stop()


def console_of_width() -> Console:
    """A console as wide as the terminal, or as COLUMNS says."""
    # A pipe or a log has no width of its own; a table squeezed into 80 columns loses its numbers.
    return Console(width=None if sys.stdout.isatty() else int(os.environ.get("COLUMNS", "140")))
