"""How a kernel is compiled, given its loop over work items and the record it is called with, and kept on disk."""

import hashlib
import inspect
import warnings
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numba.extending
from llvmlite import ir
from numba import types
from numba.core.caching import FunctionCache
from numba.core.ccallback import CFunc

from mrla.messages.one_line import one_line

from .records import MAP, Field, Fields, Record

# Sums may be taken in any order and products joined to sums; NaN and infinities stay what they are.
LOOSE = {"reassoc", "contract", "nsz"}

intrinsic: Any = numba.extending.intrinsic
"""Numba's, as what it makes of a function: something without the first argument."""


def primitive(function: Callable[..., Any]) -> Any:
    """Compiles a function that kernels call; the compiler inlines it where it is used."""
    return numba.njit(fastmath=LOOSE, error_model="numpy", forceinline=True)(inspect.unwrap(function))


def exact(function: Callable[..., Any]) -> Any:
    """Like `primitive`, of operations that are each rounded by themselves, none joined to or swapped with another."""
    # said aloud: where it is not said, numba takes what the caller has
    return numba.njit(fastmath=False, error_model="numpy", forceinline=True)(inspect.unwrap(function))


class Kernel(CFunc):
    """Machine code of a kernel, for one type of map elements: a C function of one pointer, to a call's record."""

    record: Record

    def __init__(self, record: Record, work: Any, scratch: Any, key: tuple[Any, ...]):
        """Compiles, or takes the machine code that another process has kept under the same key."""
        function = _loop(record, work, scratch)
        options = {"fastmath": LOOSE, "error_model": "numpy"}
        super().__init__(function, ((types.voidptr,), types.void), locals={}, options=options)
        self.record = record
        try:
            self._cache: Any = _Cache(function, key)
        except (RuntimeError, OSError):  # no folder that may be written to: compiled anew in each process
            pass
        self.compile()


class KernelSource:
    """A kernel as it is written; called with a type of map elements, it is the `Kernel` for those."""

    def __init__(self, work: Callable[..., Any], scratch: Callable[..., Any] | None, fields: Fields):
        """Nothing is compiled yet; the arguments are those of `kernel`."""
        self.name = f"{work.__module__.rsplit('.', 1)[-1]}_{work.__name__}"
        self.fields = fields
        self.reads_maps = MAP in fields.values()
        self.__doc__ = work.__doc__
        self._work, self._scratch = work, scratch
        self._kernels: dict[Any, Kernel] = {}

    def __call__(self, element: Any = None) -> Kernel:
        """The kernel for maps of these elements, one of `records.MAP_DTYPES`; None for a kernel without maps."""
        if element not in self._kernels:
            record = Record(self.name, self.fields, element)
            key = (SOURCES, self.name, None if element is None else element.__name__)
            self._kernels[element] = Kernel(record, self._work, self._scratch, key)
        return self._kernels[element]


def kernel(
    *groups: Fields, scratch: Callable[..., Any] | None = None, **fields: Field
) -> Callable[[Callable[..., Any]], KernelSource]:
    """Makes a kernel of a function `work(call, item)` that does one piece of work.

    The machine code is kept between processes, by the hash of all files of this folder, the kernel's name and the type
    of the maps' elements.

    Args:
        groups: Fields of the call's record that kernels share, from `records`.
        scratch: A function of the call that makes what a thread needs for all its items; `work` is then called with it
            as the third argument.
        fields: The record's other fields.
    """
    all_fields = {name: field for group in (*groups, fields) for name, field in group.items()}
    if len(all_fields) != sum(map(len, groups)) + len(fields):
        raise ValueError(f"a field of a record is named twice: {[*map(sorted, groups), sorted(fields)]}")

    def decorate(work: Callable[..., Any]) -> KernelSource:
        return KernelSource(work, scratch, all_fields)

    return decorate


def _loop(record: Record, work: Callable[..., Any], scratch: Callable[..., Any] | None) -> Any:
    """The loop of one thread: one item after another, until there is none left."""
    read, work_on = _reader(record), primitive(work)
    if scratch is None:
        without_scratch, prepare = work_on, primitive(_no_scratch)

        def with_scratch(call, item, _):
            without_scratch(call, item)

        work_on = primitive(with_scratch)
    else:
        prepare = primitive(scratch)

    def loop(data):
        call = read(data)
        room = prepare(call)
        while True:
            item = next_item(data)
            if item >= call.items:
                break
            work_on(call, item, room)

    loop = inspect.unwrap(loop)
    loop.__name__ = loop.__qualname__ = record.kernel  # numba keeps a file for each name
    return loop


def _reader(record: Record) -> Any:
    """A function that reads the record at an address into a named tuple.

    In front of the loop, each field once: read where it is used, a field would be read again after each write to a map,
    which might have changed it as far as the compiler knows (3 to 20 % of a pass over maps of 14x14).
    """
    record_type: Any = numba.from_dtype(record.dtype)
    fields = record_type.fields
    call = types.NamedTuple([field.type for field in fields.values()], namedtuple(record.kernel, fields))

    @intrinsic
    def read(typing_context, data):
        def generate(context, builder, signature, arguments):
            values = []
            for field in fields.values():
                place = builder.gep(arguments[0], [ir.IntType(64)(field.offset)])
                kind = context.get_value_type(field.type)
                values.append(builder.load(builder.bitcast(place, kind.as_pointer()), align=2))
            return context.make_tuple(builder, call, values)

        return call(types.voidptr), generate

    return read


def _no_scratch(call: Any) -> None:
    return None


@intrinsic
def next_item(typing_context, counter):
    """Takes a number off the counter at an address, atomically: threads share work without a plan of who does what."""

    def generate(context, builder, signature, arguments):
        address = builder.bitcast(arguments[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", address, ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(types.voidptr), generate


class _Cache(FunctionCache):
    """Machine code between processes, as far as the disk allows: no room or a broken file is said once, no error."""

    def __init__(self, function: Any, key: tuple[Any, ...]):
        super().__init__(function)
        self._key = key

    def _index_key(self, sig: Any, codegen: Any) -> Any:
        """In place of numba's, of the values that the loop closes over: compiled functions differ in each process."""
        return sig, codegen.magic_tuple(), self._key

    def load_overload(self, *which: Any) -> Any:
        """The code that was kept; None where there is none that can be read."""
        try:
            return super().load_overload(*which)
        except Exception as error:  # a file cut short may raise anything while it is unpickled
            _warn(self.cache_path, error)
            try:
                self.flush()  # so that the next process finds a whole index
            except OSError:
                pass
            return None

    def save_overload(self, *which: Any) -> None:
        """Keeps code, where that can be written."""
        try:
            super().save_overload(*which)
        except Exception as error:
            _warn(self.cache_path, error)


_warned = False


def _warn(folder: str, error: Exception) -> None:
    global _warned
    if not _warned:
        _warned = True
        reason = f"{type(error).__name__}: {one_line(error, 200)}"
        warnings.warn(
            f"mrla compiles its kernels without numba's cache in {folder} ({reason}): make room there, delete its "
            f"files, or set NUMBA_CACHE_DIR to another folder",
            stacklevel=2,
        )


def _sources() -> int:
    files = sorted(Path(__file__).parent.glob("*.py"))
    return int.from_bytes(hashlib.sha256(b"".join(path.read_bytes() for path in files)).digest()[:4])


SOURCES = _sources()
"""A number that changes with any file of this folder."""
