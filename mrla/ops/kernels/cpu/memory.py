"""What a kernel does with the addresses it is called with: arrays, records and planes, and the channels of an item."""

from typing import NamedTuple

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
def _record_pointer(typing_context, address, index, dtype):
    record = dtype.dtype

    def generate(context, builder, signature, arguments):
        size = ir.Constant(ir.IntType(64), record.size)
        place = builder.add(arguments[0], builder.mul(arguments[1], size))
        return builder.inttoptr(place, context.get_value_type(signature.return_type))

    return types.CPointer(record)(types.int64, types.int64, dtype), generate


@intrinsic
def _elements_pointer(typing_context, call, address, index):
    """The type of elements is that of the call's field `element`, see `records.Record`."""
    element = call.types[call.fields.index("element")]

    def generate(context, builder, signature, arguments):
        size = ir.Constant(ir.IntType(64), element.bitwidth // 8)
        place = builder.add(arguments[1], builder.mul(arguments[2], size))
        return builder.inttoptr(place, context.get_value_type(signature.return_type))

    return types.CPointer(element)(call, types.int64, types.int64), generate


@primitive
def floats(address, at, length):
    """So many float32 numbers from the one numbered `at` on, of those at an address."""
    return carray(_pointer(address + 4 * at), (length,), np.float32)


@primitive
def number_at(address, at):
    """One of the float32 numbers at an address."""
    return floats(address, at, 1)[0]


@primitive
def number_or(address, at, otherwise):
    """The same; where there is no address, the other number."""
    return floats(address, at, 1)[0] if address != 0 else np.float32(otherwise)


@primitive
def put_number(address, at, number):
    """Writes one of the float32 numbers at an address."""
    floats(address, at, 1)[0] = number


@primitive
def integers(address, length):
    """The integers at an address."""
    return carray(_pointer(address), (length,), np.int64)


@primitive
def records(address, at, length, dtype):
    """So many records from the one numbered `at` on, of those at an address."""
    return carray(_record_pointer(address, at, dtype), (length,))


@primitive
def record_at(address, at, dtype):
    """One of the records at an address."""
    return records(address, at, 1, dtype)[0]


class Plane(NamedTuple):
    """One channel of one image.

    Attributes:
        number: Its place among all planes of a map.
        image: Which image.
        channel: Which channel.
        height: Rows.
        width: Columns.
        size: Pixels.
    """

    number: int
    image: int
    channel: int
    height: int
    width: int
    size: int


@primitive
def plane_at(call, image, channel):
    """A plane of the maps of a call."""
    size = call.height * call.width
    return Plane(image * call.channels + channel, image, channel, call.height, call.width, size)


@primitive
def elements(call, address, plane):
    """A plane's elements in the map at an address."""
    return carray(_elements_pointer(call, address, plane.number * plane.size), (plane.size,))


@primitive
def channels_of(call, item):
    """Image, first channel and the one behind the last of an item, one of the chunks of an image's channels."""
    image, chunk = item // call.chunks, item % call.chunks
    return image, call.channels * chunk // call.chunks, call.channels * (chunk + 1) // call.chunks


@primitive
def channels_of_part(call, part):
    """The first channel and the one behind the last of one of the parts of the channels."""
    return call.channels * part // call.parts, call.channels * (part + 1) // call.parts
