"""What the commands print: tables, verdicts, and bars while they work."""

import errno
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text


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
        heading = f"{arm} against {difference['baseline']}:", "bold"
        console.print(Text.assemble(heading, f" {difference['reason']}"))
    for note in content["notes"]:
        console.print(note)
    console.print(f"\n{content['note']}", style="dim")
    console.print(
        f"{content['seconds']:.0f} s. {folder}/report.html, compare.json, table.csv, history.csv, curves.png",
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
        console.print(note, soft_wrap=True)
    console.print(f"\n{content['note']}", style="dim")
    console.print(f"{content['seconds']:.0f} s. {folder}/bench.json, bench.png, bench.svg")


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
    console.print(pruned.verdict, style="bold")
    console.print(f"\n{pruned.note}", style="dim")
    written = "Nothing is written." if folder is None else f"{folder}/model.safetensors, config.json, prune.json"
    console.print(written)


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
    """A console as wide as the terminal, or as COLUMNS says; text is shown as it is, a folder may be ``[bold]``."""
    # A pipe or a log has no width of its own; a table squeezed into 80 columns loses its numbers.
    width = shutil.get_terminal_size((140, 25)).columns  # a COLUMNS that is no number counts as none
    return _Console(width=width, height=25, markup=False, emoji=False, highlight=False)


class NotPrintedError(OSError):
    """Standard output takes nothing more."""


class _Console(Console):
    def print(self, *objects: Any, **options: Any) -> None:
        with _printing():
            super().print(*objects, **options)

    def on_broken_pipe(self) -> None:
        """Leaves it to the command line, which knows that the work is done; rich would exit with 1."""
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


def flush_output() -> None:
    """Prints what waits to be printed.

    Raises:
        NotPrintedError: If it cannot be printed.
    """
    with _printing():
        sys.stdout.flush()


@contextmanager
def _printing() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise NotPrintedError(error.errno, error.strerror) from error


def open_streams() -> None:
    """Opens what is closed of standard input, output and error, to nowhere; else the next file would take its place.

    What the encoding of a stream lacks, such as half a letter in a file's name, is printed as a number.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        stream = getattr(sys, name)
        if stream is None:
            if not _is_open(number):
                _to_nowhere(number)
            setattr(sys, name, open(os.devnull, "w" if number else "r"))
        elif number and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def drop_unprinted() -> None:
    """Drops what a stream does not take, since its reader is gone or a disk full: Python would try again at its end."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            with suppress(OSError):  # not every stream is a file
                _to_nowhere(stream.fileno())


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def _to_nowhere(number: int) -> None:
    nowhere = os.open(os.devnull, os.O_RDWR)
    if nowhere != number:
        os.dup2(nowhere, number)
        os.close(nowhere)
