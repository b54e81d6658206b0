"""What stands between MRLA-light's passes over maps: some numbers for each plane, in float64 where they are subtracted.

Tables hold counter, items, images, channels, pixels, heads, size of query and key, parts; from entry 8 on addresses. An
item is an image, or one of the parts that the channels are cut into.
"""

from functools import cache
from math import sqrt
from typing import Any

import numpy as np

from .blocks import slide, slide_back
from .compiling import SOURCES, kernel
from .light import MOMENTS, SUMS, gate_of
from .memory import floats, next_item, reals, table


@cache
def gates(sources: int = SOURCES) -> Any:
    """The gates of every image, from the means with zeros on both sides."""

    @kernel
    def light_gates(data):
        t = table(data, sources)
        channels, heads, reach = t[3], t[5], t[6] // 2
        per_head = channels // heads
        slid_query, slid_key = np.empty(per_head, np.float32), np.empty(per_head, np.float32)
        query, key = floats(t[8], 0, t[6]), floats(t[9], 0, t[6])
        while True:
            image = next_item(t[0])
            if image >= t[1]:
                break
            around = floats(t[10], image * (channels + 2 * reach), channels + 2 * reach)
            found = floats(t[11], image * heads, heads)
            for head in range(heads):
                first, last = head * per_head, (head + 1) * per_head
                found[head] = gate_of(around, query, key, first, last, slid_query, slid_key)

    return light_gates


@cache
def statistics(sources: int = SOURCES) -> Any:
    """Mean and biased variance over batch and space of y = gate * v + lambda * s."""

    @kernel
    def light_statistics(data):
        t = table(data, sources)
        images, channels, pixels, heads, parts = t[2], t[3], t[4], t[5], t[7]
        gate, known = floats(t[8], 0, images * heads), floats(t[10], 0, images * channels * MOMENTS)
        mean, variance = floats(t[11], 0, channels), floats(t[12], 0, channels)
        while True:
            part = next_item(t[0])
            if part >= t[1]:
                break
            for channel in range(channels * part // parts, channels * (part + 1) // parts):
                decay = np.float64(floats(t[9], channel, 1)[0]) if t[9] != 0 else 0.0
                summed = 0.0
                for image in range(images):
                    at = (image * channels + channel) * MOMENTS
                    summed += gate[image * heads + channel * heads // channels] * np.float64(known[at])
                    summed += decay * known[at + 1]
                centre, squares = summed / images, 0.0
                for image in range(images):
                    at = (image * channels + channel) * MOMENTS
                    g = np.float64(gate[image * heads + channel * heads // channels])
                    off = g * known[at] + decay * known[at + 1] - centre
                    within = g * g * known[at + 2] + 2 * g * decay * known[at + 3] + decay * decay * known[at + 4]
                    squares += within + pixels * off * off
                mean[channel] = centre
                variance[channel] = squares / (images * pixels)
                if squares < 0:  # rounding alone; a NaN stays one
                    variance[channel] = 0

    return light_statistics


@cache
def numbers(sources: int = SOURCES) -> Any:
    r"""The small gradients, from the `SUMS` of every plane.

    With n = images * pixels, \hat y = (y - mean) rstd and g what reaches norm(y), the norm gives weight its sum of
    g \hat y, bias that of g, and y the gradient weight rstd (g - sum(g) / n - \hat y sum(g \hat y) / n): here
    incoming * gradient - constant - slope * (y - mean), the last two zero where the norm keeps to its statistics.
    """

    @kernel
    def light_numbers(data):
        t, r = table(data, sources), reals(data)
        images, channels, pixels, heads, parts = t[2], t[3], t[4], t[5], t[7]
        gate, known = floats(t[8], 0, images * heads), floats(t[10], 0, images * channels * MOMENTS)
        summed = floats(t[11], 0, images * channels * SUMS)
        incoming, of_value = floats(t[16], 0, images * channels), floats(t[17], 0, images * channels)
        by_batch = t[23] != 0
        while True:
            part = next_item(t[0])
            if part >= t[1]:
                break
            for channel in range(channels * part // parts, channels * (part + 1) // parts):
                decay = np.float64(floats(t[9], channel, 1)[0]) if t[9] != 0 else 0.0
                mean, rstd = np.float64(floats(t[12], channel, 1)[0]), 1 / sqrt(floats(t[13], channel, 1)[0] + r[24])
                weight = np.float64(floats(t[14], channel, 1)[0])
                of_bias = of_weight = 0.0
                for image in range(images):
                    plane = image * channels + channel
                    g, kept = np.float64(gate[image * heads + channel * heads // channels]), 1.0
                    if t[15] != 0:
                        kept = np.float64(floats(t[15], image, 1)[0])
                    off = g * known[plane * MOMENTS] + decay * known[plane * MOMENTS + 1] - mean
                    of_bias += kept * summed[plane * SUMS]
                    of_weight += kept * (
                        g * summed[plane * SUMS + 1] + decay * summed[plane * SUMS + 2] + off * summed[plane * SUMS]
                    )
                of_weight *= rstd
                constant = weight * rstd * of_bias / (images * pixels) if by_batch else 0.0
                slope = weight * rstd * rstd * of_weight / (images * pixels) if by_batch else 0.0
                of_decay = 0.0
                for image in range(images):
                    plane = image * channels + channel
                    g, kept = np.float64(gate[image * heads + channel * heads // channels]), 1.0
                    if t[15] != 0:
                        kept = np.float64(floats(t[15], image, 1)[0])
                    m = known[plane * MOMENTS : plane * MOMENTS + MOMENTS]
                    off, into = g * m[0] + decay * m[1] - mean, weight * rstd * kept
                    of_y = into * summed[plane * SUMS] - pixels * (constant + slope * off)
                    of_value[plane] = into * summed[plane * SUMS + 1] - slope * (g * m[2] + decay * m[3]) + m[0] * of_y
                    of_decay += into * summed[plane * SUMS + 2] - slope * (g * m[3] + decay * m[4]) + m[1] * of_y
                    incoming[plane] = into
                floats(t[18], channel, 1)[0], floats(t[19], channel, 1)[0] = constant, slope
                floats(t[20], channel, 1)[0], floats(t[21], channel, 1)[0] = of_weight, of_bias
                if t[22] != 0:
                    floats(t[22], channel, 1)[0] = of_decay

    return light_numbers


@cache
def gate_gradients(sources: int = SOURCES) -> Any:
    """What the gates give to each pixel of x through its mean, and each image to the kernels of query and key."""

    @kernel
    def light_gate_gradients(data):
        t = table(data, sources)
        channels, pixels, heads, k = t[3], t[4], t[5], t[6]
        per_head, length = channels // heads, channels + k - 1
        query, key = floats(t[8], 0, k), floats(t[9], 0, k)
        slid_query, slid_key = np.empty(channels, np.float32), np.empty(channels, np.float32)
        of_around = np.empty(length, np.float32)
        while True:
            image = next_item(t[0])
            if image >= t[1]:
                break
            around, of_value = floats(t[10], image * length, length), floats(t[12], image * channels, channels)
            slide(around, query, 0, slid_query)
            slide(around, key, 0, slid_key)
            for head in range(heads):
                first, gate, of_gate = head * per_head, np.float64(floats(t[11], image * heads + head, 1)[0]), 0.0
                for channel in range(first, first + per_head):
                    of_gate += of_value[channel]
                score = np.float32(of_gate * gate * (1 - gate) / sqrt(per_head))
                for channel in range(first, first + per_head):
                    held = slid_query[channel]
                    slid_query[channel] = score * slid_key[channel]
                    slid_key[channel] = score * held
            of_around[:] = np.float32(0)
            slide_back(slid_query, query, around, of_around, floats(t[14], 2 * k * image, k))
            slide_back(slid_key, key, around, of_around, floats(t[14], 2 * k * image + k, k))
            pooled = floats(t[13], image * channels, channels)
            for channel in range(channels):
                pooled[channel] = of_around[k // 2 + channel] / np.float32(pixels)

    return light_gate_gradients
