"""What the kernels of all methods share: reading planes, heads, and the way back from an update to maps."""

from typing import NamedTuple

import numpy as np

from .compiling import primitive
from .memory import elements, plane_at
from .norms import line_of_branch
from .planes import convolved, corner, gathered, nine, rectified, row, stride
from .records import NO_EPILOGUE, number_record
from .vectors import (
    AHEAD,
    LANES,
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

BRANCH_SUMS = number_record("grad", "centred")
"""Per plane: the sums of the gradient behind the branch's norm, and of its product with branch - mean."""


@primitive
def read_x(call, image, channel, padded):
    """Puts a plane of x into a padded one and returns its sum.

    Behind a residual block x is made of the block's branch, see `rectified`.
    """
    plane, has_epilogue = plane_at(call, image, channel), call.epilogue != NO_EPILOGUE
    x, shortcut = elements(call, call.x, plane), elements(call, call.shortcut, plane)
    line, width = line_of_branch(call, channel), plane.width
    summed, step, start = spread(np.float32(0)), stride(width), corner(width)
    scale, shift = spread(line.scale), spread(line.shift)
    for j in range(0, width, LANES):
        inside = lanes(width - j)
        for i in range(plane.height):
            at = i * width + j
            fetch(x, at + AHEAD)
            found = load_lanes(x, at, inside)
            if has_epilogue:
                fetch(shortcut, at + AHEAD)
                added = load_lanes(shortcut, at, inside)
                found = chosen(rectified(found, added, scale, shift, x), inside)
            store(padded, start + i * step + j, found)
            summed = gathered(summed, found)
    return total(summed)


@primitive
def clear_ends(means, half_kernel):
    """Zeros on both sides of an image's means; by every chunk, for one in the middle may need them too."""
    means[:half_kernel] = np.float32(0)
    means[len(means) - half_kernel :] = np.float32(0)


@primitive
def slide(means, kernel_weight, first, slid):
    """A kernel slid along the channels from `first` on; `means` are those of x with zeros on both sides."""
    for channel in range(len(slid)):
        slid[channel] = np.float32(0)
    for step in range(len(kernel_weight)):
        shifted = means[first + step : first + step + len(slid)]
        for channel in range(len(slid)):
            slid[channel] += kernel_weight[step] * shifted[channel]


@primitive
def slide_back(grad_slid, kernel_weight, means, grad_means, grad_kernel):
    """Adds to `grad_means` what it gets from the gradient of what `slide` found; the kernel's into `grad_kernel`."""
    for step in range(len(kernel_weight)):
        shifted, grad_shifted = means[step : step + len(grad_slid)], grad_means[step : step + len(grad_slid)]
        summed = np.float32(0)
        for channel in range(len(grad_slid)):
            grad_shifted[channel] += kernel_weight[step] * grad_slid[channel]
            summed += grad_slid[channel] * shifted[channel]
        grad_kernel[step] = summed


class MapGradient(NamedTuple):
    """How a plane's gradients follow from that of its update.

    Attributes:
        pooled: What reaches each pixel of x through its mean.
        decay: What multiplies the shortcut in the update.
        branch_mean: The mean of the branch's norm.
        branch_scale: What the gradient is multiplied with behind that norm.
    """

    pooled: np.floating
    decay: np.floating
    branch_mean: np.floating
    branch_scale: np.floating


@primitive
def find_map_gradients(call, plane, padded, grad_update, turned, form, sums):
    """The gradients of x (or its branch, before its norm) and of the shortcut, from that of y.

    Args:
        call: With the maps `x`, `shortcut` and `grad_out`, and `grad_x` and `grad_shortcut` to write.
        plane: Which.
        padded: x.
        grad_update: The gradient of y, padded.
        turned: The taps for the way back.
        form: A `MapGradient`.
        sums: Gets the plane's `BRANCH_SUMS`.
    """
    x, shortcut = elements(call, call.x, plane), elements(call, call.shortcut, plane)
    grad_out, grad_x = elements(call, call.grad_out, plane), elements(call, call.grad_x, plane)
    grad_shortcut, has_shortcut = elements(call, call.grad_shortcut, plane), call.shortcut != 0
    has_epilogue, height, width = call.epilogue != NO_EPILOGUE, plane.height, plane.width
    step, start, weights = stride(width), corner(width), nine(turned)
    pooled, decay = spread(form.pooled), spread(form.decay)
    branch_mean, branch_scale = spread(form.branch_mean), spread(form.branch_scale)
    summed = centred = spread(np.float32(0))
    for j in range(0, width, LANES):
        inside, upper, middle = lanes(width - j), row(grad_update, start + j - step), row(grad_update, start + j)
        for i in range(height):
            at, here = i * width + j, start + j + i * step
            lower = row(grad_update, here + step)
            found = convolved(upper, middle, lower, weights) + load_lanes(grad_out, at, inside) + pooled
            grad_added = decay * middle[1]
            upper, middle = middle, lower
            fetch(x, at + plane.size)
            fetch(shortcut, at + plane.size)
            if has_epilogue:
                found = chosen(where_positive(load(padded, here), found), inside)
                grad_added = grad_added + found
                summed = summed + found
                centred = centred + found * (load_lanes(x, at, inside) - branch_mean)
                found = found * branch_scale
            store_lanes(grad_x, at, found, inside)
            if has_shortcut:
                store_lanes(grad_shortcut, at, grad_added, inside)
    sums.grad, sums.centred = total(summed), total(centred)
