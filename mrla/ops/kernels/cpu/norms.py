"""Norms: that at the end of a block's branch, rounded as torch rounds it, and its gradient; the mixer's own."""

from functools import cache
from math import sqrt
from typing import Any

import numpy as np

from .compiling import SOURCES, exact, kernel, primitive
from .memory import elements, floats, next_item, reals, table
from .planes import rectified
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


@exact
def line_of_branch(t, r, at, channel):
    """Alpha and beta of a channel, such that the norm of a block's branch is alpha * branch + beta, as torch rounds it.

    Entry 7 of a table says what is left of a tail: 0 nothing, 1 no norm, 2 a norm whose spread is a variance, 3 one
    whose spread is 1 / deviation. Its weight, bias (0 for none), mean, spread and eps are at entry `at` and behind it.
    """
    if t[7] < 2:
        return np.float32(1), np.float32(0)
    mean, alpha = floats(t[at + 2], channel, 1)[0], floats(t[at + 3], channel, 1)[0]
    if t[7] == 2:
        alpha = np.float32(1) / np.sqrt(alpha + np.float32(r[at + 4]))
    if t[at] != 0:
        alpha = alpha * floats(t[at], channel, 1)[0]
    bias = floats(t[at + 1], channel, 1)[0] if t[at + 1] != 0 else np.float32(0)
    return alpha, np.float32(np.float64(bias) - np.float64(mean) * np.float64(alpha))


@primitive
def way_back(t, at, channel, alpha):
    """The mean of that norm, and what the gradient is multiplied with behind it: in training `correct` does it."""
    if t[7] < 2:
        return np.float32(0), np.float32(1)
    return floats(t[at + 2], channel, 1)[0], alpha if t[7] == 2 else np.float32(1)


@primitive
def line_of_update(t, r, at, channel):
    """Scale and shift of the mixer's own norm, of weight, bias, mean, variance and eps from entry `at` on."""
    spread = floats(t[at + 3], channel, 1)[0] + np.float32(r[at + 4])
    scale = floats(t[at], channel, 1)[0] / np.sqrt(spread)
    return scale, floats(t[at + 1], channel, 1)[0] - floats(t[at + 2], channel, 1)[0] * scale


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


@cache
def statistics(sources: int = SOURCES) -> Any:
    """Mean and 1 / deviation of float32 maps over batch and space, and running statistics moved on by them.

    Rounded where torch's own CPU operator (2.14) rounds. The table holds counter, channels, images, channels, pixels;
    behind them branch, mean, 1 / deviation, the running statistics, the batch's weight in them, and eps. A channel's
    planes come from memory once: the second time they are still in the cache.
    """

    @kernel
    def norm_statistics(data):
        t, r = table(data, sources), reals(data)
        images, channels, pixels = t[2], t[3], t[4]
        weight, eps = np.float32(r[10]), r[11]
        count = images * pixels
        while True:
            channel = next_item(t[0])
            if channel >= t[1]:
                break
            summed = no_sum()
            for image in range(images):
                summed = sum_of(floats(t[5], (image * channels + channel) * pixels, pixels), summed)
            mean = np.float32(exact_total(summed) / count)
            summed = no_sum()
            for image in range(images):
                summed = sum_of_squares(floats(t[5], (image * channels + channel) * pixels, pixels), mean, summed)
            squares = np.float32(exact_total(summed))
            running_mean, running_var = floats(t[8], channel, 1), floats(t[9], channel, 1)
            floats(t[6], channel, 1)[0] = mean
            floats(t[7], channel, 1)[0] = one_over_deviation(squares, count, eps)
            if t[8] != 0:
                move_on(running_mean, running_var, mean, squares, count, weight)

    return norm_statistics


@cache
def finish(sources: int = SOURCES) -> Any:
    """relu(norm(branch) + shortcut) alone, for a look at how the other kernels round it."""

    @kernel
    def norm_finish(data):
        t, r = table(data, sources), reals(data)
        channels, size = t[2], t[3]
        while True:
            plane = next_item(t[0])
            if plane >= t[1]:
                break
            alpha, beta = line_of_branch(t, r, 11, plane % channels)
            alphas, betas = spread(alpha), spread(beta)
            branch, shortcut = floats(t[8], plane * size, size), floats(t[9], plane * size, size)
            out = floats(t[10], plane * size, size)
            for at in range(0, size, LANES):
                inside = lanes(size - at)
                found = rectified(
                    load_lanes(branch, at, inside), load_lanes(shortcut, at, inside), alphas, betas, branch
                )
                store_lanes(out, at, found, inside)

    return norm_finish


@primitive
def correct(branch, gradient, scale, constant, slope, mean):
    """One plane of `branch_gradients`."""
    factor, lost, along, centre = spread(scale), spread(constant), spread(slope), spread(mean)
    for at in range(0, len(gradient), LANES):
        inside = lanes(len(gradient) - at)
        fetch(branch, at + AHEAD)
        fetch(gradient, at + AHEAD)
        deviation = load_lanes(branch, at, inside) - centre
        found = factor * (load_lanes(gradient, at, inside) - lost - along * deviation)
        store_lanes(gradient, at, found, inside)


@cache
def branch_gradients(kind: Any, sources: int = SOURCES) -> Any:
    """The gradient behind a norm with batch statistics, in place: scale * (g - constant - slope * (branch - mean))."""
    bytes_each = np.dtype(kind).itemsize

    @kernel
    def branch_gradients(data):
        t = table(data, sources)
        channels, height, width, chunks = t[2], t[3], t[4], t[6]
        size = height * width
        while True:
            item = next_item(t[0])
            if item >= t[1]:
                break
            image, chunk = item // chunks, item % chunks
            for channel in range(channels * chunk // chunks, channels * (chunk + 1) // chunks):
                at = (image * channels + channel) * size
                branch = elements(t[10], at, size, kind, bytes_each)
                gradient = elements(t[11], at, size, kind, bytes_each)
                correct(
                    branch, gradient, floats(t[12], channel, 1)[0], floats(t[13], channel, 1)[0],
                    floats(t[14], channel, 1)[0], floats(t[15], channel, 1)[0],
                )  # fmt: skip

    return branch_gradients
