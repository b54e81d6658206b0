"""Files that are written whole or not at all, and what is left of them where a process was killed."""

import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from .locks import holder, is_at, lock, say_holder

_OURS = re.compile(r"\.(?P<name>.+)\.mrla-[a-z0-9_]{8}(\.[^.]*)?", re.DOTALL)
"""What is not finished: ``.NAME.mrla-RANDOM.SUFFIX`` of a file, ``.NAME.mrla-RANDOM`` of a folder."""
_BEFORE, _WHOLE = "before", "whole"
"""In an unfinished folder: what is there, moved aside, and the folder of what is to take its place."""
_HOLDER = "holder.json"
"""In an unfinished folder: which process fills it."""
_ANOTHER = "put an intact copy there, or choose another --out"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


class NotWrittenError(OSError):
    """A disk is full or takes nothing: `errno` says which, `strerror` names the file and the remedy."""


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Gives a temporary path beside `path` to write to, and renames it to `path` if the body succeeds.

    Args:
        path: The file to make or replace; its folder is made if need be.

    Yields:
        A path in the same folder with the same suffix. It is removed if the body raises.

    Raises:
        ValueError: If the folder cannot be made or written to.
        NotWrittenError: If there is no room for the file, or the disk can only be read.

    Example:
        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp()) / "note.txt"
        >>> with written_whole(target) as beside:
        ...     _ = beside.write_text("done")
        >>> target.read_text()
        'done'
    """
    with written_together(path) as (beside,):
        yield beside


@contextmanager
def written_together(*paths: Path) -> Iterator[tuple[Path, ...]]:
    """`written_whole` of files that belong together: all take their places, in this order, or none does.

    Args:
        paths: The files to make or replace.

    Yields:
        A path beside each.

    Raises:
        ValueError: If a folder cannot be made or written to.
        NotWrittenError: If there is no room for a file, or the disk can only be read.
    """
    with ExitStack() as stack:
        besides = tuple(stack.enter_context(_beside(path)) for path in paths)
        yield besides
        for beside in besides:
            beside.chmod(0o666 & ~_umask())  # mkstemp's file is for its owner alone
        try:
            _take_places(besides, paths)
        except BaseException:  # a signal: what is half done is brought to its end
            _take_places(besides, paths)
            raise


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    make_folder(path.parent)
    with room_for(path):
        beside, held = _held(lambda: _empty_file(path))
        try:
            yield beside
        except RuntimeError:
            _check_takes_more(beside)
            raise
        finally:
            beside.unlink(missing_ok=True)
            os.close(held)


def _take_places(besides: Iterable[Path], paths: Iterable[Path]) -> None:
    for beside, path in zip(besides, paths, strict=True):
        with suppress(FileNotFoundError):  # it has taken its place
            beside.replace(path)


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
            something that is not to be replaced, cannot be made, or another process is making it.
        NotWrittenError: If there is no room for it, or the disk can only be read.

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
    with scratch_folder(target) as scratch:
        if target.is_dir() and any(target.iterdir()):
            _check_may_be_replaced(target, record, overwrite=overwrite)
        beside = make_folder(scratch / target.name)
        yield beside
        before = scratch.parent / _BEFORE
        try:
            if target.is_dir():
                target.rename(before)
            beside.rename(target)
        except BaseException:  # a signal too
            _put_back(before, target)
            raise


@contextmanager
def scratch_folder(target: Path) -> Iterator[Path]:
    """A folder beside `target`, in which it is made; removed at the end.

    What killed processes have left of such folders for the same target is removed first. What one of them had moved
    aside is put back.

    Args:
        target: The file or folder to be made; the folder that it is in is made if need be.

    Yields:
        An empty folder there; this process holds the one around it.

    Raises:
        ValueError: If another process is making `target`, or the folder it is in cannot be written to.
        NotWrittenError: If there is no room for what is written into it.
    """
    make_folder(target.parent)
    with room_for(target):
        scratch, held = _held(lambda: Path(tempfile.mkdtemp(prefix=f".{target.name}.mrla-", dir=target.parent)))
        try:
            sweep(target.parent)
            others = (entry for entry in _unfinished(target.parent) if entry.is_dir() and entry != scratch)
            if (other := next((entry for entry in others if _name_of(entry) == target.name), None)) is not None:
                raise ValueError(
                    f"another command is writing {target}: {holder(other / _HOLDER)}; wait for it to end, or choose "
                    f"another --out"
                )
            with (scratch / _HOLDER).open("wb") as file:
                say_holder(file.fileno())
            yield make_folder(scratch / _WHOLE)
        except NotWrittenError as error:
            told = str(error.strerror).replace(str(scratch / _WHOLE), str(target.parent))
            raise NotWrittenError(error.errno, told) from error
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
            os.close(held)


def sweep(folder: Path) -> None:
    """Removes what killed processes have left in a folder: our unfinished files and folders that no process holds.

    Args:
        folder: The folder; folders in it are not looked into. It need not exist.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> (folder / ".last.mrla-abcd1234.ckpt").touch()
        >>> (folder / ".mine.ckpt").touch()
        >>> sweep(folder)
        >>> [path.name for path in folder.iterdir()]
        ['.mine.ckpt']
    """
    for path in _unfinished(folder):
        with suppress(OSError):  # gone meanwhile, or not ours to remove
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                if lock(descriptor) and is_at(descriptor, path):
                    _remove(path)
            finally:
                os.close(descriptor)


@contextmanager
def room_for(path: Path) -> Iterator[None]:
    """The body, in which an error of a disk that is full or takes nothing becomes one that names `path`.

    Args:
        path: What is written, for the message.

    Raises:
        NotWrittenError: Where the body finds no room, whichever library says so in whatever words.

    Example:
        >>> with room_for(Path("runs/mine")):
        ...     raise OSError(errno.ENOSPC, "No space left on device")
        Traceback (most recent call last):
        mrla.files.atomic_write.NotWrittenError: [Errno 28] runs/mine cannot be written (No space left on device); ...
    """
    try:
        yield
    except NotWrittenError:
        raise
    except Exception as error:
        if (number := _no_room(error)) is None:
            raise
        remedy = "choose a disk that can be written to" if number == errno.EROFS else "make room there"
        raise NotWrittenError(
            number, f"{path} cannot be written ({os.strerror(number)}); {remedy} and start the same command again"
        ) from error


def _no_room(error: BaseException | None) -> int | None:
    """The number of the system's error, if a disk is full or takes nothing; libraries in other languages say it."""
    while error is not None:
        told = re.search(r"\(os error (\d+)\)", str(error))  # Rust's, of safetensors
        number = error.errno if isinstance(error, OSError) else int(told[1]) if told else None
        if number in _NO_ROOM:
            return number
        error = error.__cause__ or error.__context__
    return None


def _check_takes_more(file: Path) -> None:
    """Raises the system's error if a file that could not be written takes no more; torch hides it."""
    if file.is_file():
        with file.open("ab") as more:
            more.write(bytes(1 << 20))


def _empty_file(path: Path) -> Path:
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}.mrla-", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    return Path(name)


def _held(make: Callable[[], Path]) -> tuple[Path, int]:
    """A new file or folder and the descriptor by which this process holds it, so that nobody sweeps it away."""
    while True:
        path = make()
        with suppress(FileNotFoundError):  # swept away before it was held
            descriptor = os.open(path, os.O_RDONLY)
            lock(descriptor)
            if is_at(descriptor, path):
                return path, descriptor
            os.close(descriptor)


def unfinished(path: Path) -> list[Path]:
    """What killed processes, or those at work, have left beside a file that they were to replace.

    Args:
        path: The file.
    """
    return [one for one in _unfinished(path.parent) if _name_of(one) == path.stem and one.suffix == path.suffix]


def _unfinished(folder: Path) -> list[Path]:
    try:
        return [path for path in folder.iterdir() if _OURS.fullmatch(path.name)]
    except OSError:
        return []


def _name_of(unfinished: Path) -> str:
    match = _OURS.fullmatch(unfinished.name)
    assert match is not None
    return match["name"]


def _remove(unfinished: Path) -> None:
    if not unfinished.is_dir():
        unfinished.unlink(missing_ok=True)
        return
    _put_back(unfinished / _BEFORE, unfinished.with_name(_name_of(unfinished)))
    shutil.rmtree(unfinished, ignore_errors=True)


def _put_back(before: Path, target: Path) -> None:
    """What was moved aside, where nothing has taken its place."""
    if before.is_dir() and not target.exists():
        before.rename(target)


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
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is missing or damaged ({error}); {_ANOTHER}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged, it holds no object; {_ANOTHER}")
    return content


def write_json(path: Path, content: Any) -> None:
    """Writes JSON, whole or not at all."""
    with written_whole(path) as beside:
        text = json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
        try:
            beside.write_text(text, encoding="utf-8")
        except UnicodeEncodeError:  # a file's name that is no text
            beside.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
