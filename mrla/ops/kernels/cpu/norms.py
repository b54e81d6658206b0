"""Norms: that at the end of a block's branch, rounded as torch rounds it, and its gradient; the mixer's own."""

from math import sqrt
from typing import NamedTuple

import numpy as np

from .compiling import exact, kernel, primitive
from .memory import channels_of, elements, floats, number_at, number_or, plane_at, put_number
from .planes import rectified
from .records import (
    ADD_ALONE,
    EPILOGUE,
    FLOATS,
    IMAGES,
    INTEGER,
    MAP,
    NUMBER,
    RUNNING_NORM,
)
from .vectors import (
    AHEAD,
    LANES,
    chosen,
    exact_total,
    fetch,
    lanes,
    load_lanes,
    no_sum,
    spread,
    store_lanes,
    summed_with,
)


class Line(NamedTuple):
    """A norm for one channel: scale * x + shift."""

    scale: np.floating
    shift: np.floating


class NormGradient(NamedTuple):
    """The gradient behind a norm of y for one plane: incoming * gradient - constant - slope * (y - mean).

    Constant and slope carry the norm's batch statistics; they are zero where it goes by its running statistics.
    """

    incoming: np.floating
    constant: np.floating
    slope: np.floating
    mean: np.floating


@exact
def line_of_branch(call, channel):
    """The norm of a block's branch, rounded as torch rounds it; scale 1 and shift 0 where there is none."""
    if call.epilogue <= ADD_ALONE:
        return Line(np.float32(1), np.float32(0))
    mean, scale = number_at(call.branch_mean, channel), number_at(call.branch_spread, channel)
    if call.epilogue == RUNNING_NORM:
        scale = np.float32(1) / np.sqrt(scale + np.float32(call.branch_eps))
    if call.branch_weight != 0:
        scale = scale * number_at(call.branch_weight, channel)
    bias = number_or(call.branch_bias, channel, 0)
    return Line(scale, np.float32(np.float64(bias) - np.float64(mean) * np.float64(scale)))


@primitive
def branch_mean_and_scale(call, channel):
    """That norm's mean, and what the gradient is multiplied with behind it: with batch statistics `correct` does it."""
    if call.epilogue <= ADD_ALONE:
        return np.float32(0), np.float32(1)
    scale = line_of_branch(call, channel).scale if call.epilogue == RUNNING_NORM else np.float32(1)
    return number_at(call.branch_mean, channel), scale


@primitive
def line_of_update(call, channel):
    """The mixer's own norm."""
    spread = number_at(call.norm_variance, channel) + np.float32(call.norm_eps)
    scale = number_at(call.norm_weight, channel) / np.sqrt(spread)
    return Line(scale, number_at(call.norm_bias, channel) - number_at(call.norm_mean, channel) * scale)


@primitive
def sum_of(plane, summed):
    """A sum in float64 and a plane's numbers."""
    for at in range(0, len(plane), LANES):
        fetch(plane, at + AHEAD)
        summed = summed_with(summed, load_lanes(plane, at, lanes(len(plane) - at)))
    return summed


@primitive
def sum_of_squares(plane, mean, summed):
    """A sum in float64 and a plane's squared deviations, each of them in float32."""
    centre = spread(mean)
    for at in range(0, len(plane), LANES):
        inside = lanes(len(plane) - at)
        off = chosen(load_lanes(plane, at, inside) - centre, inside)
        summed = summed_with(summed, off * off)
    return summed


@exact
def one_over_deviation(squares, count, eps):
    """1 / deviation, of the sum of squared deviations."""
    variance = np.float64(np.float32(squares / np.float32(count)))
    return np.float32(1 / sqrt(variance + eps)) if variance != 0 or eps != 0 else np.float32(0)


@exact
def move_on(running_mean, running_var, mean, squares, count, weight):
    """Moves running statistics on by those of a batch that has this weight."""
    rest, unbiased = np.float32(1) - weight, np.float64(np.float32(squares / np.float32(count - 1)))
    running_mean[0] = weight * mean + rest * running_mean[0]
    running_var[0] = np.float64(weight) * unbiased + np.float64(rest * running_var[0])


@kernel(
    images=INTEGER,
    channels=INTEGER,
    pixels=INTEGER,
    momentum=NUMBER,
    eps=NUMBER,
    branch=FLOATS,
    mean=FLOATS,
    rstd=FLOATS,
    running_mean=FLOATS,
    running_var=FLOATS,
)
def statistics(call, channel):
    """Mean and 1 / deviation of float32 maps over batch and space, and running statistics moved on by them.

    Rounded where torch's own CPU operator (2.14) rounds. `momentum` is the batch's weight in the running statistics. A
    channel's planes come from memory once: the second time they are still in the cache.
    """
    images, channels, pixels = call.images, call.channels, call.pixels
    count = images * pixels
    summed = no_sum()
    for image in range(images):
        summed = sum_of(floats(call.branch, (image * channels + channel) * pixels, pixels), summed)
    mean = np.float32(exact_total(summed) / count)
    summed = no_sum()
    for image in range(images):
        summed = sum_of_squares(floats(call.branch, (image * channels + channel) * pixels, pixels), mean, summed)
    squares = np.float32(exact_total(summed))
    put_number(call.mean, channel, mean)
    put_number(call.rstd, channel, one_over_deviation(squares, count, call.eps))
    if call.running_mean != 0:
        running_mean, running_var = floats(call.running_mean, channel, 1), floats(call.running_var, channel, 1)
        move_on(running_mean, running_var, mean, squares, count, np.float32(call.momentum))


@kernel(EPILOGUE, channels=INTEGER, pixels=INTEGER, branch=FLOATS, shortcut=FLOATS, out=FLOATS)
def finish(call, plane):
    """relu(norm(branch) + shortcut) alone, for a look at how the other kernels round it."""
    pixels = call.pixels
    line = line_of_branch(call, plane % call.channels)
    scale, shift = spread(line.scale), spread(line.shift)
    branch, shortcut = floats(call.branch, plane * pixels, pixels), floats(call.shortcut, plane * pixels, pixels)
    out = floats(call.out, plane * pixels, pixels)
    for at in range(0, pixels, LANES):
        inside = lanes(pixels - at)
        found = rectified(load_lanes(branch, at, inside), load_lanes(shortcut, at, inside), scale, shift, branch)
        store_lanes(out, at, found, inside)


@primitive
def correct(branch, grad, form):
    """One plane of `branch_gradients`."""
    incoming, constant = spread(form.incoming), spread(form.constant)
    slope, mean = spread(form.slope), spread(form.mean)
    for at in range(0, len(grad), LANES):
        inside = lanes(len(grad) - at)
        fetch(branch, at + AHEAD)
        fetch(grad, at + AHEAD)
        deviation = load_lanes(branch, at, inside) - mean
        found = incoming * (load_lanes(grad, at, inside) - constant - slope * deviation)
        store_lanes(grad, at, found, inside)


@kernel(IMAGES, branch=MAP, grad=MAP, incoming=FLOATS, constant=FLOATS, slope=FLOATS, mean=FLOATS)
def branch_gradients(call, item):
    """The gradient behind a norm with batch statistics, in place: incoming * (g - constant - slope * (x - mean))."""
    image, first, end = channels_of(call, item)
    for channel in range(first, end):
        plane = plane_at(call, image, channel)
        form = NormGradient(
            number_at(call.incoming, channel),
            number_at(call.constant, channel),
            number_at(call.slope, channel),
            number_at(call.mean, channel),
        )
        correct(elements(call, call.branch, plane), elements(call, call.grad, plane), form)
