"""What stands between MRLA-base's passes over maps: numbers for each plane, in float64 where they are subtracted."""

from math import sqrt
from typing import NamedTuple

import numpy as np

from .base import MOMENTS, SUMS, VALUE_SUMS
from .blocks import slide_back
from .compiling import kernel
from .memory import channels_of_part, floats, integers, number_at, number_or, put_number, records
from .records import FLOATS, INTEGER, INTEGERS, NUMBER, PLANE_NUMBERS


@kernel(PLANE_NUMBERS, moments=FLOATS, mean=FLOATS, variance=FLOATS)
def statistics(call, part):
    """Mean and biased variance of y over batch and space."""
    images, channels, pixels = call.images, call.channels, call.pixels
    known = records(call.moments, 0, images * channels, MOMENTS)
    mean, variance = floats(call.mean, 0, channels), floats(call.variance, 0, channels)
    first, end = channels_of_part(call, part)
    for channel in range(first, end):
        summed = squares = 0.0
        for image in range(images):
            summed += known[image * channels + channel].mean
        for image in range(images):
            m = known[image * channels + channel]
            off = m.mean - summed / images
            squares += m.yy + pixels * off * off
        mean[channel], variance[channel] = summed / images, squares / (images * pixels)


@kernel(
    PLANE_NUMBERS,
    num_layers=INTEGER,
    by_batch=INTEGER,
    norm_eps=NUMBER,
    sums=FLOATS,
    value_sums=FLOATS,
    variance=FLOATS,
    norm_weight=FLOATS,
    drop_scale=FLOATS,
    incoming=FLOATS,
    constant=FLOATS,
    slope=FLOATS,
    grad_weight=FLOATS,
    grad_bias=FLOATS,
    grad_scale=FLOATS,
    grad_attn=FLOATS,
)
def numbers(call, part):
    """The gradients of norm and scale, each plane's part in those of attention weights, and how y's is made.

    As in `light_numbers.numbers`: that of y is incoming * z - constant - slope * (y - mean), with z that of norm(y).
    """
    images, channels, pixels, num_layers = call.images, call.channels, call.pixels, call.num_layers
    summed = records(call.sums, 0, images * channels, SUMS)
    value_sums = records(call.value_sums, 0, images * channels * num_layers, VALUE_SUMS)
    grad_attn = floats(call.grad_attn, 0, images * channels * num_layers)
    by_batch = call.by_batch != 0
    first, end = channels_of_part(call, part)
    for channel in range(first, end):
        rstd = 1 / sqrt(number_at(call.variance, channel) + call.norm_eps)
        weight = np.float64(number_at(call.norm_weight, channel))
        grad_bias = grad_weight = grad_scale = 0.0
        for image in range(images):
            of_plane = summed[image * channels + channel]
            grad_bias += of_plane.z
            grad_weight += of_plane.zy
            grad_scale += np.float64(number_or(call.drop_scale, image, 1)) * of_plane.g_act
        grad_weight *= rstd
        incoming = weight * rstd
        constant = incoming * grad_bias / (images * pixels) if by_batch else 0.0
        slope = incoming * rstd * grad_weight / (images * pixels) if by_batch else 0.0
        for image in range(images):
            for layer in range(num_layers):
                at = (image * channels + channel) * num_layers + layer
                of_value = value_sums[at]
                grad_attn[at] = incoming * of_value.zv - constant * of_value.v - slope * of_value.yv
        put_number(call.incoming, channel, incoming)
        put_number(call.constant, channel, constant)
        put_number(call.slope, channel, slope)
        put_number(call.grad_weight, channel, grad_weight)
        put_number(call.grad_bias, channel, grad_bias)
        if call.grad_scale != 0:
            put_number(call.grad_scale, channel, grad_scale)


class _ImageScratch(NamedTuple):
    grad_query: np.ndarray
    grad_key: np.ndarray
    grad_means: np.ndarray
    grad_scores: np.ndarray


def _image_scratch(call):
    """Gradients of one image's query, key and means with their ends, and of one head's scores."""
    return _ImageScratch(
        np.empty(call.channels, np.float32),
        np.empty(call.channels, np.float32),
        np.empty(call.channels + call.kernel_size - 1, np.float32),
        np.empty(call.num_layers, np.float64),
    )


@kernel(
    PLANE_NUMBERS,
    scratch=_image_scratch,
    num_layers=INTEGER,
    softmax=INTEGER,
    query_weight=FLOATS,
    key_weight=FLOATS,
    means=FLOATS,
    attn=FLOATS,
    query=FLOATS,
    keys=INTEGERS,
    grad_keys=INTEGERS,
    grad_key=FLOATS,
    grad_attn=FLOATS,
    pooled=FLOATS,
    grad_kernels=FLOATS,
)
def score_gradients(call, image, scratch):
    """What the scores give to the keys, to x through its mean, and, image by image, to the kernels of query and key.

    `grad_key` is what later blocks give to this block's key.
    """
    channels, heads, k, num_layers = call.channels, call.heads, call.kernel_size, call.num_layers
    softmax, per_head, length = call.softmax != 0, channels // heads, channels + k - 1
    query_weight, key_weight = floats(call.query_weight, 0, k), floats(call.key_weight, 0, k)
    keys, grad_keys = integers(call.keys, num_layers), integers(call.grad_keys, num_layers)
    grad_query, grad_own_key = scratch.grad_query, scratch.grad_key
    grad_means, grad_scores = scratch.grad_means, scratch.grad_scores
    means, query = floats(call.means, image * length, length), floats(call.query, image * channels, channels)
    grad_attn = floats(call.grad_attn, image * channels * num_layers, channels * num_layers)
    for head in range(heads):
        first, attn = head * per_head, floats(call.attn, (image * heads + head) * num_layers, num_layers)
        shared = 0.0
        for layer in range(num_layers):
            grad_scores[layer] = 0.0
            for channel in range(first, first + per_head):
                grad_scores[layer] += grad_attn[channel * num_layers + layer]
            shared += attn[layer] * grad_scores[layer]
        for layer in range(num_layers):
            weight = np.float64(attn[layer])
            if softmax:
                grad_scores[layer] = weight * (grad_scores[layer] - shared)
            else:
                grad_scores[layer] *= weight * (1 - weight)
            grad_scores[layer] /= sqrt(per_head)
        for channel in range(first, first + per_head):
            summed = 0.0
            for layer in range(num_layers):
                summed += grad_scores[layer] * number_at(keys[layer], image * channels + channel)
                if layer + 1 < num_layers:
                    found = np.float32(grad_scores[layer] * query[channel])
                    put_number(grad_keys[layer], image * channels + channel, found)
            grad_query[channel] = summed
            grad_own_key[channel] = grad_scores[num_layers - 1] * query[channel]
            if call.grad_key != 0:
                grad_own_key[channel] += number_at(call.grad_key, image * channels + channel)
    grad_means[:] = np.float32(0)
    slide_back(grad_query, query_weight, means, grad_means, floats(call.grad_kernels, 2 * k * image, k))
    slide_back(grad_own_key, key_weight, means, grad_means, floats(call.grad_kernels, 2 * k * image + k, k))
    pooled = floats(call.pooled, image * channels, channels)
    for channel in range(channels):
        pooled[channel] = grad_means[k // 2 + channel] / np.float32(call.pixels)
