"""Runs of `LANES` numbers that kernels compute with, each in a register: a numba type, its operators, loads and stores.

Numba leaves it to the compiler to find out that a loop may be done so, which it does for a loop over one or two arrays
and not for one over seven. A row is taken in runs; of the last run only the lanes inside the row are read or written.
"""

import operator
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import models, overload, register_model

from .compiling import intrinsic

LANES = 16
"""Numbers in a run: one register of AVX-512, two of AVX2, four of NEON."""

AHEAD = 1024
"""How many elements ahead memory is asked for where one pass is all that is done."""

_FLOATS = ir.VectorType(ir.FloatType(), LANES)
_DOUBLES = ir.VectorType(ir.DoubleType(), LANES)
_BITS = ir.VectorType(ir.IntType(1), LANES)
_WORDS = ir.VectorType(ir.IntType(32), LANES)
_HALVES = ir.VectorType(ir.IntType(16), LANES)
_LOOSE = ("reassoc", "contract", "nsz")


class _Run(types.Type):
    """`LANES` float32 numbers."""

    def __init__(self):
        super().__init__(name="mrla.Run")


class _Mask(types.Type):
    """Which lanes of a run count."""

    def __init__(self):
        super().__init__(name="mrla.Mask")


class _Sum(types.Type):
    """`LANES` float64 numbers, for sums whose rounding may not show."""

    def __init__(self):
        super().__init__(name="mrla.Sum")


run, mask, wide = _Run(), _Mask(), _Sum()


@register_model(_Run)
class _RunModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any):
        super().__init__(manager, kind, _FLOATS)


@register_model(_Mask)
class _MaskModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any):
        super().__init__(manager, kind, _BITS)


@register_model(_Sum)
class _SumModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any):
        super().__init__(manager, kind, _DOUBLES)


def _splat(builder: Any, number: Any) -> Any:
    kind = ir.VectorType(number.type, LANES)
    first = builder.insert_element(ir.Constant(kind, ir.Undefined), number, ir.IntType(32)(0))
    return builder.shuffle_vector(first, ir.Constant(kind, ir.Undefined), _WORDS([0] * LANES))


@intrinsic
def lanes(typing_context, count):
    """The mask of the first `count` lanes; all of them where there are more."""

    def generate(context, builder, signature, arguments):
        count = builder.trunc(arguments[0], ir.IntType(32))
        return builder.icmp_signed("<", _WORDS(list(range(LANES))), _splat(builder, count))

    return mask(types.int64), generate


@intrinsic
def spread(typing_context, number):
    """The same number in all lanes."""
    return run(types.float32), lambda context, builder, signature, arguments: _splat(builder, arguments[0])


def _widened(builder: Any, found: Any, is_float: bool) -> Any:
    """float32 numbers of a map's elements: themselves, or of bfloat16, kept as uint16, the upper halves."""
    if is_float:
        return found
    return builder.bitcast(builder.shl(builder.zext(found, _WORDS), _WORDS([16] * LANES)), _FLOATS)


def _narrowed(builder: Any, numbers: Any, is_float: bool) -> Any:
    """A map's elements of float32 numbers: themselves, or rounded to the nearest bfloat16, ties to even."""
    if is_float:
        return numbers
    bits = builder.bitcast(numbers, _WORDS)
    odd = builder.and_(builder.lshr(bits, _WORDS([16] * LANES)), _WORDS([1] * LANES))
    rounded = builder.lshr(builder.add(builder.add(bits, _WORDS([0x7FFF] * LANES)), odd), _WORDS([16] * LANES))
    is_nan = builder.fcmp_unordered("uno", numbers, numbers)
    return builder.select(is_nan, _HALVES([0x7FC0] * LANES), builder.trunc(rounded, _HALVES))


def _place(context: Any, builder: Any, kind: Any, array: Any, index: Any) -> tuple[Any, Any, bool]:
    """Where a run begins in an array, as a pointer; the kind of its lanes; whether they are float32."""
    data = context.make_array(kind)(context, builder, array).data
    is_float = kind.dtype == types.float32
    vector = _FLOATS if is_float else _HALVES
    return builder.bitcast(builder.gep(data, [index]), vector.as_pointer()), vector, is_float


@intrinsic
def load(typing_context, array, at):
    """A run of an array of float32, from `at` on."""

    def generate(context, builder, signature, arguments):
        place, _, _ = _place(context, builder, array, *arguments)
        return builder.load(place, align=4)

    return run(array, types.intp), generate


@intrinsic
def store(typing_context, array, at, numbers):
    """Writes a run into an array of float32."""

    def generate(context, builder, signature, arguments):
        place, _, _ = _place(context, builder, array, *arguments[:2])
        builder.store(arguments[2], place, align=4)
        return context.get_dummy_value()

    return types.none(array, types.intp, run), generate


@intrinsic
def load_lanes(typing_context, array, at, chosen):
    """The chosen lanes of a run of a map's elements, as float32; zero in the others, which are not read."""

    def generate(context, builder, signature, arguments):
        place, vector, is_float = _place(context, builder, array, *arguments[:2])
        suffix = f"v{LANES}{'f32' if is_float else 'i16'}"
        kind = ir.FunctionType(vector, [place.type, ir.IntType(32), _BITS, vector])
        read = cgutils.get_or_insert_function(builder.module, kind, f"llvm.masked.load.{suffix}.p0")
        size = ir.IntType(32)(4 if is_float else 2)
        found = builder.call(read, [place, size, arguments[2], ir.Constant(vector, [0] * LANES)])
        return _widened(builder, found, is_float)

    return run(array, types.intp, mask), generate


@intrinsic
def store_lanes(typing_context, array, at, numbers, chosen):
    """Writes the chosen lanes of a run as a map's elements."""

    def generate(context, builder, signature, arguments):
        place, vector, is_float = _place(context, builder, array, *arguments[:2])
        suffix = f"v{LANES}{'f32' if is_float else 'i16'}"
        kind = ir.FunctionType(ir.VoidType(), [vector, place.type, ir.IntType(32), _BITS])
        write = cgutils.get_or_insert_function(builder.module, kind, f"llvm.masked.store.{suffix}.p0")
        size = ir.IntType(32)(4 if is_float else 2)
        builder.call(write, [_narrowed(builder, arguments[2], is_float), place, size, arguments[3]])
        return context.get_dummy_value()

    return types.none(array, types.intp, run, mask), generate


@intrinsic
def fetch(typing_context, array, at):
    """Has memory bring the run from `at` on nearer, also where that lies behind the array: the next plane."""

    def generate(context, builder, signature, arguments):
        place, _, _ = _place(context, builder, array, *arguments)
        word = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [place.type, word, word, word])
        bring = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(bring, [place, word(0), word(2), word(1)])
        return context.get_dummy_value()

    return types.none(array, types.intp), generate


@intrinsic
def as_stored(typing_context, numbers, array):
    """What would be read back, had the numbers been written into a map like `array`."""

    def generate(context, builder, signature, arguments):
        is_float = array.dtype == types.float32
        return _widened(builder, _narrowed(builder, arguments[0], is_float), is_float)

    return run(run, array), generate


@intrinsic
def chosen(typing_context, numbers, where):
    """The numbers in the lanes of a mask, zero in the others."""

    def generate(context, builder, signature, arguments):
        return builder.select(arguments[1], arguments[0], _FLOATS([0.0] * LANES))

    return run(run, mask), generate


@intrinsic
def where_positive(typing_context, deciding, numbers):
    """The numbers where `deciding` is above zero or not a number, zero elsewhere: a ReLU and its gradient."""

    def generate(context, builder, signature, arguments):
        zero = _FLOATS([0.0] * LANES)
        return builder.select(builder.fcmp_ordered("<=", arguments[0], zero), zero, arguments[1])

    return run(run, run), generate


@intrinsic
def total(typing_context, numbers):
    """The sum over lanes."""

    def generate(context, builder, signature, arguments):
        kind = ir.FunctionType(ir.FloatType(), [ir.FloatType(), _FLOATS])
        add = cgutils.get_or_insert_function(builder.module, kind, f"llvm.vector.reduce.fadd.v{LANES}f32")
        return builder.call(add, [ir.FloatType()(0.0), arguments[0]], fastmath=_LOOSE)

    return types.float32(run), generate


@intrinsic
def no_sum(typing_context):
    """A sum of nothing in float64."""
    return wide(), lambda context, builder, signature, arguments: _DOUBLES([0.0] * LANES)


@intrinsic
def summed_with(typing_context, summed, numbers):
    """A sum in float64 and a run that is added to it."""

    def generate(context, builder, signature, arguments):
        return builder.fadd(arguments[0], builder.fpext(arguments[1], _DOUBLES), flags=_LOOSE)

    return wide(wide, run), generate


@intrinsic
def exact_total(typing_context, summed):
    """The sum over lanes, in float64."""

    def generate(context, builder, signature, arguments):
        kind = ir.FunctionType(ir.DoubleType(), [ir.DoubleType(), _DOUBLES])
        add = cgutils.get_or_insert_function(builder.module, kind, f"llvm.vector.reduce.fadd.v{LANES}f64")
        return builder.call(add, [ir.DoubleType()(0.0), arguments[0]], fastmath=_LOOSE)

    return types.float64(wide), generate


@intrinsic
def scaled_and_shifted(typing_context, numbers, scale, shift):
    """A product and a sum, numbers * scale + shift, rounded once."""

    def generate(context, builder, signature, arguments):
        kind = ir.FunctionType(_FLOATS, [_FLOATS, _FLOATS, _FLOATS])
        join = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fma.v{LANES}f32")
        return builder.call(join, arguments)

    return run(run, run, run), generate


@intrinsic
def added_alone(typing_context, left, right):
    """A sum; in an `exact` function neither joined with products before it nor with sums behind it."""
    return run(run, run), lambda context, builder, signature, arguments: builder.fadd(*arguments)


def _define(symbol: Any, instruction: str) -> None:
    @intrinsic
    def combine(typing_context, left, right):
        def generate(context, builder, signature, arguments):
            return getattr(builder, instruction)(*arguments, flags=_LOOSE)

        return run(run, run), generate

    @overload(symbol)
    def combined(left, right):
        if left is run and right is run:
            return lambda left, right: combine(left, right)


for _symbol, _instruction in ((operator.add, "fadd"), (operator.sub, "fsub"), (operator.mul, "fmul")):
    _define(_symbol, _instruction)
