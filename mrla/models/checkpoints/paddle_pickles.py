"""Reading the weights that Paddle saves (`.pdparams`) without Paddle, and without running what the file asks for."""

import mmap
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .pickle_check import DamagedPickle, HarmfulPickle, check_pickle

STATE_ENTRIES = ("state_dict", "model", "model_state_dict")
_NAME_TABLE = "StructuredToParameterName@@"
_SPLIT_TABLE = "UnpackBigParamInfor@@"  # Paddle's spelling
_NUMBERS = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16")


def read_pdparams(path: str | Path) -> dict[str, Tensor]:
    """Reads the weights in a file of `paddle.save`, without Paddle.

    Only the few globals that such a file needs are known, and each is replaced by a function of ours. Names and shapes
    stay Paddle's: its linear weights are [in, out], its running statistics are called ``_mean`` and ``_variance``.

    Args:
        path: A ``.pdparams`` file: a state dict, or a dict that holds one beside other entries such as an epoch. Of
            several state dicts the one called ``state_dict``, ``model`` or ``model_state_dict`` is read. A ``.pdopt``
            file gives its arrays; nested dicts beside them are left out.

    Returns:
        Tensors by name, in the file's order, each in memory of its own. uint16 arrays, as which Paddle writes bfloat16,
        become bfloat16 tensors with the same bits.

    Raises:
        ValueError: If the file is missing or damaged, asks for anything but arrays (nothing is run), has arrays that
            are not numbers or were split, or its weights are not found.

    Example:
        >>> import pickle, tempfile
        >>> path = Path(tempfile.mkdtemp()) / "net.pdparams"
        >>> _ = path.write_bytes(pickle.dumps({"fc.weight": np.ones((2, 3), np.float32)}, protocol=4))
        >>> read_pdparams(path)["fc.weight"].shape
        torch.Size([2, 3])
    """
    try:
        size = Path(path).stat().st_size
        with open(path, "rb") as file:
            if size:
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                    check_pickle(mapped, size)
            content = _Unpickler(file, _Budget(size)).load()
    except _Refused as refusal:
        raise ValueError(f"{path} {refusal}") from None
    except HarmfulPickle as error:
        raise ValueError(f"{path} {error}; do not load it, or have its state dict saved alone") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror or error}); give the path of a file") from error
    except Exception as error:  # damaged bytes are damaged instructions, which fail in every way there is
        raise ValueError(
            f"{path} is damaged or was not written by paddle.save ({_reason(error)}); download or save it again"
        ) from error
    return _weights(content, path)


def tensor_from_array(array: np.ndarray) -> Tensor:
    """Copies an array into a tensor in native byte order.

    Args:
        array: Numbers. uint16 is taken for the bits of bfloat16, a type that numpy does not have.

    Returns:
        A tensor that shares no memory with the array.

    Raises:
        ValueError: If torch has no such type of number.

    Example:
        >>> tensor_from_array(np.array([1.5], dtype=">f8"))
        tensor([1.5000], dtype=torch.float64)
    """
    if array.dtype.str[1:] not in _NUMBERS:
        raise ValueError(f"weights must be numbers that torch has: got an array of {array.dtype}; leave it out")
    tensor = torch.from_numpy(array.astype(array.dtype.newbyteorder("="), order="C"))
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.uint16 else tensor


class _Refused(Exception):
    """What a file has or asks for that is not read; the path goes before it, the message is the user's."""


class _Dtype:
    """Stands for numpy.dtype in a pickle: takes number types alone."""

    def __init__(self, code: str, *_: Any):
        if code not in _NUMBERS:
            raise _Refused(
                f"has an array of dtype {_shown(code)}, and weights must be numbers; save it without that array"
            )
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


class _Budget:
    """How many bytes a file may still become: what it holds several times by reference must not be copied as often."""

    def __init__(self, size: int):
        self.left = 2 * size + 2**20  # text of protocol 2 becomes bytes, and bytes an array

    def spend(self, count: int) -> None:
        self.left -= count
        if self.left < 0:
            raise _Refused("would become far larger than it is: the same bytes are used again; save it again")


class _Array:
    """Stands for numpy.ndarray in a pickle."""

    tensor: Tensor

    def __init__(self, budget: _Budget):
        self._budget = budget

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, stored, fortran, data = state
        array = np.ndarray(shape, stored.dtype, buffer=data, order="F" if fortran else "C")
        if array.nbytes != len(data):
            raise ValueError(f"{len(data)} bytes for an array of {array.nbytes}")
        self._budget.spend(array.nbytes)
        self.tensor = tensor_from_array(array)


def _reconstruct(budget: _Budget, *_: Any) -> _Array:
    return _Array(budget)


def _encode(budget: _Budget, text: str, encoding: str) -> bytes:
    """Stands for _codecs.encode, by which protocol 2 writes bytes; other codecs are code found by name."""
    if encoding not in ("latin1", "latin-1"):
        raise _Refused(f"asks for the codec {_shown(encoding)}; only latin1 is needed for weights, and nothing was run")
    budget.spend(len(text))
    return text.encode("latin-1")


_STAND_INS = {
    "numpy.ndarray": _Array,
    "numpy.dtype": _Dtype,
    # A state dict nested in another dict is an OrderedDict of tensors, which Paddle writes as calls of tuple.
    "collections.OrderedDict": dict,
    "builtins.tuple": tuple,
    "__builtin__.tuple": tuple,  # protocol 2
}
# These make copies of what the file holds.
_COPYING = {
    "numpy.core.multiarray._reconstruct": _reconstruct,
    "numpy._core.multiarray._reconstruct": _reconstruct,  # numpy 2
    "_codecs.encode": _encode,
}


class _Unpickler(pickle._Unpickler):
    """Knows the stand-ins and nothing else.

    Its base is the one in Python because a damaged byte can make the one in C fill gigabytes: its memo is a list, not a
    dict. Both read an array in one piece.
    """

    def __init__(self, file: Any, budget: _Budget):
        super().__init__(file)
        self._budget = budget

    def find_class(self, module: str, name: str) -> Any:
        path = f"{module}.{name}"
        if path in _COPYING:
            return partial(_COPYING[path], self._budget)
        try:
            return _STAND_INS[path]
        except KeyError:
            raise _Refused(
                f"asks for {_shown(f'{module}.{name}')}, which weights do not need and which may do harm; "
                f"nothing was run: do not load it, or have its state dict saved alone"
            ) from None

    def persistent_load(self, pid: Any) -> Any:
        raise _Refused("refers to an object outside of it (a persistent id), which paddle.save does not do")


def _weights(content: Any, path: str | Path) -> dict[str, Tensor]:
    """The state dict in an unpickled file: an entry of that name, else the arrays at the top, else the only one."""
    if not isinstance(content, dict):
        raise ValueError(
            f"{path} must hold a dict of names and arrays: it holds a {type(content).__name__}; "
            f"save the network's state_dict()"
        )
    nested = {
        name: entry
        for name, entry in content.items()
        if isinstance(entry, dict) and any(_tensor(value) is not None for value in entry.values())
    }
    if any(_SPLIT_TABLE in state for state in (content, *nested.values())):
        raise ValueError(
            f"{path} has arrays that paddle.save split since they are too large for pickle protocols 2 and 3, "
            f"and these are not put together here; save it with protocol=4"
        )
    chosen = next((nested[name] for name in STATE_ENTRIES if name in nested), None)
    if chosen is None and any(_tensor(value) is not None for value in content.values()):
        # An optimizer's file has its scheduler and its copy of the weights as dicts beside the arrays.
        chosen = {name: value for name, value in content.items() if not isinstance(value, dict)}
    elif chosen is None and len(nested) == 1:
        (chosen,) = nested.values()
    if chosen is None:
        found = f"several: {', '.join(map(repr, nested))}" if nested else "none"
        raise ValueError(
            f"{path} must hold one dict of names and arrays, it holds {found}; save the state_dict() alone"
        )
    tensors = {}
    for name, value in chosen.items():
        if name == _NAME_TABLE:
            continue
        tensor = _tensor(value)
        if tensor is None or not isinstance(name, str):
            raise ValueError(
                f"{path} must hold names and arrays alone: {name!r} is a {type(value).__name__}; save it without that"
            )
        tensors[name] = tensor
    return tensors


def _tensor(value: Any) -> Tensor | None:
    """The tensor of an array, or of an array with Paddle's internal name before it; None for anything else."""
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str):
        value = value[1]
    return getattr(value, "tensor", None) if isinstance(value, _Array) else None


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, DamagedPickle) else f"{type(error).__name__}: {_shown(error)}"


def _shown(text: object) -> str:
    """What a file says, short and on one line."""
    return repr(str(text))[1:-1][:100]
