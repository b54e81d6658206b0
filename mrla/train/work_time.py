"""How long a work takes that may be stopped and started again."""

import json
import time
from contextlib import suppress
from pathlib import Path

from mrla.files.atomic_write import write_json

KEPT_EVERY = 10.0
"""Seconds between two writings, so that a process that is killed loses no more."""


class WorkTime:
    """Seconds that a work took, those of the processes that were stopped before this one with them.

    Args:
        path: The file that keeps them as long as the work is not done.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "seconds.json"
        >>> _ = path.write_text('{"seconds": 100.0}')
        >>> 100 <= WorkTime(path).seconds < 160
        True
    """

    def __init__(self, path: Path):
        self._path, self._start, self._kept = path, time.monotonic(), time.monotonic()
        self._before = 0.0
        with suppress(OSError, ValueError, RecursionError, LookupError, TypeError):  # none, or damaged
            self._before = max(0.0, float(json.loads(path.read_text())["seconds"]))

    @property
    def seconds(self) -> float:
        """Those until now."""
        return self._before + time.monotonic() - self._start

    def keep(self, *, now: bool = False) -> None:
        """Writes them down, if the last time is long ago.

        Args:
            now: Whether they are written in any case.
        """
        if now or time.monotonic() - self._kept >= KEPT_EVERY:
            self._kept = time.monotonic()
            write_json(self._path, {"seconds": self.seconds})

    def end(self) -> None:
        """Removes the file: the work is done."""
        self._path.unlink(missing_ok=True)
