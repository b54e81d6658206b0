"""The kernels of MRLA-light: x + norm(gate * v + lambda * s), forward and backward.

With `tail` the map that is read is not x but what a residual block adds its shortcut to, and
x = relu(alpha * branch + beta + shortcut) is made on the way, as often as it is needed, and never stored.

A table begins, for every kernel here, with counter, items, channels, height, width, heads, chunks (an item is one chunk
of the heads of one image), tail, has_shortcut, size of query and key; from entry 10 on come the addresses that the
kernel names.
"""

from functools import cache
from math import exp, sqrt
from typing import Any

import numpy as np

from .compiling import SOURCES, kernel, primitive
from .memory import as_element, as_float, elements, floats, next_item, table
from .planes import (
    add_and_rectify,
    convolve,
    correlate,
    fill_gaps,
    flat_length,
    padded_length,
    read_rows,
    total,
    write_rows,
)

MOMENTS = 5
"""Per plane: means of v and s, and the sums of (v - mean)^2, (v - mean)(s - mean) and (s - mean)^2."""

SUMS = 3
"""Per plane: the sums of the gradient g, of g (v - mean of v) and of g (s - mean of s)."""


@primitive
def read_block(x, shortcut, alpha, beta, height, width, tail, has_shortcut, branch, short, padded):
    """Reads one plane of what the mixer gets: the shortcut into `short`, x into `padded`, its branch into `branch`."""
    inner = padded[width + 2 : width + 2 + len(branch)]
    if has_shortcut:
        read_rows(shortcut, height, width, short)
    if tail:
        read_rows(x, height, width, branch)
        add_and_rectify(branch, short, alpha, beta, x[0], inner)
    else:
        read_rows(x, height, width, inner)
    fill_gaps(inner, height, width, np.float32(0))


@primitive
def gate_of(around, query, key, first, last, slid_query, slid_key):
    """The gate of the head of channels `first` to before `last`; `around` has the means with zeros on both sides."""
    width = last - first
    for channel in range(width):
        slid_query[channel] = np.float32(0)
        slid_key[channel] = np.float32(0)
    for step in range(len(query)):
        means = around[first + step : first + step + width]
        for channel in range(width):
            slid_query[channel] += query[step] * means[channel]
            slid_key[channel] += key[step] * means[channel]
    score = np.float32(0)
    for channel in range(width):
        score += slid_query[channel] * slid_key[channel]
    return np.float32(1 / (1 + exp(-score / sqrt(width))))


@cache
def apply(kind: Any, sources: int = SOURCES) -> Any:
    """x + scale * (gate * v + lambda * s) + shift, image by image, each head as soon as its gate is known.

    A head's gate needs the means of its own channels and of a few beside them, so the means run just ahead; the planes
    that were read for them wait in a ring until their head's turn.
    """
    bytes_each = np.dtype(kind).itemsize

    @kernel
    def light_apply(data):
        t = table(data, sources)
        channels, height, width, heads, chunks = t[2], t[3], t[4], t[5], t[6]
        tail, has_shortcut, gates_known = t[7] != 0, t[8] != 0, t[22] != 0
        size, per_head, reach = height * width, channels // heads, t[9] // 2
        whole = channels * size
        taps, decay = floats(t[13], 9 * channels), floats(t[14], channels)
        query, key = floats(t[15], t[9]), floats(t[16], t[9])
        scale, shift, keep = floats(t[17], channels), floats(t[18], channels), floats(t[19], t[1])
        flat = flat_length(height, width)
        slots = 1 if gates_known else min(channels, per_head + 2 * reach)
        ring = np.zeros((slots, padded_length(height, width)), np.float32)
        branch, short = np.zeros(flat, np.float32), np.zeros(flat, np.float32)
        update, scaled = np.empty(flat, np.float32), np.empty(9, np.float32)
        slid_query, slid_key = np.empty(per_head, np.float32), np.empty(per_head, np.float32)
        one, zero = np.float32(1), np.float32(0)
        while True:
            item = next_item(t[0])
            if item >= t[1]:
                break
            image, chunk = item // chunks, item % chunks
            x = elements(t[10] + image * whole * bytes_each, whole, kind)
            s = elements(t[11] + image * whole * bytes_each, whole, kind)
            out = elements(t[12] + image * whole * bytes_each, whole, kind)
            gates = floats(t[20] + image * heads * 4, heads)
            around = floats(t[21] + image * (channels + 2 * reach) * 4, channels + 2 * reach)
            kept = keep[image] if t[19] != 0 else one
            first, last = heads * chunk // chunks, heads * (chunk + 1) // chunks
            pooled = max(0, first * per_head - reach)
            for head in range(first, last):
                start, end = head * per_head, (head + 1) * per_head
                if not gates_known:
                    for channel in range(pooled, min(channels, end + reach)):
                        at, padded = channel * size, ring[channel % slots]
                        read_block(
                            x[at : at + size], s[at : at + size], one, zero,
                            height, width, tail, tail, branch, short, padded,
                        )  # fmt: skip
                        around[reach + channel] = total(padded[width + 2 : width + 2 + flat]) / np.float32(size)
                    pooled = min(channels, end + reach)
                    gates[head] = gate_of(around, query, key, start, end, slid_query, slid_key)
                for channel in range(start, end):
                    at, padded = channel * size, ring[channel % slots]
                    if gates_known:
                        read_block(
                            x[at : at + size], s[at : at + size], one, zero,
                            height, width, tail, has_shortcut, branch, short, padded,
                        )  # fmt: skip
                    elif has_shortcut:
                        read_rows(s[at : at + size], height, width, short)
                    x_plane = padded[width + 2 : width + 2 + flat]
                    factor, constant = kept * scale[channel], kept * shift[channel]
                    for tap in range(9):
                        scaled[tap] = taps[9 * channel + tap] * gates[head] * factor
                    convolve(padded, width + 1, scaled, update)
                    if has_shortcut:
                        along = decay[channel] * factor
                        for q in range(flat):
                            update[q] = x_plane[q] + (update[q] + along * short[q] + constant)
                    else:
                        for q in range(flat):
                            update[q] = x_plane[q] + (update[q] + constant)
                    write_rows(update, height, width, out[at : at + size])

    return light_apply


@cache
def moments(kind: Any, sources: int = SOURCES) -> Any:
    """The mean of x for every plane, and the `MOMENTS` from which mean and variance of any gate * v + lambda * s follow.

    So a norm's batch statistics need neither the gates nor a stored update: one pass over memory gives both.
    """
    bytes_each = np.dtype(kind).itemsize

    @kernel
    def light_moments(data):
        t = table(data, sources)
        channels, height, width, chunks = t[2], t[3], t[4], t[6]
        tail, has_shortcut = t[7] != 0, t[8] != 0
        size = height * width
        taps = floats(t[12], 9 * channels)
        flat = flat_length(height, width)
        padded = np.zeros(padded_length(height, width), np.float32)
        x_plane = padded[width + 2 : width + 2 + flat]
        branch, short, value = np.zeros(flat, np.float32), np.zeros(flat, np.float32), np.empty(flat, np.float32)
        while True:
            item = next_item(t[0])
            if item >= t[1]:
                break
            image, chunk = item // chunks, item % chunks
            for channel in range(channels * chunk // chunks, channels * (chunk + 1) // chunks):
                plane = image * channels + channel
                x = elements(t[10] + plane * size * bytes_each, size, kind)
                s = elements(t[11] + plane * size * bytes_each, size, kind)
                mean, found = floats(t[13] + plane * 4, 1), floats(t[14] + plane * MOMENTS * 4, MOMENTS)
                tap = taps[9 * channel : 9 * channel + 9]
                read_block(
                    x, s, np.float32(1), np.float32(0), height, width, tail, has_shortcut, branch, short, padded
                )
                mean[0] = total(x_plane) / np.float32(size)
                convolve(padded, width + 1, tap, value)
                # Sums around a value near the mean: of the plain squares little would be left after subtraction.
                near_v, near_s = mean[0] * total(tap), np.float32(0)
                if has_shortcut:
                    fill_gaps(short, height, width, np.float32(0))
                    near_s = total(short) / np.float32(size)
                    fill_gaps(short, height, width, near_s)
                fill_gaps(value, height, width, near_v)
                v = vv = vs = ss = np.float32(0)
                for q in range(flat):
                    dv = value[q] - near_v
                    v += dv
                    vv += dv * dv
                if has_shortcut:
                    for q in range(flat):
                        ds = short[q] - near_s
                        vs += (value[q] - near_v) * ds
                        ss += ds * ds
                found[0] = near_v + v / np.float32(size)
                found[1] = near_s
                found[2] = vv - v * v / np.float32(size)
                found[3] = vs
                found[4] = ss

    return light_moments


@cache
def sums(kind: Any, sources: int = SOURCES) -> Any:
    """The `SUMS` of every plane: all that the gradients of gates, lambda and the norm's parameters are made of."""
    bytes_each = np.dtype(kind).itemsize

    @kernel
    def light_sums(data):
        t = table(data, sources)
        channels, height, width, chunks = t[2], t[3], t[4], t[6]
        tail, has_shortcut = t[7] != 0, t[8] != 0
        size = height * width
        taps, alpha, beta = floats(t[13], 9 * channels), floats(t[14], channels), floats(t[15], channels)
        flat = flat_length(height, width)
        padded = np.zeros(padded_length(height, width), np.float32)
        branch, short, value = np.zeros(flat, np.float32), np.zeros(flat, np.float32), np.empty(flat, np.float32)
        gradient = np.zeros(flat, np.float32)
        while True:
            item = next_item(t[0])
            if item >= t[1]:
                break
            image, chunk = item // chunks, item % chunks
            for channel in range(channels * chunk // chunks, channels * (chunk + 1) // chunks):
                plane = image * channels + channel
                x = elements(t[10] + plane * size * bytes_each, size, kind)
                s = elements(t[11] + plane * size * bytes_each, size, kind)
                g = elements(t[12] + plane * size * bytes_each, size, kind)
                known, found = floats(t[16] + plane * MOMENTS * 4, MOMENTS), floats(t[17] + plane * SUMS * 4, SUMS)
                read_block(
                    x, s, alpha[channel], beta[channel], height, width, tail, has_shortcut, branch, short, padded
                )
                read_rows(g, height, width, gradient)
                fill_gaps(gradient, height, width, np.float32(0))
                convolve(padded, width + 1, taps[9 * channel : 9 * channel + 9], value)
                mean_v, mean_s = known[0], known[1]
                of_g = of_v = of_s = np.float32(0)
                for q in range(flat):
                    of_g += gradient[q]
                    of_v += gradient[q] * (value[q] - mean_v)
                if has_shortcut:
                    for q in range(flat):
                        of_s += gradient[q] * (short[q] - mean_s)
                found[0], found[1], found[2] = of_g, of_v, of_s

    return light_sums


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
        t = table(data, sources)
        channels, height, width, heads, chunks = t[2], t[3], t[4], t[5], t[6]
        tail, has_shortcut = t[7] != 0, t[8] != 0
        size, per_head = height * width, channels // heads
        taps, decay = floats(t[15], 9 * channels), floats(t[16], channels)
        alpha, beta, centre, after = (
            floats(t[17], channels), floats(t[18], channels), floats(t[19], channels), floats(t[20], channels),
        )  # fmt: skip
        constant, slope, mean = floats(t[21], channels), floats(t[22], channels), floats(t[23], channels)
        flat, stride = flat_length(height, width), width + 1
        padded = np.zeros(padded_length(height, width), np.float32)
        padded_gradient = np.zeros(padded_length(height, width), np.float32)
        x_plane = padded[width + 2 : width + 2 + flat]
        of_update = padded_gradient[width + 2 : width + 2 + flat]
        branch, short, value = np.zeros(flat, np.float32), np.zeros(flat, np.float32), np.empty(flat, np.float32)
        gradient, of_short, turned = np.zeros(flat, np.float32), np.empty(flat, np.float32), np.empty(9, np.float32)
        while True:
            item = next_item(t[0])
            if item >= t[1]:
                break
            image, chunk = item // chunks, item % chunks
            for channel in range(channels * chunk // chunks, channels * (chunk + 1) // chunks):
                plane = image * channels + channel
                offset = plane * size * bytes_each
                x, s, g = elements(t[10] + offset, size, kind), elements(t[11] + offset, size, kind), elements(t[12] + offset, size, kind)
                dx, ds = elements(t[13] + offset, size, kind), elements(t[14] + offset, size, kind)
                gate = floats(t[24] + image * heads * 4, heads)[channel // per_head]
                incoming, pooled = floats(t[25] + plane * 4, 1)[0], floats(t[26] + plane * 4, 1)[0]
                of_taps, of_norm = floats(t[27] + plane * 9 * 4, 9), floats(t[28] + plane * 2 * 4, 2)
                read_block(
                    x, s, alpha[channel], beta[channel], height, width, tail, has_shortcut, branch, short, padded
                )
                read_rows(g, height, width, gradient)
                convolve(padded, stride, taps[9 * channel : 9 * channel + 9], value)
                factor = decay[channel] if has_shortcut else np.float32(0)
                lost, along, around = constant[channel], slope[channel], mean[channel]
                for q in range(flat):
                    deviation = gate * value[q] + factor * short[q] - around
                    of_update[q] = incoming * gradient[q] - lost - along * deviation
                fill_gaps(of_update, height, width, np.float32(0))
                correlate(padded, stride, of_update, of_taps)
                for tap in range(9):
                    of_taps[tap] *= gate
                    turned[tap] = taps[9 * channel + 8 - tap] * gate
                convolve(padded_gradient, stride, turned, value)
                for q in range(flat):
                    value[q] += gradient[q] + pooled
                if has_shortcut:
                    for q in range(flat):
                        of_short[q] = factor * of_update[q]
                if tail:
                    middle, outer = centre[channel], after[channel]
                    for q in range(flat):
                        value[q] = np.float32(0) if x_plane[q] <= 0 else value[q]
                        of_short[q] += value[q]
                    fill_gaps(value, height, width, np.float32(0))
                    of_g = of_b = np.float32(0)
                    for q in range(flat):
                        of_g += value[q]
                        of_b += value[q] * (branch[q] - middle)
                        value[q] *= outer
                    of_norm[0], of_norm[1] = of_g, of_b
                write_rows(value, height, width, dx)
                if has_shortcut:
                    write_rows(of_short, height, width, ds)

    return light_gradients


@cache
def norm_gradients(kind: Any, sources: int = SOURCES) -> Any:
    """The gradient behind a norm with batch statistics, in place: scale * (g - constant - slope * (branch - mean))."""
    bytes_each = np.dtype(kind).itemsize

    @kernel
    def light_norm_gradients(data):
        t = table(data, sources)
        channels, height, width, chunks = t[2], t[3], t[4], t[6]
        size = height * width
        scale, constant, slope, mean = (
            floats(t[12], channels), floats(t[13], channels), floats(t[14], channels), floats(t[15], channels),
        )  # fmt: skip
        while True:
            item = next_item(t[0])
            if item >= t[1]:
                break
            image, chunk = item // chunks, item % chunks
            for channel in range(channels * chunk // chunks, channels * (chunk + 1) // chunks):
                plane = image * channels + channel
                branch = elements(t[10] + plane * size * bytes_each, size, kind)
                gradient = elements(t[11] + plane * size * bytes_each, size, kind)
                correct(branch, gradient, scale[channel], constant[channel], slope[channel], mean[channel])

    return light_norm_gradients


@primitive
def correct(branch, gradient, scale, constant, slope, mean):
    """One plane of `norm_gradients`."""
    for q in range(len(gradient)):
        deviation = as_float(branch[q]) - mean
        gradient[q] = as_element(scale * (as_float(gradient[q]) - constant - slope * deviation), gradient[q])
