"""What the commands print: tables, verdicts, and bars while they work."""

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def print_comparison(content: Mapping[str, Any], folder: Path) -> None:
    """Prints what ``compare.json`` holds: the table, the differences and the verdict.

    Args:
        content: The content of ``compare.json``.
        folder: Where it is.
    """
    from mrla.analysis.report.tables import comparison_table

    console = console_of_width()
    recipe = content["recipe"]
    table = Table(
        title=f"{recipe['recipe']}: {recipe['model']}, {len(content['seeds'])} seeds, {recipe['epochs']} epochs"
    )
    table.add_column("arm", no_wrap=True)
    headings, rows = comparison_table(content)
    for heading in headings:
        table.add_column(heading, justify="right", overflow="fold")
    for arm, cells in rows.items():
        table.add_row(arm, *(cell.text for cell in cells))
    console.print(table)
    for arm, difference in content["differences"].items():
        console.print(f"[bold]{arm} against {difference['baseline']}:[/bold] {difference['reason']}", highlight=False)
    for note in content["notes"]:
        console.print(note, highlight=False, markup=False)
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
    shown = Table(title=title(content))
    for heading in headings:
        shown.add_column(heading, justify="left" if heading == "arm" else "right", no_wrap=True)
    sweep = content["configuration"]["sweep"] is not None
    arms = len(content["configuration"]["arms"])
    for index, line in enumerate(lines):
        shown.add_row(*line, end_section=sweep and (index + 1) % arms == 0)
    console.print(shown)
    for note in content["notes"]:
        console.print(note, highlight=False, soft_wrap=True, markup=False)
    console.print(f"\n{content['note']}", style="dim")
    console.print(f"{content['seconds']:.0f} s. {folder}/bench.json, bench.png, bench.svg", highlight=False)


def print_pruning(pruned: Any, folder: Path | None) -> None:
    """Prints what cutting each mixer cost, which of them stay and why, and the network before and after.

    Args:
        pruned: A `mrla.analysis.Pruning`.
        folder: Where the pruned network is; None where all mixers stay and nothing was written.
    """
    from mrla.analysis.explanation.margins import removal_order

    console = console_of_width()
    cuts = Table(
        title=f"{len(pruned.kept)} of {len(pruned.cuts)} mixers stay",
        caption="Each cut alone; the intervals of a column hold together with 95 %.",
    )
    cuts.add_column("mixer")
    for heading in ("accuracy (points)", "interval", "loss", "interval"):
        cuts.add_column(heading, justify="right")
    cuts.add_column("")
    records = {record["block"]: record for record in pruned.cuts}
    for block in reversed(removal_order(pruned.cuts)):
        accuracy, loss = records[block]["accuracy_change"], records[block]["loss_change"]
        cuts.add_row(
            *(
                block,
                f"{100 * accuracy['mean']:+.2f}",
                f"{100 * accuracy['low']:+.2f} to {100 * accuracy['high']:+.2f}",
            ),
            *(f"{loss['mean']:+.4f}", "none" if loss["low"] is None else f"{loss['low']:+.4f} to {loss['high']:+.4f}"),
            "stays" if block in pruned.kept else "taken off",
        )
    console.print(cuts)
    console.print(_before_and_after(pruned))
    console.print(pruned.verdict, style="bold", highlight=False, markup=False)
    console.print(f"\n{pruned.note}", style="dim", highlight=False, markup=False)
    written = "Nothing is written." if folder is None else f"{folder}/model.safetensors, config.json, prune.json"
    console.print(written, highlight=False, markup=False)


def _before_and_after(pruned: Any) -> Table:
    from mrla.analysis.report.tables import speed

    table = Table()
    table.add_column("")
    for heading in ("accuracy (%), 95 % interval", "loss", "params", "images/s (10 to 90 %)"):
        table.add_column(heading, justify="right")
    shown = {"before": pruned.before, **({"after": pruned.after} if pruned.removed else {})}
    for name, scores in shown.items():
        low, high = (100 * scores["accuracy_interval"][end] for end in ("low", "high"))
        accuracy, counted = f"{100 * scores['accuracy']:.2f} ({low:.2f} to {high:.2f})", f"{scores['parameters']:,}"
        table.add_row(name, accuracy, f"{scores['loss']:.4f}", counted, speed(scores["images_per_second"]))
    return table


class progress_bar:
    """A bar over all epochs of all runs, or all rounds, with the time that is left."""

    def __init__(self, shown: bool, text: str = "epochs of all runs"):
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = TextColumn(text), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        self.bar = Progress(*columns, console=Console(stderr=True), disable=not shown, transient=True)

    def __enter__(self) -> Callable[[int, int], None]:
        self.bar.start()
        task = self.bar.add_task("", total=None)
        return lambda done, total: self.bar.update(task, completed=done, total=total)

    def __exit__(self, *_: object) -> None:
        self.bar.stop()


def console_of_width() -> Console:
    """A console as wide as the terminal, or as COLUMNS says."""
    # A pipe or a log has no width of its own; a table squeezed into 80 columns loses its numbers.
    return Console(width=None if sys.stdout.isatty() else int(os.environ.get("COLUMNS", "140")))
