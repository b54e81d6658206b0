"""What stands between MRLA-light's passes over maps: numbers for each plane, in float64 where they are subtracted."""

from math import sqrt
from typing import NamedTuple

import numpy as np

from .blocks import slide, slide_back
from .compiling import kernel
from .light import MOMENTS, SUMS, gate_of
from .memory import channels_of_part, floats, number_at, number_or, put_number, records
from .records import FLOATS, INTEGER, NUMBER, PLANE_NUMBERS


class _SlidScratch(NamedTuple):
    query: np.ndarray
    key: np.ndarray


def _head_scratch(call):
    """Queries and keys of one head."""
    per_head = call.channels // call.heads
    return _SlidScratch(np.empty(per_head, np.float32), np.empty(per_head, np.float32))


@kernel(PLANE_NUMBERS, scratch=_head_scratch, query=FLOATS, key=FLOATS, means=FLOATS, gates=FLOATS)
def gates(call, image, slid):
    """The gates of every image, from the means with zeros on both sides."""
    channels, heads, length = call.channels, call.heads, call.channels + 2 * (call.kernel_size // 2)
    query, key = floats(call.query, 0, call.kernel_size), floats(call.key, 0, call.kernel_size)
    means, found = floats(call.means, image * length, length), floats(call.gates, image * heads, heads)
    per_head = channels // heads
    for head in range(heads):
        first, last = head * per_head, (head + 1) * per_head
        found[head] = gate_of(means, query, key, first, last, slid.query, slid.key)


@kernel(PLANE_NUMBERS, gates=FLOATS, decay=FLOATS, moments=FLOATS, mean=FLOATS, variance=FLOATS)
def statistics(call, part):
    """Mean and biased variance over batch and space of y = gate * v + lambda * s."""
    images, channels, pixels, heads = call.images, call.channels, call.pixels, call.heads
    gates, known = floats(call.gates, 0, images * heads), records(call.moments, 0, images * channels, MOMENTS)
    mean, variance = floats(call.mean, 0, channels), floats(call.variance, 0, channels)
    first, end = channels_of_part(call, part)
    for channel in range(first, end):
        decay = np.float64(number_or(call.decay, channel, 0))
        summed = 0.0
        for image in range(images):
            m = known[image * channels + channel]
            summed += gates[image * heads + channel * heads // channels] * np.float64(m.mean_v)
            summed += decay * m.mean_s
        centre, squares = summed / images, 0.0
        for image in range(images):
            m = known[image * channels + channel]
            g = np.float64(gates[image * heads + channel * heads // channels])
            off = g * m.mean_v + decay * m.mean_s - centre
            within = g * g * m.vv + 2 * g * decay * m.vs + decay * decay * m.ss
            squares += within + pixels * off * off
        mean[channel] = centre
        variance[channel] = squares / (images * pixels)
        if squares < 0:  # rounding alone; a NaN stays one
            variance[channel] = 0


@kernel(
    PLANE_NUMBERS,
    by_batch=INTEGER,
    norm_eps=NUMBER,
    gates=FLOATS,
    decay=FLOATS,
    moments=FLOATS,
    sums=FLOATS,
    mean=FLOATS,
    variance=FLOATS,
    norm_weight=FLOATS,
    drop_scale=FLOATS,
    incoming=FLOATS,
    gate_grads=FLOATS,
    constant=FLOATS,
    slope=FLOATS,
    grad_weight=FLOATS,
    grad_bias=FLOATS,
    grad_decay=FLOATS,
)
def numbers(call, part):
    r"""The small gradients, from the `SUMS` of every plane.

    With n = images * pixels, \hat y = (y - mean) rstd and g what reaches norm(y), the norm gives weight its sum of
    g \hat y, bias that of g, and y the gradient weight rstd (g - sum(g) / n - \hat y sum(g \hat y) / n): here
    incoming * gradient - constant - slope * (y - mean), the last two zero where the norm keeps to its statistics.
    `gate_grads` get each plane's part of the gradient of its head's gate.
    """
    images, channels, pixels, heads = call.images, call.channels, call.pixels, call.heads
    gates, known = floats(call.gates, 0, images * heads), records(call.moments, 0, images * channels, MOMENTS)
    summed = records(call.sums, 0, images * channels, SUMS)
    incoming = floats(call.incoming, 0, images * channels)
    gate_grads = floats(call.gate_grads, 0, images * channels)
    by_batch = call.by_batch != 0
    first, end = channels_of_part(call, part)
    for channel in range(first, end):
        decay = np.float64(number_or(call.decay, channel, 0))
        mean = np.float64(number_at(call.mean, channel))
        rstd = 1 / sqrt(number_at(call.variance, channel) + call.norm_eps)
        weight = np.float64(number_at(call.norm_weight, channel))
        grad_bias = grad_weight = 0.0
        for image in range(images):
            m, of_g = known[image * channels + channel], summed[image * channels + channel]
            g = np.float64(gates[image * heads + channel * heads // channels])
            drop_scale = np.float64(number_or(call.drop_scale, image, 1))
            off = g * m.mean_v + decay * m.mean_s - mean
            grad_bias += drop_scale * of_g.g
            grad_weight += drop_scale * (g * of_g.gv + decay * of_g.gs + off * of_g.g)
        grad_weight *= rstd
        constant = weight * rstd * grad_bias / (images * pixels) if by_batch else 0.0
        slope = weight * rstd * rstd * grad_weight / (images * pixels) if by_batch else 0.0
        grad_decay = 0.0
        for image in range(images):
            plane = image * channels + channel
            m, of_g = known[plane], summed[plane]
            g = np.float64(gates[image * heads + channel * heads // channels])
            drop_scale = np.float64(number_or(call.drop_scale, image, 1))
            off, into = g * m.mean_v + decay * m.mean_s - mean, weight * rstd * drop_scale
            of_y = into * of_g.g - pixels * (constant + slope * off)
            gate_grads[plane] = into * of_g.gv - slope * (g * m.vv + decay * m.vs) + m.mean_v * of_y
            grad_decay += into * of_g.gs - slope * (g * m.vs + decay * m.ss) + m.mean_s * of_y
            incoming[plane] = into
        put_number(call.constant, channel, constant)
        put_number(call.slope, channel, slope)
        put_number(call.grad_weight, channel, grad_weight)
        put_number(call.grad_bias, channel, grad_bias)
        if call.grad_decay != 0:
            put_number(call.grad_decay, channel, grad_decay)


class _ImageScratch(NamedTuple):
    query: np.ndarray
    key: np.ndarray
    grad_means: np.ndarray


def _image_scratch(call):
    """Queries and keys of one image, and the gradient of its means with their ends."""
    length = call.channels + call.kernel_size - 1
    return _ImageScratch(
        np.empty(call.channels, np.float32), np.empty(call.channels, np.float32), np.empty(length, np.float32)
    )


@kernel(
    PLANE_NUMBERS,
    scratch=_image_scratch,
    query=FLOATS,
    key=FLOATS,
    means=FLOATS,
    gates=FLOATS,
    gate_grads=FLOATS,
    pooled=FLOATS,
    grad_kernels=FLOATS,
)
def gate_gradients(call, image, scratch):
    """What the gates give to each pixel of x through its mean, and each image to the kernels of query and key."""
    channels, heads, k = call.channels, call.heads, call.kernel_size
    per_head, length = channels // heads, channels + k - 1
    query, key = floats(call.query, 0, k), floats(call.key, 0, k)
    slid_query, slid_key, grad_means = scratch.query, scratch.key, scratch.grad_means
    means, gate_grads = floats(call.means, image * length, length), floats(call.gate_grads, image * channels, channels)
    slide(means, query, 0, slid_query)
    slide(means, key, 0, slid_key)
    for head in range(heads):
        first, gate, grad_gate = head * per_head, np.float64(number_at(call.gates, image * heads + head)), 0.0
        for channel in range(first, first + per_head):
            grad_gate += gate_grads[channel]
        grad_score = np.float32(grad_gate * gate * (1 - gate) / sqrt(per_head))
        for channel in range(first, first + per_head):
            slid = slid_query[channel]
            slid_query[channel] = grad_score * slid_key[channel]
            slid_key[channel] = grad_score * slid
    grad_means[:] = np.float32(0)
    slide_back(slid_query, query, means, grad_means, floats(call.grad_kernels, 2 * k * image, k))
    slide_back(slid_key, key, means, grad_means, floats(call.grad_kernels, 2 * k * image + k, k))
    pooled = floats(call.pooled, image * channels, channels)
    for channel in range(channels):
        pooled[channel] = grad_means[k // 2 + channel] / np.float32(call.pixels)
