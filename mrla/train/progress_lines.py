"""How far something has come, in lines, where there is no terminal for a bar."""

import sys
import time

LINE_EVERY = 60.0
"""Seconds between two lines: a log of days stays short, and who waits sees that something happens."""


class Lines:
    """Lines on standard error: the first at once, the others a minute apart at least."""

    def __init__(self):
        self._last = float("-inf")

    def say(self, text: str) -> None:
        """Prints a line, unless the last one is younger than a minute.

        Args:
            text: The line.
        """
        now = time.monotonic()
        if now - self._last >= LINE_EVERY:
            self._last = now
            print(f"mrla: {text}", file=sys.stderr, flush=True)


class CountedLines:
    """How many of something are done, in lines, with the time that is left.

    Args:
        what: What is counted, such as ``epochs of all runs``.
    """

    def __init__(self, what: str):
        self.what, self._lines = what, Lines()
        self._start: tuple[float, int] | None = None  # of the first report, and how many were done by then

    def say(self, done: int, total: int) -> None:
        """Says how many are done, if any are.

        Args:
            done: How many.
            total: Of how many.
        """
        now = time.monotonic()
        if self._start is None:
            self._start = now, done
        since, before = self._start
        if done:
            rest = (now - since) / (done - before) * (total - done) if done > before else 0.0
            self._lines.say(f"{done} of {total} {self.what}{left(rest)}")


def left(seconds: float) -> str:
    """The time that is left, as the end of a line; nothing where there is none.

    Example:
        >>> left(75.0)
        ', about 1 min 15 s left'
    """
    return f", about {duration(seconds)} left" if seconds > 0 else ""


def duration(seconds: float) -> str:
    """Seconds for a reader.

    Example:
        >>> [duration(seconds) for seconds in (4.21, 75, 7300)]
        ['4.2 s', '1 min 15 s', '2 h 1 min']
    """
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
