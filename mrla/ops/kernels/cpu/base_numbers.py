"""What stands between MRLA-base's passes over maps: some numbers for each plane, in float64 where they are subtracted.

Tables hold counter, items, images, channels, pixels, heads, size of query and key, parts; from entry 8 on addresses. An
item is an image, or one of the parts that the channels are cut into.
"""

from functools import cache
from math import sqrt
from typing import Any

import numpy as np

from .base import MOMENTS, SUMS, VALUE_SUMS
from .blocks import slide_back
from .compiling import SOURCES, kernel
from .memory import floats, integers, next_item, reals, table


@cache
def statistics(sources: int = SOURCES) -> Any:
    """Mean and biased variance of y over batch and space."""

    @kernel
    def base_statistics(data):
        t = table(data, sources)
        images, channels, pixels, parts = t[2], t[3], t[4], t[7]
        known = floats(t[8], 0, images * channels * MOMENTS)
        mean, variance = floats(t[9], 0, channels), floats(t[10], 0, channels)
        while True:
            part = next_item(t[0])
            if part >= t[1]:
                break
            for channel in range(channels * part // parts, channels * (part + 1) // parts):
                summed = squares = 0.0
                for image in range(images):
                    summed += known[(image * channels + channel) * MOMENTS]
                for image in range(images):
                    at = (image * channels + channel) * MOMENTS
                    off = known[at] - summed / images
                    squares += known[at + 1] + pixels * off * off
                mean[channel], variance[channel] = summed / images, squares / (images * pixels)

    return base_statistics


@cache
def numbers(sources: int = SOURCES) -> Any:
    """The gradients of norm and scale, each plane's part in those of what heads take, and how y's is made.

    As in `light_numbers.numbers`: that of y is incoming * z - constant - slope * (y - mean), with z that of norm(y).
    """

    @kernel
    def base_numbers(data):
        t, r = table(data, sources), reals(data)
        images, channels, pixels, parts, asked = t[2], t[3], t[4], t[7], t[20]
        summed = floats(t[8], 0, images * channels * SUMS)
        of_each = floats(t[9], 0, images * channels * asked * VALUE_SUMS)
        of_taken = floats(t[19], 0, images * channels * asked)
        by_batch = t[21] != 0
        while True:
            part = next_item(t[0])
            if part >= t[1]:
                break
            for channel in range(channels * part // parts, channels * (part + 1) // parts):
                rstd, weight = 1 / sqrt(floats(t[10], channel, 1)[0] + r[22]), np.float64(floats(t[11], channel, 1)[0])
                of_bias = of_weight = of_scale = 0.0
                for image in range(images):
                    at = (image * channels + channel) * SUMS
                    kept = np.float64(floats(t[12], image, 1)[0]) if t[12] != 0 else 1.0
                    of_bias += summed[at]
                    of_weight += summed[at + 1]
                    of_scale += kept * summed[at + 2]
                of_weight *= rstd
                incoming = weight * rstd
                constant = incoming * of_bias / (images * pixels) if by_batch else 0.0
                slope = incoming * rstd * of_weight / (images * pixels) if by_batch else 0.0
                for image in range(images):
                    for block in range(asked):
                        at = (image * channels + channel) * asked + block
                        v, zv, yv = of_each[3 * at], of_each[3 * at + 1], of_each[3 * at + 2]
                        of_taken[at] = incoming * zv - constant * v - slope * yv
                floats(t[13], channel, 1)[0], floats(t[14], channel, 1)[0] = incoming, constant
                floats(t[15], channel, 1)[0] = slope
                floats(t[16], channel, 1)[0], floats(t[17], channel, 1)[0] = of_weight, of_bias
                if t[18] != 0:
                    floats(t[18], channel, 1)[0] = of_scale

    return base_numbers


@cache
def score_gradients(sources: int = SOURCES) -> Any:
    """What the scores give to the keys, to x through its mean, and, image by image, to the kernels of query and key."""

    @kernel
    def base_score_gradients(data):
        t = table(data, sources)
        channels, pixels, heads, k, asked = t[3], t[4], t[5], t[6], t[19]
        softmax, per_head, length = t[20] != 0, channels // heads, channels + k - 1
        query_kernel, key_kernel = floats(t[8], 0, k), floats(t[9], 0, k)
        keys, of_keys = integers(t[13], asked), integers(t[14], asked)
        of_query, of_own = np.empty(channels, np.float32), np.empty(channels, np.float32)
        of_around, scores = np.empty(length, np.float32), np.empty(asked, np.float64)
        while True:
            image = next_item(t[0])
            if image >= t[1]:
                break
            around, query = floats(t[10], image * length, length), floats(t[12], image * channels, channels)
            of_taken = floats(t[16], image * channels * asked, channels * asked)
            later = floats(t[15], image * channels, channels)
            for head in range(heads):
                first, taken = head * per_head, floats(t[11], (image * heads + head) * asked, asked)
                shared = 0.0
                for block in range(asked):
                    scores[block] = 0.0
                    for channel in range(first, first + per_head):
                        scores[block] += of_taken[channel * asked + block]
                    shared += taken[block] * scores[block]
                for block in range(asked):
                    taken_here = np.float64(taken[block])
                    if softmax:
                        scores[block] = taken_here * (scores[block] - shared)
                    else:
                        scores[block] *= taken_here * (1 - taken_here)
                    scores[block] /= sqrt(per_head)
                for channel in range(first, first + per_head):
                    summed = 0.0
                    for block in range(asked):
                        summed += scores[block] * floats(keys[block], image * channels + channel, 1)[0]
                        if block + 1 < asked:
                            found = np.float32(scores[block] * query[channel])
                            floats(of_keys[block], image * channels + channel, 1)[0] = found
                    of_query[channel] = summed
                    of_own[channel] = scores[asked - 1] * query[channel]
                    if t[15] != 0:
                        of_own[channel] += later[channel]
            of_around[:] = np.float32(0)
            slide_back(of_query, query_kernel, around, of_around, floats(t[18], 2 * k * image, k))
            slide_back(of_own, key_kernel, around, of_around, floats(t[18], 2 * k * image + k, k))
            pooled = floats(t[17], image * channels, channels)
            for channel in range(channels):
                pooled[channel] = of_around[k // 2 + channel] / np.float32(pixels)

    return base_score_gradients
