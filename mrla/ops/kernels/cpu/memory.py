"""What a kernel does with the addresses it is called with: arrays over them, and the next piece of work."""

import numpy as np
from llvmlite import ir
from numba import carray, types

from .compiling import intrinsic, primitive


@intrinsic
def _pointer(typing_context, address):
    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.int64), generate


@intrinsic
def next_item(typing_context, counter):
    """Takes a number off the counter at an address, atomically: threads share work without a plan of who does what."""

    def generate(context, builder, signature, arguments):
        address = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", address, ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(types.int64), generate


@primitive
def table(data, sources):
    """The integers that a kernel is called with. `sources` only makes the kernel close over that number."""
    return carray(data, (64,), np.int64)


@primitive
def reals(data):
    """The same memory as `table`, of whose entries some are real numbers."""
    return carray(data, (64,), np.float64)


@primitive
def floats(address, at, length):
    """So many float32 numbers from the one numbered `at` on, of those at an address."""
    return carray(_pointer(address + 4 * at), (length,), np.float32)


@primitive
def integers(address, length):
    """The integers at an address."""
    return carray(_pointer(address), (length,), np.int64)


@primitive
def elements(address, at, length, kind, bytes_each):
    """The same of a map's elements."""
    return carray(_pointer(address + bytes_each * at), (length,), kind)
