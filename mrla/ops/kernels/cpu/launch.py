"""Running a kernel on the threads that torch computes with."""

import ctypes
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

_SMALL = 1 << 15
"""Elements of work below which waking a second thread costs more than it saves."""


def run(kernel: Any, *, items: int, work: int, **fields: Tensor | float | int | None) -> None:
    """Runs a kernel on `items` pieces of work, shared by as many threads as torch may use.

    The threads are those of torch's own OpenMP team, entered through its C interface: threads of our own would find the
    cores taken by torch's, which go on spinning for a while after each operation. In a forked child, where that team
    does not exist, one thread does all. Which thread does which item changes no result.

    Args:
        kernel: From `compiling.kernel`.
        items: Pieces of work.
        work: Elements to go over in all, to tell whether more than one thread is worth while.
        fields: A value for each field of the kernel's record, converted by the field's type.

    Raises:
        TypeError: If a field is missing, unknown, or has a value of another type.
    """
    call = kernel.record.pack(items, fields)
    if items == 0:
        return
    address = ctypes.addressof(call)
    threads = 1 if _forked or work < _SMALL else min(torch.get_num_threads(), items)
    if threads == 1:
        kernel.ctypes(address)
    elif _openmp is not None:
        _openmp(kernel.address, address, threads, 0)
    else:
        _share(kernel, address, threads)


def _share(kernel: Any, call: int, threads: int) -> None:
    with ThreadPoolExecutor(threads - 1) as pool:
        others = [pool.submit(kernel.ctypes, call) for _ in range(threads - 1)]
        kernel.ctypes(call)
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
