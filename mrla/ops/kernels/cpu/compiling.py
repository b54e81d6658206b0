"""How a kernel is compiled, told where its arrays are, and kept between processes."""

import hashlib
import inspect
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numba.extending
from numba import types
from numba.core.caching import FunctionCache
from numba.core.ccallback import CFunc

from mrla.messages.one_line import one_line

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
    compiled: Any = CFunc(function, ((types.voidptr,), types.void), locals={}, options=options)
    try:
        compiled._cache = _Cache(function)
    except (RuntimeError, OSError):  # no folder that may be written to: compiled anew in each process
        pass
    compiled.compile()
    return compiled


class _Cache(FunctionCache):
    """Machine code between processes, as far as the disk allows: no room or a broken file is said once, no error."""

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
