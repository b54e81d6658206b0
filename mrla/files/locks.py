"""Locks on files and folders that end with the process that holds them."""

import json
import os
import platform
from contextlib import suppress
from datetime import datetime
from pathlib import Path


def lock(descriptor: int) -> bool | None:
    """Takes an open file or folder for this process, without waiting.

    The lock ends when the descriptor is closed, or with the process, however it ends. It is the file's, not the name's:
    a copy is not locked.

    Args:
        descriptor: The open file.

    Returns:
        Whether it was taken, or None where files cannot be locked.

    Example:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile() as one, open(one.name) as same:
        ...     lock(one.fileno()), lock(same.fileno())
        (True, False)
    """
    try:
        import fcntl
    except ModuleNotFoundError:  # on Windows
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return None
    return True


def is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file is still the one of that name: who held the lock before may have removed it."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False


def say_holder(descriptor: int) -> None:
    """Writes which process this is, and since when it works, into an open file; for the messages of others.

    Args:
        descriptor: The open file, whose content goes.
    """
    since = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    text = json.dumps({"process": os.getpid(), "machine": platform.node(), "since": since})
    with suppress(OSError):  # a full disk
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, text.encode(), 0)


def holder(path: Path) -> str:
    """The process that `say_holder` has written into a file, in words.

    Args:
        path: The file.

    Example:
        >>> holder(Path("there is none"))
        'its process is not known'
    """
    try:
        told = json.loads(path.read_text())
        return f"process {told['process']} on {told['machine']}, since {told['since']}"
    except (OSError, ValueError, RecursionError, LookupError, TypeError):  # not written yet
        return "its process is not known"
