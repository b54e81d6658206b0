"""One process at a time writes into a folder."""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from .atomic_write import make_folder, room_for, sweep
from .locks import holder, is_at, lock, say_holder

LOCK = ".mrla-lock"
PATIENCE = 3.0
"""Seconds until a folder that is taken is refused: processes of a command that was killed may need a moment to end."""


@contextmanager
def alone_in(folder: Path, parts: Sequence[str] = ()) -> Iterator[None]:
    """The body, in which no other process may write into a folder; what killed ones have left there is removed.

    The lock ends with the process, however it ends. A copy of the folder is not locked.

    Args:
        folder: The folder; made if missing, and removed again if nothing has come into it.
        parts: Folders in it that are swept too.

    Raises:
        ValueError: If another process writes into it, or it cannot be written to.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp()) / "run"
        >>> with alone_in(folder):
        ...     folder.is_dir()
        True
        >>> folder.is_dir()
        False
    """
    new = [place for place in (folder, *folder.parents) if not place.exists()]
    make_folder(folder)
    with room_for(folder):
        descriptor = _take(folder / LOCK)
    try:
        for part in (".", *parts):
            sweep(folder / part)
        yield
    finally:
        if is_at(descriptor, folder / LOCK):
            (folder / LOCK).unlink(missing_ok=True)
        os.close(descriptor)
        with suppress(OSError):  # not empty
            for place in new:
                place.rmdir()


def _take(path: Path) -> int:
    """Makes and holds the lock's file, which says who holds it."""
    end = time.monotonic() + PATIENCE
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        taken = lock(descriptor)
        if taken is not False and is_at(descriptor, path):
            break
        told = holder(path)
        os.close(descriptor)
        if taken is False and time.monotonic() > end:
            raise ValueError(
                f"another command is running in {path.parent}: {told}; wait for it to end, or choose another --out"
            )
        time.sleep(0.05)
    say_holder(descriptor)
    return descriptor
