"""Running a kernel on the threads that torch computes with."""

import ctypes
import os
import struct
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

_SMALL = 1 << 15
"""Elements of work below which waking a second thread costs more than it saves."""

_Table = ctypes.c_int64 * 64
_COUNTER = 63
"""The entry of a table that counts pieces of work; entry 0 has its address."""

_REAL, _INTEGER = struct.Struct("d"), struct.Struct("q")


def run(kernel: Any, items: int, work: int, *arguments: Tensor | float | int | None) -> None:
    """Runs a kernel on `items` pieces of work, shared by as many threads as torch may use.

    The threads are those of torch's own OpenMP team, entered through its C interface: threads of our own would find the
    cores taken by torch's, which go on spinning for a while after each operation. In a forked child, where that team
    does not exist, one thread does all. Which thread does which item changes no result.

    Args:
        kernel: From `compiling.kernel`.
        items: Pieces of work.
        work: Elements to go over in all, to tell whether more than one thread is worth while.
        arguments: What the kernel finds in its table from entry 2 on: a tensor's address (0 for None), or a number.
    """
    if items == 0:
        return
    table = _Table(0, items, *map(_entry, arguments))
    address = ctypes.addressof(table)
    table[0] = address + _COUNTER * ctypes.sizeof(ctypes.c_int64)
    threads = 1 if _forked or work < _SMALL else min(torch.get_num_threads(), items)
    if threads == 1:
        kernel.ctypes(address)
    elif _openmp is not None:
        _openmp(kernel.address, address, threads, 0)
    else:
        _share(kernel, address, threads)


def _entry(argument: Tensor | float | int | None) -> int:
    """An argument as 64 bits of a table."""
    if isinstance(argument, Tensor):
        return argument.data_ptr()
    if isinstance(argument, float):
        return _INTEGER.unpack(_REAL.pack(argument))[0]
    return argument or 0


def _share(kernel: Any, table: int, threads: int) -> None:
    with ThreadPoolExecutor(threads - 1) as pool:
        others = [pool.submit(kernel.ctypes, table) for _ in range(threads - 1)]
        kernel.ctypes(table)
        for other in others:
            other.result()


def _find_openmp() -> Any:
    """The entry that compilers call for a parallel region, in the OpenMP library that torch has loaded."""
    try:
        entry = ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError, TypeError):  # macOS and Windows
        return None
    entry.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    entry.restype = None
    return entry


def _mark_forked() -> None:
    global _forked
    _forked = True


_openmp = _find_openmp()
_forked = False
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_mark_forked)
