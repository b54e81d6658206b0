"""The kernels of MRLA-light: x + norm(gate * v + lambda * s), forward and backward.

With `tail` the map that is read is not x but what a residual block adds its shortcut to, and
x = relu(alpha * branch + beta + shortcut) is made on the way, as often as it is needed, and never stored.

Tables begin as `blocks` says; entry 8 is whether there is a shortcut to mix in. From entry 10 on come addresses.
"""

from functools import cache
from math import exp, sqrt
from typing import Any

import numpy as np

from .blocks import clear_ends, find_map_gradients, slide
from .compiling import SOURCES, kernel, primitive
from .memory import elements, floats, next_item, reals, table
from .norms import line_of_branch, line_of_update, way_back
from .planes import (
    convolved,
    corner,
    correlated,
    nine,
    nothing,
    padded_length,
    read_x,
    row,
    stride,
    total_of,
    write_nine,
)
from .vectors import LANES, chosen, fetch, lanes, load_lanes, spread, store, store_lanes, total

MOMENTS = 5
"""Per plane: means of v and s, and the sums of (v - mean)^2, (v - mean)(s - mean) and (s - mean)^2."""

SUMS = 3
"""Per plane: the sums of the gradient g, of g (v - mean of v) and of g (s - mean of s)."""


@primitive
def gate_of(around, query, key, first, last, slid_query, slid_key):
    """The gate of the head of channels `first` to before `last`; `around` has the means with zeros on both sides."""
    slide(around, query, first, slid_query)
    slide(around, key, first, slid_key)
    score = np.float32(0)
    for channel in range(last - first):
        score += slid_query[channel] * slid_key[channel]
    return np.float32(1 / (1 + exp(-score / sqrt(last - first))))


@primitive
def mix(padded, x, shortcut, ahead, taps, along, constant, height, width, has_shortcut, out):
    """One plane of x + (the convolution of x with `taps` + along * s + constant); asks for what lies `ahead`."""
    step, start = stride(width), corner(width)
    weights, factor, shift = nine(taps), spread(along), spread(constant)
    for j in range(0, width, LANES):
        inside, upper, middle = lanes(width - j), row(padded, start + j - step), row(padded, start + j)
        for i in range(height):
            at, lower = i * width + j, row(padded, start + j + (i + 1) * step)
            update = convolved(upper, middle, lower, weights) + shift
            fetch(x, at + ahead)
            fetch(shortcut, at + ahead)
            if has_shortcut:
                update = update + factor * load_lanes(shortcut, at, inside)
            store_lanes(out, at, middle[1] + update, inside)
            upper, middle = middle, lower


@cache
def apply(kind: Any, sources: int = SOURCES) -> Any:
    """The output x + scale * (gate * v + lambda * s) + shift, each head as soon as its gate is known.

    A head's gate needs the means of its own channels and of a few beside them, so the means run just ahead; the planes
    that were read for them wait in a ring until their head's turn.
    """
    bytes_each = np.dtype(kind).itemsize

    @kernel
    def light_apply(data):
        t, r = table(data, sources), reals(data)
        channels, height, width, heads, chunks = t[2], t[3], t[4], t[5], t[6]
        tail, has_shortcut, gates_known = t[7] != 0, t[8] != 0, t[25] != 0
        size, per_head, reach = height * width, channels // heads, t[9] // 2
        query, key = floats(t[15], 0, t[9]), floats(t[16], 0, t[9])
        slots = 1 if gates_known else min(channels, per_head + 2 * reach)
        ahead = size if gates_known else size * (per_head + reach)
        ring = np.zeros((slots, padded_length(height, width)), np.float32)
        scaled = np.empty(9, np.float32)
        slid_query, slid_key = np.empty(per_head, np.float32), np.empty(per_head, np.float32)
        one, zero = np.float32(1), np.float32(0)
        while True:
            item = next_item(t[0])
            if item >= t[1]:
                break
            image, chunk = item // chunks, item % chunks
            gates = floats(t[23], image * heads, heads)
            around = floats(t[24], image * (channels + 2 * reach), channels + 2 * reach)
            kept = floats(t[22], image, 1)[0] if t[22] != 0 else one
            if not gates_known:
                clear_ends(around, reach)
            first, last = heads * chunk // chunks, heads * (chunk + 1) // chunks
            pooled = max(0, first * per_head - reach)
            for head in range(first, last):
                start, end = head * per_head, (head + 1) * per_head
                if not gates_known:
                    for channel in range(pooled, min(channels, end + reach)):
                        at = (image * channels + channel) * size
                        x, s = elements(t[10], at, size, kind, bytes_each), elements(t[11], at, size, kind, bytes_each)
                        alpha, beta = line_of_branch(t, r, 26, channel)
                        summed = read_x(x, s, alpha, beta, height, width, tail, ring[channel % slots])
                        around[reach + channel] = summed / np.float32(size)
                    pooled = min(channels, end + reach)
                    gates[head] = gate_of(around, query, key, start, end, slid_query, slid_key)
                for channel in range(start, end):
                    at, padded = (image * channels + channel) * size, ring[channel % slots]
                    x, s = elements(t[10], at, size, kind, bytes_each), elements(t[11], at, size, kind, bytes_each)
                    out = elements(t[12], at, size, kind, bytes_each)
                    if gates_known:
                        alpha, beta = line_of_branch(t, r, 26, channel)
                        read_x(x, s, alpha, beta, height, width, tail, padded)
                    scale, shift = line_of_update(t, r, 17, channel)
                    factor = kept * scale
                    taps = floats(t[13], 9 * channel, 9)
                    for tap in range(9):
                        scaled[tap] = taps[tap] * gates[head] * factor
                    along = floats(t[14], channel, 1)[0] * factor if has_shortcut else zero
                    mix(padded, x, s, ahead, scaled, along, kept * shift, height, width, has_shortcut, out)

    return light_apply


@primitive
def find_moments(padded, x, shortcut, taps, mean, height, width, has_shortcut, found):
    """The `MOMENTS` of one plane."""
    step, start, size = stride(width), corner(width), np.float32(height * width)
    weights, sum_of_taps = nine(taps), np.float32(0)
    for tap in range(9):
        sum_of_taps += taps[tap]
    # Sums around a value near the mean: of the plain squares little would be left after subtraction.
    mean_s = total_of(shortcut, height, width) / size if has_shortcut else np.float32(0)
    near_v, near_s = spread(mean * sum_of_taps), spread(mean_s)
    v = vv = vs = ss = spread(np.float32(0))
    for j in range(0, width, LANES):
        inside, upper, middle = lanes(width - j), row(padded, start + j - step), row(padded, start + j)
        for i in range(height):
            at, lower = i * width + j, row(padded, start + j + (i + 1) * step)
            fetch(x, at + height * width)
            fetch(shortcut, at + height * width)
            dv = chosen(convolved(upper, middle, lower, weights) - near_v, inside)
            upper, middle = middle, lower
            v, vv = v + dv, vv + dv * dv
            if has_shortcut:
                ds = chosen(load_lanes(shortcut, at, inside) - near_s, inside)
                vs, ss = vs + dv * ds, ss + ds * ds
    off = total(v)
    found[0], found[1] = mean * sum_of_taps + off / size, mean_s
    found[2], found[3], found[4] = total(vv) - off * off / size, total(vs), total(ss)


@cache
def moments(kind: Any, sources: int = SOURCES) -> Any:
    """The mean of x for every plane, and `MOMENTS` from which those of any gate * v + lambda * s follow.

    So a norm's batch statistics need neither the gates nor a stored update: one pass over memory gives both.
    """
    bytes_each = np.dtype(kind).itemsize

    @kernel
    def light_moments(data):
        t, r = table(data, sources), reals(data)
        channels, height, width, chunks = t[2], t[3], t[4], t[6]
        tail, has_shortcut = t[7] != 0, t[8] != 0
        size, reach = height * width, t[9] // 2
        padded = np.zeros(padded_length(height, width), np.float32)
        while True:
            item = next_item(t[0])
            if item >= t[1]:
                break
            image, chunk = item // chunks, item % chunks
            around = floats(t[13], image * (channels + 2 * reach), channels + 2 * reach)
            clear_ends(around, reach)
            for channel in range(channels * chunk // chunks, channels * (chunk + 1) // chunks):
                plane = image * channels + channel
                x = elements(t[10], plane * size, size, kind, bytes_each)
                s = elements(t[11], plane * size, size, kind, bytes_each)
                alpha, beta = line_of_branch(t, r, 15, channel)
                mean = read_x(x, s, alpha, beta, height, width, tail, padded) / np.float32(size)
                around[reach + channel] = mean
                taps, found = floats(t[12], 9 * channel, 9), floats(t[14], plane * MOMENTS, MOMENTS)
                find_moments(padded, x, s, taps, mean, height, width, has_shortcut, found)

    return light_moments


@primitive
def find_sums(padded, x, shortcut, gradient, taps, known, height, width, has_shortcut, found):
    """The `SUMS` of one plane."""
    step, start, weights = stride(width), corner(width), nine(taps)
    mean_v, mean_s = spread(known[0]), spread(known[1])
    of_g = of_v = of_s = spread(np.float32(0))
    for j in range(0, width, LANES):
        inside, upper, middle = lanes(width - j), row(padded, start + j - step), row(padded, start + j)
        for i in range(height):
            at, lower = i * width + j, row(padded, start + j + (i + 1) * step)
            g = load_lanes(gradient, at, inside)
            of_g = of_g + g
            fetch(x, at + height * width)
            fetch(shortcut, at + height * width)
            fetch(gradient, at + height * width)
            of_v = of_v + g * (convolved(upper, middle, lower, weights) - mean_v)
            upper, middle = middle, lower
            if has_shortcut:
                of_s = of_s + g * (load_lanes(shortcut, at, inside) - mean_s)
    found[0], found[1], found[2] = total(of_g), total(of_v), total(of_s)


@cache
def sums(kind: Any, sources: int = SOURCES) -> Any:
    """The `SUMS` of every plane: all that the gradients of gates, lambda and the norm's parameters are made of."""
    bytes_each = np.dtype(kind).itemsize

    @kernel
    def light_sums(data):
        t, r = table(data, sources), reals(data)
        channels, height, width, chunks = t[2], t[3], t[4], t[6]
        tail, has_shortcut = t[7] != 0, t[8] != 0
        size = height * width
        padded = np.zeros(padded_length(height, width), np.float32)
        while True:
            item = next_item(t[0])
            if item >= t[1]:
                break
            image, chunk = item // chunks, item % chunks
            for channel in range(channels * chunk // chunks, channels * (chunk + 1) // chunks):
                plane = image * channels + channel
                x = elements(t[10], plane * size, size, kind, bytes_each)
                s = elements(t[11], plane * size, size, kind, bytes_each)
                g = elements(t[12], plane * size, size, kind, bytes_each)
                alpha, beta = line_of_branch(t, r, 16, channel)
                read_x(x, s, alpha, beta, height, width, tail, padded)
                taps, known = floats(t[13], 9 * channel, 9), floats(t[14], plane * MOMENTS, MOMENTS)
                find_sums(padded, x, s, g, taps, known, height, width, has_shortcut, floats(t[15], plane * SUMS, SUMS))

    return light_sums


@primitive
def find_update_gradient(
    padded, shortcut, gradient, taps, decay, numbers, height, width, has_shortcut, of_update, of_taps
):
    """Puts the gradient of y into the padded `of_update` and that of the taps, but for the gate, into `of_taps`.

    `numbers` are gate, incoming, constant, slope and mean, see `gradients`.
    """
    step, start, weights = stride(width), corner(width), nine(taps)
    gate, incoming, lost = spread(numbers[0]), spread(numbers[1]), spread(numbers[2])
    slope, mean, factor = spread(numbers[3]), spread(numbers[4]), spread(decay)
    summed = nothing()
    for j in range(0, width, LANES):
        inside, upper, middle = lanes(width - j), row(padded, start + j - step), row(padded, start + j)
        for i in range(height):
            at, lower = i * width + j, row(padded, start + j + (i + 1) * step)
            deviation = gate * convolved(upper, middle, lower, weights) - mean
            fetch(gradient, at + height * width)
            if has_shortcut:
                deviation = deviation + factor * load_lanes(shortcut, at, inside)
            here = chosen(incoming * load_lanes(gradient, at, inside) - lost - slope * deviation, inside)
            store(of_update, start + i * step + j, here)
            summed = correlated(summed, upper, middle, lower, here)
            upper, middle = middle, lower
    write_nine(summed, of_taps)


@cache
def gradients(kind: Any, sources: int = SOURCES) -> Any:
    """Gradients of x (or of its branch, before its norm) and the shortcut, and what each plane gives to the taps'.

    With the update y = gate * v + lambda * s, the gradient of y is incoming[plane] * g - constant - slope * (y - mean),
    constants per channel that carry the norm's batch statistics. What the mean of x gets through the gates comes in as
    `pooled`, one number a plane.
    """
    bytes_each = np.dtype(kind).itemsize

    @kernel
    def light_gradients(data):
        t, r = table(data, sources), reals(data)
        channels, height, width, heads, chunks = t[2], t[3], t[4], t[5], t[6]
        tail, has_shortcut = t[7] != 0, t[8] != 0
        size, per_head = height * width, channels // heads
        padded = np.zeros(padded_length(height, width), np.float32)
        of_update = np.zeros(padded_length(height, width), np.float32)
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
                taps, of_taps = floats(t[15], 9 * channel, 9), floats(t[23], 9 * plane, 9)
                decay = floats(t[16], channel, 1)[0] if has_shortcut else np.float32(0)
                alpha, beta = line_of_branch(t, r, 25, channel)
                centre, after = way_back(t, 25, channel, alpha)
                gate = floats(t[20], image * heads + channel // per_head, 1)[0]
                of_y = (
                    gate, floats(t[21], plane, 1)[0], floats(t[17], channel, 1)[0], floats(t[18], channel, 1)[0],
                    floats(t[19], channel, 1)[0],
                )  # fmt: skip
                read_x(x, s, alpha, beta, height, width, tail, padded)
                find_update_gradient(padded, s, g, taps, decay, of_y, height, width, has_shortcut, of_update, of_taps)
                for tap in range(9):
                    of_taps[tap] *= gate
                    turned[tap] = taps[8 - tap] * gate
                of_maps, of_norm = (floats(t[22], plane, 1)[0], decay, centre, after), floats(t[24], 2 * plane, 2)
                find_map_gradients(
                    padded, of_update, x, s, g, turned, of_maps, height, width, tail, has_shortcut, of_x, of_s, of_norm
                )

    return light_gradients
