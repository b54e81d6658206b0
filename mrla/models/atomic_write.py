"""Files that are written whole or not at all."""

import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Gives a temporary path beside `path` to write to, and renames it to `path` if the body succeeds.

    Args:
        path: The file to make or replace; its folder is made if need be.

    Yields:
        A path in the same folder with the same suffix. It is removed if the body raises.

    Raises:
        ValueError: If the folder cannot be made or written to.

    Example:
        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp()) / "note.txt"
        >>> with written_whole(target) as beside:
        ...     _ = beside.write_text("done")
        >>> target.read_text()
        'done'
    """
    make_folder(path.parent)
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    beside = Path(name)
    try:
        yield beside
        beside.chmod(0o666 & ~_umask())  # mkstemp's file is for its owner alone
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def written_folder(
    target: Path, *, record: str, overwrite: bool = False, inputs: Iterable[str | Path] = ()
) -> Iterator[Path]:
    """Gives an empty folder beside `target` to fill, and puts it in its place if the body succeeds.

    Args:
        target: The folder to make.
        record: The name of a file that the body writes, by which such a folder is known again.
        overwrite: Whether a folder that the same command wrote is replaced, all of it.
        inputs: Files and folders that are read; those that do not exist are no paths.

    Yields:
        A folder beside it. It is removed if the body raises, and `target` is then as it was.

    Raises:
        ValueError: If `target` is a file, the current folder or one above it, is or holds an input or a run, holds
            something that is not to be replaced, or cannot be made.

    Example:
        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp()) / "notes"
        >>> with written_folder(target, record="note.txt") as beside:
        ...     _ = (beside / "note.txt").write_text("done")
        >>> [path.name for path in target.iterdir()]
        ['note.txt']
    """
    target = Path(os.path.realpath(target))  # of a link, what it leads to
    _check_may_be_made(target, inputs)
    if target.is_dir() and any(target.iterdir()):
        _check_may_be_replaced(target, record, overwrite=overwrite)
    make_folder(target.parent)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
        beside = make_folder(Path(scratch) / "whole")
        yield beside
        before = Path(scratch) / "before"
        if target.is_dir():
            target.rename(before)
        try:
            beside.rename(target)
        except OSError:
            if before.is_dir():
                before.rename(target)
            raise


def _check_may_be_made(target: Path, inputs: Iterable[str | Path]) -> None:
    if target.exists() and not target.is_dir():
        raise ValueError(f"out must be a folder: {target} is a file; choose another")
    here = Path.cwd().resolve()
    if target == here or target in here.parents:
        raise ValueError(
            f"out must not be the current folder or one above it, which hold more than a result: got {target}; choose "
            f"another --out"
        )
    for one in inputs:
        place = Path(os.path.realpath(one))
        if place.exists() and (target == place or target in place.parents):
            raise ValueError(f"out must not be or hold what is read: {target} has {one}; choose another --out")


def _check_may_be_replaced(target: Path, record: str, *, overwrite: bool) -> None:
    ours = (target / record).is_file()
    if not overwrite:
        replace = ", or replace it with --overwrite" if ours else ""
        raise ValueError(
            f"out must be a new or empty folder: {target} holds {len(list(target.iterdir()))} entries; choose another "
            f"--out{replace}"
        )
    if not ours:
        raise ValueError(
            f"only a folder that the same command wrote is replaced: {target} has no {record}; choose another --out"
        )
    results = {"run.json", "config.json", record}  # of runs, networks, and this command
    inside = (path.parent for path in target.rglob("*") if path.name in results and path.parent != target)
    if (other := next(inside, None)) is not None:
        raise ValueError(
            f"a folder that holds other results is not replaced: {target} has {other}; choose another --out"
        )
    if (target / "run.json").is_file():
        raise ValueError(f"the folder of a run is not replaced: {target} has run.json; choose another --out")


def make_folder(folder: Path) -> Path:
    """Makes `folder` and its parents, and checks that it can be written to.

    Args:
        folder: The folder; it may exist.

    Returns:
        `folder`.

    Raises:
        ValueError: If it cannot be made, is a file, or gives no write permission.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"the output folder must be writable: got {folder} ({error.strerror}); choose another folder or its rights"
        ) from error
    return folder


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object that `write_json` wrote.

    Raises:
        ValueError: If the file is not there or damaged.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is missing or damaged ({error}); remove its folder or choose another --out"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged, it holds no object; remove its folder or choose another --out")
    return content


def write_json(path: Path, content: Any) -> None:
    """Writes JSON, whole or not at all."""
    with written_whole(path) as beside:
        beside.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
