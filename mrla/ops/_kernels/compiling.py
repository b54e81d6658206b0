"""How a kernel is compiled, told where its arrays are, and kept between processes."""

import hashlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numba.extending
from numba import types
from numba.core.caching import FunctionCache

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


def kernel(function: Callable[..., Any]) -> Any:
    """Compiles a C function of one pointer, to its table, and keeps the machine code between processes.

    A kernel is defined inside a function of the type of its maps' elements and of `SOURCES`, both of which it uses:
    numba keeps code by the values that a kernel closes over, but does not look into the files of what it calls.
    """
    function = inspect.unwrap(function)
    options = {"fastmath": LOOSE, "error_model": "numpy"}
    return numba.cfunc(types.void(types.voidptr), cache=_can_be_kept(function), **options)(function)


def _can_be_kept(function: Callable[..., Any]) -> bool:
    try:
        FunctionCache(function)
    except (RuntimeError, OSError):  # no folder that may be written to: compiled anew in each process
        return False
    return True


def _sources() -> int:
    files = sorted(Path(__file__).parent.glob("*.py"))
    return int.from_bytes(hashlib.sha256(b"".join(path.read_bytes() for path in files)).digest()[:4])


SOURCES = _sources()
"""A number that changes with any file of this folder."""
