"""The kernels of MRLA-base: x + scale * act(norm(sum_s a_s v_s)), each value read where its block has left it.

Tables begin as `blocks` says; entry 8 is the number T of blocks that are asked, this one last. Values come as an array
of T addresses, the block's own last. From entry 10 on come addresses.
"""

from functools import cache
from math import exp, sqrt
from typing import Any

import numpy as np

from .blocks import find_map_gradients, slide
from .compiling import SOURCES, kernel, primitive
from .memory import elements, floats, integers, next_item, table
from .planes import (
    convolved,
    corner,
    correlated,
    nine,
    norm_of,
    nothing,
    padded_length,
    read_x,
    row,
    rectified,
    stride,
    write_nine,
)
from .vectors import (
    AHEAD,
    LANES,
    as_kept,
    chosen,
    fetch,
    lanes,
    load,
    load_lanes,
    spread,
    store,
    store_lanes,
    total,
    where_positive,
)

MOMENTS = 2
"""Per plane: the mean of y and the sum of (y - mean)^2."""

SUMS = 3
"""Per plane: the sums of z, of z (y - mean) and of g act(norm(y)), where z is the gradient of norm(y)."""

VALUE_SUMS = 3
"""Per plane and value: the sums of v, of z v and of (y - mean) v."""


@primitive
def weigh(query, keys, at, asked, softmax, weights):
    """What one head takes from each block; `at` is where the head's channels are in every key."""
    most = np.float32(-np.inf)
    for block in range(asked):
        key = floats(keys[block], at, len(query))
        score = np.float32(0)
        for channel in range(len(query)):
            score += query[channel] * key[channel]
        weights[block] = score / np.float32(sqrt(len(query)))
        most = max(most, weights[block])
    summed = np.float32(0)
    for block in range(asked):
        weights[block] = exp(weights[block] - most) if softmax else 1 / (1 + exp(-weights[block]))
        summed += weights[block]
    if softmax:
        for block in range(asked):
            weights[block] /= summed


@primitive
def mixed(values, weights, count, plane, at, size, inside, kind, bytes_each):
    """A run of sum_s a_s v_s over the first `count` blocks; asks for the next plane of each value on the way."""
    summed = spread(np.float32(0))
    for block in range(count):
        value = elements(values[block], plane * size, size, kind, bytes_each)
        fetch(value, at + size)
        summed = summed + spread(weights[block]) * load_lanes(value, at, inside)
    return summed


@primitive
def follow(
    padded,
    x,
    shortcut,
    ahead,
    taps,
    values,
    weights,
    plane,
    numbers,
    rectify,
    height,
    width,
    kind,
    bytes_each,
    kept,
    out,
):
    """One plane of the block's own value, where it is kept, and of x + factor * act(scale * y + shift).

    `numbers` are scale, shift and factor.
    """
    step, start, kernel_weights, own = stride(width), corner(width), nine(taps), len(weights) - 1
    scale, shift, factor, own_weight = spread(numbers[0]), spread(numbers[1]), spread(numbers[2]), spread(weights[own])
    value = elements(values[own], plane * height * width, height * width, kind, bytes_each)
    for j in range(0, width, LANES):
        inside, upper, middle = lanes(width - j), row(padded, start + j - step), row(padded, start + j)
        for i in range(height):
            at, lower = i * width + j, row(padded, start + j + (i + 1) * step)
            fetch(x, at + ahead)
            fetch(shortcut, at + ahead)
            mine = as_kept(convolved(upper, middle, lower, kernel_weights), x)
            if kept:
                store_lanes(value, at, mine, inside)
            y = mixed(values, weights, own, plane, at, height * width, inside, kind, bytes_each) + own_weight * mine
            update = y * scale + shift
            if rectify:
                update = where_positive(update, update)
            store_lanes(out, at, middle[1] + factor * update, inside)
            upper, middle = middle, lower


@primitive
def collect(padded, x, shortcut, ahead, taps, values, weights, plane, height, width, kind, bytes_each, out, found):
    """One plane of the block's own value and of y, and the `MOMENTS` of y."""
    step, start, kernel_weights, own = stride(width), corner(width), nine(taps), len(weights) - 1
    own_weight, size = spread(weights[own]), height * width
    value = elements(values[own], plane * size, size, kind, bytes_each)
    near = off = square = spread(np.float32(0))
    for j in range(0, width, LANES):
        inside, upper, middle = lanes(width - j), row(padded, start + j - step), row(padded, start + j)
        for i in range(height):
            at, lower = i * width + j, row(padded, start + j + (i + 1) * step)
            fetch(x, at + ahead)
            fetch(shortcut, at + ahead)
            mine = as_kept(convolved(upper, middle, lower, kernel_weights), x)
            upper, middle = middle, lower
            store_lanes(value, at, mine, inside)
            y = mixed(values, weights, own, plane, at, size, inside, kind, bytes_each) + own_weight * mine
            store_lanes(out, at, y, inside)
            if at == 0:
                # Sums around a value of the plane: of the plain squares little would be left after subtraction.
                near = spread(total(chosen(y, lanes(1))))
            deviation = chosen(y - near, inside)
            off, square = off + deviation, square + deviation * deviation
    summed = total(off)
    found[0] = total(chosen(near, lanes(1))) + summed / np.float32(size)
    found[1] = total(square) - summed * summed / np.float32(size)


@cache
def apply(kind: Any, sources: int = SOURCES) -> Any:
    """The block's value, its key and query, what it takes from each block, and the output.

    Where the norm goes by its batch, the output is y, not yet normed, with its `MOMENTS`; `finish` does the rest.
    """
    bytes_each = np.dtype(kind).itemsize

    @kernel
    def base_apply(data):
        t = table(data, sources)
        channels, height, width, heads, chunks, tail, asked = t[2], t[3], t[4], t[5], t[6], t[7] != 0, t[8]
        softmax, rectify, by_batch = t[26] != 0, t[27] != 0, t[28] != 0
        size, per_head, reach = height * width, channels // heads, t[9] // 2
        query_kernel, key_kernel = floats(t[17], 0, t[9]), floats(t[18], 0, t[9])
        values, keys = integers(t[14], asked), integers(t[15], asked)
        slots = min(channels, per_head + 2 * reach)
        ring = np.zeros((slots, padded_length(height, width)), np.float32)
        one = np.float32(1)
        while True:
            item = next_item(t[0])
            if item >= t[1]:
                break
            image, chunk = item // chunks, item % chunks
            around = floats(t[24], image * (channels + 2 * reach), channels + 2 * reach)
            kept = floats(t[22], image, 1)[0] if t[22] != 0 else one
            first, last = heads * chunk // chunks, heads * (chunk + 1) // chunks
            pooled = max(0, first * per_head - reach)
            for head in range(first, last):
                start, end = head * per_head, (head + 1) * per_head
                for channel in range(pooled, min(channels, end + reach)):
                    at = (image * channels + channel) * size
                    x, s = elements(t[10], at, size, kind, bytes_each), elements(t[11], at, size, kind, bytes_each)
                    alpha, beta = norm_of(t[29], t[30], channel, tail)
                    summed = read_x(x, s, alpha, beta, height, width, tail, ring[channel % slots])
                    around[reach + channel] = summed / np.float32(size)
                pooled = min(channels, end + reach)
                query = floats(t[16], image * channels + start, per_head)
                slide(around, query_kernel, start, query)
                slide(around, key_kernel, start, floats(keys[asked - 1], image * channels + start, per_head))
                weights = floats(t[23], (image * heads + head) * asked, asked)
                weigh(query, keys, image * channels + start, asked, softmax, weights)
                for channel in range(start, end):
                    plane, padded = image * channels + channel, ring[channel % slots]
                    x, s = (
                        elements(t[10], plane * size, size, kind, bytes_each),
                        elements(t[11], plane * size, size, kind, bytes_each),
                    )
                    out = elements(t[12], plane * size, size, kind, bytes_each)
                    taps, ahead = floats(t[13], 9 * channel, 9), size * (per_head + reach)
                    if by_batch:
                        found = floats(t[25], plane * MOMENTS, MOMENTS)
                        collect(
                            padded,
                            x,
                            s,
                            ahead,
                            taps,
                            values,
                            weights,
                            plane,
                            height,
                            width,
                            kind,
                            bytes_each,
                            out,
                            found,
                        )
                    else:
                        factor = kept * floats(t[21], channel, 1)[0]
                        numbers = floats(t[19], channel, 1)[0], floats(t[20], channel, 1)[0], factor
                        follow(
                            padded, x, s, ahead, taps, values, weights, plane, numbers, rectify, height, width, kind,
                            bytes_each, values[asked - 1] != 0, out,
                        )  # fmt: skip

    return base_apply


@primitive
def follow_stored(x, shortcut, norm, scale, shift, factor, tail, rectify, size, out):
    """One plane of `finish`."""
    scales, shifts, factors = spread(scale), spread(shift), spread(factor)
    alpha, beta = spread(norm[0]), spread(norm[1])
    for at in range(0, size, LANES):
        inside = lanes(size - at)
        fetch(x, at + AHEAD)
        fetch(out, at + AHEAD)
        found = load_lanes(x, at, inside)
        if tail:
            fetch(shortcut, at + AHEAD)
            found = rectified(found, load_lanes(shortcut, at, inside), alpha, beta, x)
        update = load_lanes(out, at, inside) * scales + shifts
        if rectify:
            update = where_positive(update, update)
        store_lanes(out, at, found + factors * update, inside)


@cache
def finish(kind: Any, sources: int = SOURCES) -> Any:
    """The output x + factor * act(scale * y + shift), where the output holds y."""
    bytes_each = np.dtype(kind).itemsize

    @kernel
    def base_finish(data):
        t = table(data, sources)
        channels, chunks, tail = t[2], t[6], t[7] != 0
        rectify, size = t[17] != 0, t[3] * t[4]
        while True:
            item = next_item(t[0])
            if item >= t[1]:
                break
            image, chunk = item // chunks, item % chunks
            kept = floats(t[16], image, 1)[0] if t[16] != 0 else np.float32(1)
            for channel in range(channels * chunk // chunks, channels * (chunk + 1) // chunks):
                at = (image * channels + channel) * size
                x, s = elements(t[10], at, size, kind, bytes_each), elements(t[11], at, size, kind, bytes_each)
                out = elements(t[12], at, size, kind, bytes_each)
                scale, shift = floats(t[13], channel, 1)[0], floats(t[14], channel, 1)[0]
                norm, factor = norm_of(t[18], t[19], channel, tail), kept * floats(t[15], channel, 1)[0]
                follow_stored(x, s, norm, scale, shift, factor, tail, rectify, size, out)

    return base_finish


@primitive
def find_sums(values, weights, plane, gradient, numbers, rectify, size, kind, bytes_each, kept, found, of_values):
    """The `SUMS` of one plane, and the `VALUE_SUMS` of every value; `kept` is room for a run of each sum.

    `numbers` are scale and shift of norm(y), the mean of y and the factor behind the activation.
    """
    scale, shift, mean, factor = spread(numbers[0]), spread(numbers[1]), spread(numbers[2]), spread(numbers[3])
    of_z = of_y = of_factor = spread(np.float32(0))
    for at in range(0, VALUE_SUMS * len(weights) * LANES, LANES):
        store(kept, at, of_z)
    for at in range(0, size, LANES):
        inside = lanes(size - at)
        y = mixed(values, weights, len(weights), plane, at, size, inside, kind, bytes_each)
        fetch(gradient, at + size)
        g, normed, deviation = load_lanes(gradient, at, inside), y * scale + shift, chosen(y - mean, inside)
        z = g * factor
        if rectify:
            of_factor = of_factor + g * where_positive(normed, normed)
            z = where_positive(normed, z)
        else:
            of_factor = of_factor + g * normed
        of_z, of_y = of_z + z, of_y + z * deviation
        for block in range(len(weights)):
            value = load_lanes(elements(values[block], plane * size, size, kind, bytes_each), at, inside)
            room = VALUE_SUMS * block * LANES
            store(kept, room, load(kept, room) + value)
            store(kept, room + LANES, load(kept, room + LANES) + value * z)
            store(kept, room + 2 * LANES, load(kept, room + 2 * LANES) + value * deviation)
    found[0], found[1], found[2] = total(of_z), total(of_y), total(of_factor)
    for number in range(VALUE_SUMS * len(weights)):
        of_values[number] = total(load(kept, number * LANES))


@cache
def sums(kind: Any, sources: int = SOURCES) -> Any:
    """The `SUMS` and `VALUE_SUMS` of every plane: all that the small gradients are made of."""
    bytes_each = np.dtype(kind).itemsize

    @kernel
    def base_sums(data):
        t = table(data, sources)
        channels, height, width, heads, chunks, asked = t[2], t[3], t[4], t[5], t[6], t[8]
        rectify, size, per_head = t[18] != 0, height * width, channels // heads
        values = integers(t[10], asked)
        kept = np.empty(VALUE_SUMS * asked * LANES, np.float32)
        while True:
            item = next_item(t[0])
            if item >= t[1]:
                break
            image, chunk = item // chunks, item % chunks
            for channel in range(channels * chunk // chunks, channels * (chunk + 1) // chunks):
                plane = image * channels + channel
                g = elements(t[11], plane * size, size, kind, bytes_each)
                weights = floats(t[12], (image * heads + channel // per_head) * asked, asked)
                numbers = (
                    floats(t[13], channel, 1)[0], floats(t[14], channel, 1)[0], floats(t[15], channel, 1)[0],
                    floats(t[16], plane, 1)[0],
                )  # fmt: skip
                find_sums(
                    values, weights, plane, g, numbers, rectify, size, kind, bytes_each, kept,
                    floats(t[17], plane * SUMS, SUMS), floats(t[19], plane * VALUE_SUMS * asked, VALUE_SUMS * asked),
                )  # fmt: skip

    return base_sums


@primitive
def find_value_gradients(
    values, weights, plane, gradient, numbers, rectify, of_values, later, height, width, kind, bytes_each, padded,
    x_padded, of_taps,
):  # fmt: skip
    """Writes the gradients of the earlier values, puts that of the block's own into `padded`, those of its taps beside.

    `numbers` are scale and shift of norm(y), the mean of y, the factor behind the activation, and incoming, constant
    and slope, see `gradients`. `later` is where later blocks have left what they give to each value, 0 for nothing; it
    may be the place that `of_values` names.
    """
    step, start, size, own = stride(width), corner(width), height * width, len(weights) - 1
    scale, shift, mean, factor = spread(numbers[0]), spread(numbers[1]), spread(numbers[2]), spread(numbers[3])
    incoming, lost, slope = spread(numbers[4]), spread(numbers[5]), spread(numbers[6])
    summed = nothing()
    for j in range(0, width, LANES):
        inside, upper, middle = lanes(width - j), row(x_padded, start + j - step), row(x_padded, start + j)
        for i in range(height):
            at, lower = i * width + j, row(x_padded, start + j + (i + 1) * step)
            y = mixed(values, weights, len(weights), plane, at, size, inside, kind, bytes_each)
            fetch(gradient, at + size)
            z = load_lanes(gradient, at, inside) * factor
            if rectify:
                z = where_positive(y * scale + shift, z)
            of_y = chosen(incoming * z - lost - slope * (y - mean), inside)
            here = of_y
            for block in range(own + 1):
                here = spread(weights[block]) * of_y
                if later[block] != 0:
                    given = elements(later[block], plane * size, size, kind, bytes_each)
                    fetch(given, at + size)
                    here = here + load_lanes(given, at, inside)
                if block < own:
                    store_lanes(elements(of_values[block], plane * size, size, kind, bytes_each), at, here, inside)
            store(padded, start + i * step + j, here)
            summed = correlated(summed, upper, middle, lower, here)
            upper, middle = middle, lower
    write_nine(summed, of_taps)


@cache
def gradients(kind: Any, sources: int = SOURCES) -> Any:
    """Gradients of x (or of its branch, before its norm), the shortcut and the earlier values; of each plane's taps.

    With z the gradient of norm(y), that of y is incoming * z - constant - slope * (y - mean), numbers per channel that
    carry the norm's batch statistics. What the mean of x gets through query and key comes in as `pooled`.
    """
    bytes_each = np.dtype(kind).itemsize

    @kernel
    def base_gradients(data):
        t = table(data, sources)
        channels, height, width, heads, chunks, tail, asked = t[2], t[3], t[4], t[5], t[6], t[7] != 0, t[8]
        rectify, later = t[33] != 0, integers(t[34], asked)
        size, per_head = height * width, channels // heads
        values, of_values = integers(t[15], asked), integers(t[16], asked)
        x_padded = np.zeros(padded_length(height, width), np.float32)
        padded = np.zeros(padded_length(height, width), np.float32)
        turned = np.empty(9, np.float32)
        while True:
            item = next_item(t[0])
            if item >= t[1]:
                break
            image, chunk = item // chunks, item % chunks
            for channel in range(channels * chunk // chunks, channels * (chunk + 1) // chunks):
                plane = image * channels + channel
                x, s, g = (
                    elements(t[10], plane * size, size, kind, bytes_each),
                    elements(t[11], plane * size, size, kind, bytes_each),
                    elements(t[12], plane * size, size, kind, bytes_each),
                )
                of_x, of_s = (
                    elements(t[13], plane * size, size, kind, bytes_each),
                    elements(t[14], plane * size, size, kind, bytes_each),
                )
                weights = floats(t[17], (image * heads + channel // per_head) * asked, asked)
                taps, of_taps = floats(t[18], 9 * channel, 9), floats(t[31], 9 * plane, 9)
                alpha, beta = norm_of(t[19], t[20], channel, tail)
                centre, after = floats(t[21], channel, 1)[0], floats(t[22], channel, 1)[0]
                numbers = (
                    floats(t[23], channel, 1)[0], floats(t[24], channel, 1)[0], floats(t[25], channel, 1)[0],
                    floats(t[26], plane, 1)[0], floats(t[27], channel, 1)[0], floats(t[28], channel, 1)[0],
                    floats(t[29], channel, 1)[0],
                )  # fmt: skip
                read_x(x, s, alpha, beta, height, width, tail, x_padded)
                find_value_gradients(
                    values, weights, plane, g, numbers, rectify, of_values, later, height, width, kind, bytes_each,
                    padded, x_padded, of_taps,
                )  # fmt: skip
                for tap in range(9):
                    turned[tap] = taps[8 - tap]
                of_norm = floats(t[32], 2 * plane, 2)
                of_maps = floats(t[30], plane, 1)[0], np.float32(0), centre, after
                find_map_gradients(
                    x_padded, padded, x, s, g, turned, of_maps, height, width, tail, tail, of_x, of_s, of_norm
                )

    return base_gradients
