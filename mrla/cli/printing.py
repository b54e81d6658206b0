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
from rich.text import Text

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
    from mrla.analysis.benchmarking.tables import table, title

    headings, lines = table(content)
    console = console_of_width()
    sweep = content["configuration"]["sweep"] is not None
    of_a_value = {"keys": 2, "section": len(content["configuration"]["arms"])} if sweep else {}
    for shown in number_tables(title(content), headings, lines, width=console.width, **of_a_value):
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
    from mrla.analysis.report.tables import speed

    console = console_of_width()
    cuts: list[list[str]] = []
    records = {record["block"]: record for record in pruned.cuts}
    for block in reversed(removal_order(pruned.cuts)):
        accuracy, loss = records[block]["accuracy_change"], records[block]["loss_change"]
        cuts.append(
            [
                block,
                f"{100 * accuracy['mean']:+.2f}",
                f"{100 * accuracy['low']:+.2f} to {100 * accuracy['high']:+.2f}",
                f"{loss['mean']:+.4f}",
                "none" if loss["low"] is None else f"{loss['low']:+.4f} to {loss['high']:+.4f}",
                "stays" if block in pruned.kept else "taken off",
            ]
        )
    title = f"{len(pruned.kept)} of {len(pruned.cuts)} mixers stay"
    headings = ["mixer", "accuracy (points)", "interval", "loss", "interval", ""]
    for table in number_tables(title, headings, cuts, width=console.width):
        console.print(table)
    console.print("Each cut alone; the intervals of a column hold together with 95 %.", style="dim")
    lines: list[list[str]] = []
    shown = {"before": pruned.before, **({"after": pruned.after} if pruned.removed else {})}
    for name, scores in shown.items():
        low, high = (100 * scores["accuracy_interval"][end] for end in ("low", "high"))
        accuracy, counted = f"{100 * scores['accuracy']:.2f} ({low:.2f} to {high:.2f})", f"{scores['parameters']:,}"
        lines.append([name, accuracy, f"{scores['loss']:.4f}", counted, speed(scores["images_per_second"])])
    headings = ["", "accuracy (%), 95 % interval", "loss", "params", "images/s (10 to 90 %)"]
    for table in number_tables(None, headings, lines, width=console.width):
        console.print(table)
    console.print(pruned.verdict, style="bold")
    console.print(f"\n{pruned.note}", style="dim")
    written = "Nothing is written." if folder is None else f"{folder}/model.safetensors, config.json, prune.json"
    console.print(written)


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
