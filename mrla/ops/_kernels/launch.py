"""Running a kernel on the threads that torch computes with."""

import ctypes
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

_SMALL = 1 << 15
"""Elements of work below which waking a second thread costs more than it saves."""


def run(kernel: Any, items: int, work: int, *arguments: Tensor | int | None) -> None:
    """Runs a kernel on `items` pieces of work, shared by as many threads as torch may use.

    The threads are those of torch's own OpenMP team, entered through its C interface: threads of our own would find the
    cores taken by torch's, which go on spinning for a while after each operation. In a forked child, where that team
    does not exist, one thread does all. Which thread does which item changes no result.

    Args:
        kernel: From `compiling.kernel`.
        items: Pieces of work.
        work: Elements to go over in all, to tell whether more than one thread is worth while.
        arguments: What the kernel finds in its table, in order: the address of a tensor (0 for None), or the number.
    """
    if items == 0:
        return
    counter = np.zeros(1, np.int64)
    table = np.zeros(64, np.int64)
    table[0], table[1] = counter.ctypes.data, items
    for at, argument in enumerate(arguments, start=2):
        if isinstance(argument, Tensor):
            table[at] = argument.data_ptr()
        elif argument is not None:
            table[at] = argument
    threads = 1 if _forked or work < _SMALL else min(torch.get_num_threads(), items)
    if threads == 1:
        kernel.ctypes(table.ctypes.data)
    elif _openmp is not None:
        _openmp(kernel.address, table.ctypes.data, threads, 0)
    else:
        _share(kernel, table.ctypes.data, threads)


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
