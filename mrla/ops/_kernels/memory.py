"""What a kernel does with addresses: arrays over them, the next piece of work, elements as float32 and back."""

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic

from .compiling import primitive

STEP = 8
"""Elements of a row that are copied at once."""


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


def _widened(builder, element, lanes=None):
    """A float32 of an element: itself, or of a bfloat16, kept as uint16, the upper half."""
    if not isinstance(element.type if lanes is None else element.type.element, ir.IntType):
        return element
    word = ir.IntType(32) if lanes is None else ir.VectorType(ir.IntType(32), lanes)
    sixteen = word(16) if lanes is None else word([16] * lanes)
    number = ir.FloatType() if lanes is None else ir.VectorType(ir.FloatType(), lanes)
    return builder.bitcast(builder.shl(builder.zext(element, word), sixteen), number)


def _narrowed(builder, number, is_float, lanes=None):
    """A float32 as an element: itself, or rounded to the nearest bfloat16, ties to even."""
    if is_float:
        return number

    def shaped(kind, value=None):
        if lanes is None:
            return kind if value is None else kind(value)
        vector = ir.VectorType(kind, lanes)
        return vector if value is None else vector([value] * lanes)

    word, half = ir.IntType(32), ir.IntType(16)
    bits = builder.bitcast(number, shaped(word))
    odd = builder.and_(builder.lshr(bits, shaped(word, 16)), shaped(word, 1))
    rounded = builder.lshr(builder.add(builder.add(bits, shaped(word, 0x7FFF)), odd), shaped(word, 16))
    is_nan = builder.fcmp_unordered("uno", number, number)
    return builder.select(is_nan, shaped(half, 0x7FC0), builder.trunc(rounded, shaped(half)))


@intrinsic
def as_float(typing_context, element):
    """An element as float32."""
    return types.float32(element), lambda context, builder, signature, arguments: _widened(builder, arguments[0])


@intrinsic
def as_element(typing_context, number, like):
    """A float32 as an element of the type of `like`."""

    def generate(context, builder, signature, arguments):
        return _narrowed(builder, arguments[0], like == types.float32)

    return like(types.float32, like), generate


def _step_at(context, builder, array_type, array, index):
    """Where `STEP` elements of an array begin, as a pointer to a vector of them."""
    data = context.make_array(array_type)(context, builder, array).data
    kind = ir.FloatType() if array_type.dtype == types.float32 else ir.IntType(16)
    return builder.bitcast(builder.gep(data, [index]), ir.VectorType(kind, STEP).as_pointer())


@intrinsic
def read_step(typing_context, source, source_at, flat, flat_at):
    """Copies `STEP` elements into float32 numbers, in one piece."""

    def generate(context, builder, signature, arguments):
        come_from = _step_at(context, builder, source, arguments[0], arguments[1])
        goes_to = _step_at(context, builder, flat, arguments[2], arguments[3])
        loaded = builder.load(come_from, align=source.dtype.bitwidth // 8)
        builder.store(_widened(builder, loaded, STEP), goes_to, align=4)
        return context.get_dummy_value()

    return types.none(source, types.intp, flat, types.intp), generate


@intrinsic
def write_step(typing_context, flat, flat_at, target, target_at):
    """Copies `STEP` float32 numbers into elements, in one piece."""

    def generate(context, builder, signature, arguments):
        come_from = _step_at(context, builder, flat, arguments[0], arguments[1])
        goes_to = _step_at(context, builder, target, arguments[2], arguments[3])
        stored = _narrowed(builder, builder.load(come_from, align=4), target.dtype == types.float32, STEP)
        builder.store(stored, goes_to, align=target.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.none(flat, types.intp, target, types.intp), generate


@primitive
def table(data, sources):
    """The integers that a kernel is called with. `sources` only makes the kernel close over that number."""
    return carray(data, (64,), np.int64)


@primitive
def floats(address, length):
    """float32 numbers at an address."""
    return carray(_pointer(address), (length,), np.float32)


@primitive
def elements(address, length, element):
    """Elements of a map at an address."""
    return carray(_pointer(address), (length,), element)
