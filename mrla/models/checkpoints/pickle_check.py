"""Looking through pickled data before it is read: what would fill the memory, never end or overflow the stack."""

import io
import mmap
import pickletools
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, BinaryIO

import torch

from mrla.messages.one_line import one_line

_MOST_DEPTH = 200  # of values within values; checkpoints have some twenty
_MOST_PARTS = 10**7  # of a tuple, with those that it holds several times counted as often: it may be hashed
_MOST_STEPS = 10**7  # instructions of a file; a checkpoint of a thousand tensors has some fifty thousand
_LEGACY_PICKLES = 5  # magic number, protocol, system, content, keys of the storages; the numbers follow
_ZIP = b"PK\x03\x04"  # by which torch.load knows it too
_MEMO_WRITES = ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE")
_MEMO_READS = ("GET", "BINGET", "LONG_BINGET")
_TUPLES = ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_TUPLE")
_CALLS = ("REDUCE", "NEWOBJ", "NEWOBJ_EX", "INST", "OBJ")
_CHANGES = ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD")


class HarmfulPickle(Exception):
    """What a pickle would do that no weights do, in words that follow the file's name."""


class DamagedPickle(Exception):
    """Why bytes are no whole pickle."""


class _Value:
    """What an instruction makes: how deep values lie in it, of how many parts, and the text or number that it is."""

    __slots__ = ("atom", "depth", "largest", "parts")

    def __init__(self, parts: Iterable["_Value"] = (), atom: Any = None):
        self.atom = atom
        self.depth, self.parts, self.largest = 0, 1, atom if isinstance(atom, int) else 0
        self.take(parts)

    def take(self, parts: Iterable["_Value"]) -> None:
        for one in parts:
            self.depth = max(self.depth, one.depth + 1)
            self.parts = min(self.parts + one.parts, _MOST_PARTS + 1)
            self.largest = max(self.largest, one.largest)


def check_pickle(file: Any, size: int, *, never_called: Collection[str] = ()) -> Any:
    """Looks through one pickle without making anything of it.

    Args:
        file: Bytes that can be read from where the pickle begins; afterwards it stands behind the pickle.
        size: Bytes of the whole file, which no length declared in it may exceed.
        never_called: Globals, as ``module.name``, that may be named and not called.

    Returns:
        The text or number that the whole pickle is; None where it is something else.

    Raises:
        HarmfulPickle: If a key is neither text nor a number, values lie too deep in one another, or something of
            `never_called` is called.
        DamagedPickle: If the bytes are no pickle, or a length is larger than the file.
    """
    stack: list[_Value | None] = []  # None is a mark
    memo: dict[int, _Value] = {}
    whole: Any = None
    for step, (opcode, argument, _) in enumerate(_instructions(file)):
        if step > _MOST_STEPS:
            raise HarmfulPickle(f"has more than {_MOST_STEPS} instructions, and weights need few")
        name = opcode.name
        try:
            if name in _MEMO_WRITES:
                memo[len(memo) if name == "MEMOIZE" else argument] = _top(stack)
                continue
            if name in _MEMO_READS:
                stack.append(memo[argument])
                continue
            if name == "FRAME":
                if argument > size:
                    raise DamagedPickle(f"a part of {argument} bytes in a file of {size}")
                continue
            if name == "MARK":
                stack.append(None)
                continue
            if name == "DUP":
                stack.append(_top(stack))
                continue
            if name == "POP":
                stack.pop()
                continue
            taken, target = _taken(opcode, stack)
        except (IndexError, KeyError):
            raise DamagedPickle("it takes a value that was not made") from None
        if name in _CHANGES:
            _check_keys(name, taken)
            assert target is not None
            target.take(taken)
            made = target
            stack.append(target)
        elif name == "POP_MARK":
            continue
        else:
            if name in ("DICT", "FROZENSET"):
                _check_keys(name, taken)
            called = _called(name, argument, taken)
            if called is not None and called in never_called:
                raise HarmfulPickle(f"calls {called}, which weights do not need; nothing was run")
            if name in ("BINPERSID", "PERSID") and taken and taken[0].largest > size:
                raise DamagedPickle(f"{taken[0].largest} numbers in a file of {size} bytes")
            made = _Value(taken, _atom(name, argument, taken))
            if name == "STOP":
                whole = taken[0].atom
            if opcode.stack_after:
                stack.append(made)
        if made.depth > _MOST_DEPTH or (name in _TUPLES and made.parts > _MOST_PARTS):
            raise HarmfulPickle("has values within values, deeper or more often than any weights have")
    return whole


def _instructions(file: Any) -> Iterable[Any]:
    try:
        yield from pickletools.genops(file)
    except (ValueError, UnicodeDecodeError, OverflowError) as error:
        raise DamagedPickle(one_line(error, 100)) from None


def _top(stack: list[_Value | None]) -> _Value:
    value = stack[-1]
    if value is None:
        raise IndexError
    return value


def _taken(opcode: Any, stack: list[_Value | None]) -> tuple[list[_Value], _Value | None]:
    """The values that an instruction takes off the stack, and the one that it changes."""
    before = [one.name for one in opcode.stack_before]
    taken: list[_Value] = []
    if "mark" in before:
        while (value := stack.pop()) is not None:
            taken.append(value)
        count = before.index("mark")
    else:
        count = len(before)
    for _ in range(count):
        value = stack.pop()
        if value is None:
            raise IndexError
        taken.append(value)
    taken.reverse()
    if opcode.name in _CHANGES:
        return taken[1:], taken[0]
    return taken, None


def _check_keys(name: str, taken: list[_Value]) -> None:
    keys = {"SETITEM": taken[::2], "SETITEMS": taken[::2], "DICT": taken[::2], "ADDITEMS": taken, "FROZENSET": taken}
    if any(key.depth for key in keys.get(name, ())):
        raise HarmfulPickle("has a key that is neither text nor a number, and names of weights are text")


def _called(name: str, argument: Any, taken: list[_Value]) -> Any:
    """The global that an instruction calls."""
    if name == "INST":
        return argument.replace(" ", ".")
    return taken[0].atom if name in _CALLS and taken else None


def _atom(name: str, argument: Any, taken: list[_Value]) -> Any:
    """The text, number or name of a global that an instruction makes."""
    if name == "GLOBAL":
        return argument.replace(" ", ".")
    if name == "STACK_GLOBAL":
        return f"{taken[0].atom}.{taken[1].atom}"
    if name == "PERSID" or name in _CALLS:
        return None
    return argument if isinstance(argument, (int, str)) else None


# Of these torch makes as much memory as a number says, or one for each of many bytes that need not be there.
_ALLOCATORS = frozenset({"builtins.bytearray", "__builtin__.bytearray"})
_STORAGES = (
    *("Double", "Float", "Half", "Long", "Int", "Short", "Char", "Byte", "Bool", "BFloat16", "ComplexDouble"),
    *("ComplexFloat", "QUInt8", "QInt8", "QInt32", "QUInt4x2", "QUInt2x4"),
)
_NEVER_CALLED = _ALLOCATORS.union(
    (f"torch.{name}Storage" for name in _STORAGES),
    ("torch.storage.UntypedStorage", "torch.storage.TypedStorage", "torch.UntypedStorage", "torch.TypedStorage"),
)


def check_torch_file(path: Path) -> None:
    """Looks through a file of `torch.save`, in its zip form or the older one.

    Args:
        path: The file.

    Raises:
        HarmfulPickle: As `check_pickle`, or if the zip holds more than its own size.
        DamagedPickle: As `check_pickle`, or if the zip holds no content, or a name twice.
        OSError: If it cannot be read.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(len(_ZIP))
        if start == _ZIP:
            _check_zip(file, size)
        elif start and not _is_tar(path):  # torch.load refuses those
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                if check_pickle(mapped, size, never_called=_NEVER_CALLED) != torch.serialization.MAGIC_NUMBER:
                    return  # torch.load reads this far and refuses it
                for _ in range(_LEGACY_PICKLES - 1):
                    check_pickle(mapped, size, never_called=_NEVER_CALLED)


def _is_tar(path: Path) -> bool:
    try:
        with tarfile.open(path, "r:"):
            return True
    except (tarfile.TarError, OSError, ValueError, EOFError):
        return False


def _check_zip(file: BinaryIO, size: int) -> None:
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError) as error:
        raise DamagedPickle(one_line(error, 100)) from None
    names = [entry.filename for entry in entries]
    if len(set(names)) < len(names):
        raise DamagedPickle("it holds a name twice")
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise HarmfulPickle("is compressed, which torch.save does not do, and may be far larger unpacked")
    if sum(entry.file_size for entry in entries) > size:
        raise HarmfulPickle(f"says to hold more than its {size} bytes")
    root = names[0].partition("/")[0] if names else ""
    if f"{root}/constants.pkl" in names:
        return  # TorchScript's, which torch.load refuses
    content = next((entry for entry in entries if entry.filename == f"{root}/data.pkl"), None)
    if content is None:
        raise DamagedPickle("it holds no data.pkl")
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        changed = [entry.filename for entry in entries if zlib.crc32(_stored(mapped, entry)) != entry.CRC]
        # torch.load does not look at these sums. torch.save can be told to write none, which shows in every entry.
        if changed and len(changed) < len(entries):
            raise DamagedPickle(f"{changed[0]} is not as it was written")
        check_pickle(io.BytesIO(_stored(mapped, content)), size, never_called=_NEVER_CALLED)


def _stored(mapped: mmap.mmap, entry: zipfile.ZipInfo) -> memoryview:
    """The bytes of an entry that is not compressed: behind its header, whose name and extra field differ in length."""
    lengths = mapped[entry.header_offset + 26 : entry.header_offset + 30]
    if len(lengths) < 4:
        raise DamagedPickle(f"{entry.filename} lies outside of it")
    start = entry.header_offset + 30 + sum(struct.unpack("<HH", lengths))
    if start + entry.file_size > len(mapped):  # before there is a view, which would keep the map open
        raise DamagedPickle(f"{entry.filename} lies outside of it")
    return memoryview(mapped)[start : start + entry.file_size]
