"""The records that kernels are called with: fields with a name and a type, packed here and read by name in a kernel.

In memory a record is the counter of work items, on a cache line of its own, the number of items, and the fields one
after the other, eight bytes each.
"""

import ctypes
import struct
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

_FIRST = 64
"""Bytes in front of the number of items: a cache line for the counter, which all threads write."""


class Field(NamedTuple):
    """What one entry of a record may hold.

    Attributes:
        meaning: For messages.
        code: The letter of `struct`.
        dtype: For addresses: the dtype of the tensors that the kernel reads or writes there.
    """

    meaning: str
    code: str
    dtype: torch.dtype | None = None


INTEGER = Field("an integer", "q")
NUMBER = Field("a number", "d")
FLOATS = Field("a tensor or None", "q", torch.float32)
"""The address of float32 numbers; 0 for None."""
INTEGERS = Field("a tensor or None", "q", torch.int64)
"""The address of int64 numbers: of addresses, or of rows of a record."""
MAP = Field("a tensor or None", "q")
"""The address of a map, whose elements have the type that the kernel is compiled for."""

MAP_DTYPES = {np.float32: torch.float32, np.uint16: torch.bfloat16}
"""The tensors that a kernel for these elements reads: numba has no bfloat16 and takes the bits."""

Fields = Mapping[str, Field]

IMAGES: Fields = {
    "channels": INTEGER,
    "height": INTEGER,
    "width": INTEGER,
    "heads": INTEGER,
    "chunks": INTEGER,
    "kernel_size": INTEGER,
}
"""Of kernels that go over maps: an item is one of the `chunks` of one image's heads, or channels.

`kernel_size` is that of the query and key kernels.
"""

PLANE_NUMBERS: Fields = {
    "images": INTEGER,
    "channels": INTEGER,
    "pixels": INTEGER,
    "heads": INTEGER,
    "kernel_size": INTEGER,
    "parts": INTEGER,
}
"""Of kernels that go over numbers of each plane: an item is an image, or one of the `parts` of the channels."""

NO_EPILOGUE, ADD_ALONE, RUNNING_NORM, BATCH_NORM = range(4)
"""What is left of a residual epilogue: nothing; relu(branch + shortcut); with a norm whose spread is a variance; with
one whose spread is 1 / deviation, of the batch."""

EPILOGUE: Fields = {
    "epilogue": INTEGER,
    "branch_weight": FLOATS,
    "branch_bias": FLOATS,
    "branch_mean": FLOATS,
    "branch_spread": FLOATS,
    "branch_eps": NUMBER,
}
"""What is left of a residual epilogue, and the norm behind its branch; no weight stands for ones, no bias for zeros."""

UPDATE_NORM: Fields = {
    "norm_weight": FLOATS,
    "norm_bias": FLOATS,
    "norm_mean": FLOATS,
    "norm_variance": FLOATS,
    "norm_eps": NUMBER,
}
"""The mixer's own norm."""

SCALES: Fields = {"scale": FLOATS, "drop_scale": FLOATS}
"""What multiplies an update: the mixer's scale for each channel, DropPath's factor for each image; no tensor for 1."""


def number_record(*names: str, number: Any = np.float32) -> Any:
    """A record of numbers of one type, such as sums of a plane, which kernels write and read by name."""
    return np.dtype([(name, number) for name in names])


class Record:
    """The fields of one kernel's calls."""

    def __init__(self, kernel: str, fields: Fields, element: Any = None):
        """Lays out the fields.

        Args:
            kernel: Its name, for messages.
            fields: By name.
            element: The type of a map's elements, of those in `MAP_DTYPES`; None for a kernel that reads no map.
        """
        self.kernel = kernel
        dtype = MAP_DTYPES.get(element)
        self.fields = {name: field._replace(dtype=dtype) if field is MAP else field for name, field in fields.items()}
        numbers = [(name, field) for name, field in self.fields.items() if field in (INTEGER, NUMBER)]
        self._tensors = [(name, field.dtype) for name, field in self.fields.items() if field not in (INTEGER, NUMBER)]
        self._numbers = [name for name, _ in numbers]
        codes = "".join(field.code for _, field in numbers) + "q" * len(self._tensors)
        self._format = struct.Struct(f"=q{_FIRST - 8}xq{codes}")
        self._buffer = ctypes.c_int64 * (self._format.size // 8)
        self._count = len(self.fields)

        names = ["items", *self._numbers, *(name for name, _ in self._tensors)]
        formats: list[Any] = [np.float64 if code == "d" else np.int64 for code in f"q{codes}"]
        offsets = [_FIRST + 8 * at for at in range(len(names))]
        if element is not None:  # never read: it tells a kernel the type
            names, formats, offsets = [*names, "element"], [*formats, element], [*offsets, 0]
        self.dtype = np.dtype({"names": names, "formats": formats, "offsets": offsets, "itemsize": self._format.size})
        """The same for numpy and numba."""

    def pack(self, items: int, fields: Mapping[str, Any], counter: int = 0) -> Any:
        """A call as a kernel reads it.

        Args:
            items: Pieces of work.
            fields: A value for each field of the record: an integer, a number, a tensor, or None for no tensor.
            counter: The first item.

        Returns:
            Memory of ctypes, which holds addresses alone: the tensors must outlive the kernel's run.

        Raises:
            TypeError: If a field is missing, unknown, or has a value of another type.
        """
        buffer = self._buffer()
        try:
            if len(fields) != self._count:
                raise KeyError
            numbers = [fields[name] for name in self._numbers]
            addresses = []
            for name, dtype in self._tensors:
                tensor = fields[name]
                if tensor is None:
                    addresses.append(0)
                elif tensor.dtype is dtype:
                    addresses.append(tensor.data_ptr())
                else:
                    raise TypeError
            self._format.pack_into(buffer, 0, counter, items, *numbers, *addresses)
        except (KeyError, TypeError, AttributeError, struct.error):
            self._refuse(fields)
            raise
        return buffer

    def _refuse(self, given: Mapping[str, Any]) -> None:
        """Raises the error that says what is wrong with a call."""
        missing, unknown = self.fields.keys() - given.keys(), given.keys() - self.fields.keys()
        if missing or unknown:
            wrong = [f"{what}: {', '.join(sorted(names))}" for what, names in _named(missing, unknown) if names]
            raise TypeError(f"kernel {self.kernel} is called with other fields than its record has: {'; '.join(wrong)}")
        for name, field in self.fields.items():
            value = given[name]
            if not _fits(field, value):
                due = field.meaning if field.dtype is None else f"{field.meaning}, of {field.dtype}"
                got = value.dtype if isinstance(value, torch.Tensor) else f"{value!r} ({type(value).__name__})"
                raise TypeError(f"kernel {self.kernel} takes {due}, as {name}: got {got}")


def _named(missing: Any, unknown: Any) -> list[tuple[str, Any]]:
    return [("missing", missing), ("unknown", unknown)]


def _fits(field: Field, value: Any) -> bool:
    if field.dtype is not None:
        return value is None or (isinstance(value, torch.Tensor) and value.dtype == field.dtype)
    try:
        struct.pack(field.code, value)
    except (struct.error, TypeError):
        return False
    return True
