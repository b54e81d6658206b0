"""The kernels of MRLA-base: x + scale * act(norm(sum_s a_s v_s)), each value read where its block has left it.

Tables begin as `blocks` says; entry 8 is the number T of blocks that are asked, this one last. Values come as an array
of T addresses, the block's own last. From entry 10 on come addresses.
"""

from functools import cache
from math import exp, sqrt
from typing import Any

import numpy as np

from .blocks import clear_ends, find_map_gradients, slide
from .compiling import SOURCES, kernel, primitive
from .memory import elements, floats, integers, next_item, reals, table
from .norms import line_of_branch, line_of_update, way_back
from .planes import (
    convolved,
    corner,
    correlated,
    nine,
    nothing,
    padded_length,
    read_x,
    rectified,
    row,
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
def factor_of(t, at, channel, image):
    """What multiplies a plane's update: the scale and DropPath's factor, at entry `at` and behind; 1 for 0."""
    scale = floats(t[at], channel, 1)[0] if t[at] != 0 else np.float32(1)
    return scale * (floats(t[at + 1], image, 1)[0] if t[at + 1] != 0 else np.float32(1))


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
        t, r = table(data, sources), reals(data)
        channels, height, width, heads, chunks, tail, asked = t[2], t[3], t[4], t[5], t[6], t[7] != 0, t[8]
        softmax, rectify, by_batch = t[29] != 0, t[30] != 0, t[31] != 0
        size, per_head, reach = height * width, channels // heads, t[9] // 2
        query_kernel, key_kernel = floats(t[17], 0, t[9]), floats(t[18], 0, t[9])
        values, keys = integers(t[14], asked), integers(t[15], asked)
        slots = min(channels, per_head + 2 * reach)
        ring = np.zeros((slots, padded_length(height, width)), np.float32)
        while True:
            item = next_item(t[0])
            if item >= t[1]:
                break
            image, chunk = item // chunks, item % chunks
            around = floats(t[27], image * (channels + 2 * reach), channels + 2 * reach)
            clear_ends(around, reach)
            first, last = heads * chunk // chunks, heads * (chunk + 1) // chunks
            pooled = max(0, first * per_head - reach)
            for head in range(first, last):
                start, end = head * per_head, (head + 1) * per_head
                for channel in range(pooled, min(channels, end + reach)):
                    at = (image * channels + channel) * size
                    x, s = elements(t[10], at, size, kind, bytes_each), elements(t[11], at, size, kind, bytes_each)
                    alpha, beta = line_of_branch(t, r, 32, channel)
                    summed = read_x(x, s, alpha, beta, height, width, tail, ring[channel % slots])
                    around[reach + channel] = summed / np.float32(size)
                pooled = min(channels, end + reach)
                query = floats(t[16], image * channels + start, per_head)
                slide(around, query_kernel, start, query)
                slide(around, key_kernel, start, floats(keys[asked - 1], image * channels + start, per_head))
                weights = floats(t[26], (image * heads + head) * asked, asked)
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
                        found = floats(t[28], plane * MOMENTS, MOMENTS)
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
                        scale, shift = line_of_update(t, r, 19, channel)
                        numbers = scale, shift, factor_of(t, 24, channel, image)
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
        t, r = table(data, sources), reals(data)
        channels, chunks, tail = t[2], t[6], t[7] != 0
        rectify, size = t[20] != 0, t[3] * t[4]
        while True:
            item = next_item(t[0])
            if item >= t[1]:
                break
            image, chunk = item // chunks, item % chunks
            for channel in range(channels * chunk // chunks, channels * (chunk + 1) // chunks):
                at = (image * channels + channel) * size
                x, s = elements(t[10], at, size, kind, bytes_each), elements(t[11], at, size, kind, bytes_each)
                out = elements(t[12], at, size, kind, bytes_each)
                scale, shift = line_of_update(t, r, 13, channel)
                norm, factor = line_of_branch(t, r, 21, channel), factor_of(t, 18, channel, image)
                follow_stored(x, s, norm, scale, shift, factor, tail, rectify, size, out)

    return base_finish


@primitive
def find_sums(values, weights, plane, gradient, numbers, rectify, size, kind, bytes_each, kept, found, of_values, out):
    """The `SUMS` of one plane, the `VALUE_SUMS` of every value, and y into `out`; `kept` is room for a run of each sum.

    `numbers` are scale and shift of norm(y), the mean of y and the factor behind the activation.
    """
    scale, shift, mean, factor = spread(numbers[0]), spread(numbers[1]), spread(numbers[2]), spread(numbers[3])
    of_z = of_y = of_factor = spread(np.float32(0))
    for at in range(0, VALUE_SUMS * len(weights) * LANES, LANES):
        store(kept, at, of_z)
    for at in range(0, size, LANES):
        inside = lanes(size - at)
        y = as_kept(mixed(values, weights, len(weights), plane, at, size, inside, kind, bytes_each), out)
        store_lanes(out, at, y, inside)
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
    """The `SUMS` and `VALUE_SUMS` of every plane, all that the small gradients are made of, and y for `gradients`."""
    bytes_each = np.dtype(kind).itemsize

    @kernel
    def base_sums(data):
        t, r = table(data, sources), reals(data)
        channels, height, width, heads, chunks, asked = t[2], t[3], t[4], t[5], t[6], t[8]
        rectify, size, per_head = t[23] != 0, height * width, channels // heads
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
                scale, shift = line_of_update(t, r, 13, channel)
                numbers = scale, shift, floats(t[15], channel, 1)[0], factor_of(t, 18, channel, image)
                find_sums(
                    values, weights, plane, g, numbers, rectify, size, kind, bytes_each, kept,
                    floats(t[20], plane * SUMS, SUMS), floats(t[21], plane * VALUE_SUMS * asked, VALUE_SUMS * asked),
                    elements(t[22], plane * size, size, kind, bytes_each),
                )  # fmt: skip

    return base_sums


@primitive
def find_update_gradient(
    y_plane, weights, plane, gradient, numbers, rectify, of_values, of_value, mail, mail_weights, of_update, height,
    width, kind, bytes_each, padded, x_padded, of_taps,
):  # fmt: skip
    """The gradient of y, into `of_update` where that is wanted, and what follows from it.

    The gradient of the block's own value goes into `padded`, that of its taps into `of_taps`; those of earlier values
    where `of_values` names a place. `numbers` are scale and shift of norm(y), the mean of y, the factor behind the
    activation, and incoming, constant and slope, see `gradients`. `mail` is where later blocks have left the gradient
    of their y, and `mail_weights` what they took of this block's value; `of_value` what else reaches that, 0 for
    nothing.
    """
    step, start, size, own = stride(width), corner(width), height * width, len(weights) - 1
    scale, shift, mean, factor = spread(numbers[0]), spread(numbers[1]), spread(numbers[2]), spread(numbers[3])
    incoming, lost, slope = spread(numbers[4]), spread(numbers[5]), spread(numbers[6])
    summed, own_weight = nothing(), spread(weights[own])
    kept = elements(of_update, plane * size, size, kind, bytes_each)
    for j in range(0, width, LANES):
        inside, upper, middle = lanes(width - j), row(x_padded, start + j - step), row(x_padded, start + j)
        for i in range(height):
            at, lower = i * width + j, row(x_padded, start + j + (i + 1) * step)
            fetch(y_plane, at + size)
            fetch(gradient, at + size)
            y, z = load_lanes(y_plane, at, inside), load_lanes(gradient, at, inside) * factor
            if rectify:
                z = where_positive(y * scale + shift, z)
            of_y = chosen(incoming * z - lost - slope * (y - mean), inside)
            here = own_weight * of_y + mixed(
                mail, mail_weights, len(mail_weights), plane, at, size, inside, kind, bytes_each
            )
            if of_value != 0:
                here = here + load_lanes(elements(of_value, plane * size, size, kind, bytes_each), at, inside)
            if of_update != 0:
                store_lanes(kept, at, of_y, inside)
            for block in range(own):
                if of_values[block] != 0:
                    found = spread(weights[block]) * of_y
                    store_lanes(elements(of_values[block], plane * size, size, kind, bytes_each), at, found, inside)
            store(padded, start + i * step + j, here)
            summed = correlated(summed, upper, middle, lower, here)
            upper, middle = middle, lower
    write_nine(summed, of_taps)


@cache
def gradients(kind: Any, sources: int = SOURCES) -> Any:
    """Gradients of x (or of its branch, before its norm), the shortcut and y; of each plane's taps.

    With z the gradient of norm(y), that of y is incoming * z - constant - slope * (y - mean), numbers per channel that
    carry the norm's batch statistics. What the mean of x gets through query and key comes in as `pooled`. Where the
    gradient of x goes, y is at first.
    """
    bytes_each = np.dtype(kind).itemsize

    @kernel
    def base_gradients(data):
        t, r = table(data, sources), reals(data)
        channels, height, width, heads, chunks, tail, asked = t[2], t[3], t[4], t[5], t[6], t[7] != 0, t[8]
        rectify, letters = t[29] != 0, t[33]
        size, per_head = height * width, channels // heads
        of_values, mail = integers(t[15], asked), integers(t[32], 4 * letters)
        x_padded = np.zeros(padded_length(height, width), np.float32)
        padded = np.zeros(padded_length(height, width), np.float32)
        turned = np.empty(9, np.float32)
        maps, mail_weights = np.empty(letters, np.int64), np.empty(letters, np.float32)
        for letter in range(letters):
            maps[letter] = mail[4 * letter]
        while True:
            item = next_item(t[0])
            if item >= t[1]:
                break
            image, chunk = item // chunks, item % chunks
            for channel in range(channels * chunk // chunks, channels * (chunk + 1) // chunks):
                plane, head = image * channels + channel, image * heads + channel // per_head
                x, s, g = (
                    elements(t[10], plane * size, size, kind, bytes_each),
                    elements(t[11], plane * size, size, kind, bytes_each),
                    elements(t[12], plane * size, size, kind, bytes_each),
                )
                of_x, of_s = (
                    elements(t[13], plane * size, size, kind, bytes_each),
                    elements(t[14], plane * size, size, kind, bytes_each),
                )
                for letter in range(letters):
                    taken, blocks, block = mail[4 * letter + 1], mail[4 * letter + 2], mail[4 * letter + 3]
                    mail_weights[letter] = floats(taken, head * blocks + block, 1)[0]
                weights = floats(t[16], head * asked, asked)
                taps, of_taps = floats(t[17], 9 * channel, 9), floats(t[27], 9 * plane, 9)
                scale, shift = line_of_update(t, r, 18, channel)
                alpha, beta = line_of_branch(t, r, 34, channel)
                numbers = (
                    scale, shift, floats(t[20], channel, 1)[0], factor_of(t, 39, channel, image),
                    floats(t[23], channel, 1)[0], floats(t[24], channel, 1)[0], floats(t[25], channel, 1)[0],
                )  # fmt: skip
                read_x(x, s, alpha, beta, height, width, tail, x_padded)
                find_update_gradient(
                    of_x, weights, plane, g, numbers, rectify, of_values, t[30], maps, mail_weights, t[31], height,
                    width, kind, bytes_each, padded, x_padded, of_taps,
                )  # fmt: skip
                for tap in range(9):
                    turned[tap] = taps[8 - tap]
                centre, after = way_back(t, 34, channel, alpha)
                of_maps, of_norm = (
                    (floats(t[26], plane, 1)[0], np.float32(0), centre, after),
                    floats(t[28], 2 * plane, 2),
                )
                find_map_gradients(
                    x_padded, padded, x, s, g, turned, of_maps, height, width, tail, tail, of_x, of_s, of_norm
                )

    return base_gradients
