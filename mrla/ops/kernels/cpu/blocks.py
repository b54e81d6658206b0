"""What the kernels of all methods share: the layout of their tables, heads, and the way back from an update to maps.

A table begins with counter, items, channels, height, width, heads, chunks (an item is one chunk of the heads, or of the
channels, of one image), tail, one entry of the method's own, and the size of the kernels of query and key.
"""

import numpy as np

from .compiling import primitive
from .planes import convolved, corner, nine, row, stride
from .vectors import LANES, chosen, fetch, lanes, load, load_lanes, spread, store_lanes, total, where_positive


@primitive
def clear_ends(around, reach):
    """Zeros on both sides of an image's means; by every chunk, for a chunk in the middle may reach that far."""
    around[:reach] = np.float32(0)
    around[len(around) - reach :] = np.float32(0)


@primitive
def slide(around, kernel_weight, first, slid):
    """A kernel slid along the channels from `first` on; `around` has their means with zeros on both sides."""
    for channel in range(len(slid)):
        slid[channel] = np.float32(0)
    for step in range(len(kernel_weight)):
        means = around[first + step : first + step + len(slid)]
        for channel in range(len(slid)):
            slid[channel] += kernel_weight[step] * means[channel]


@primitive
def slide_back(of_slid, kernel_weight, around, of_around, of_kernel):
    """Adds to `of_around` what it gets from the gradient of what `slide` found; the kernel's own into `of_kernel`."""
    for step in range(len(kernel_weight)):
        means, of_means = around[step : step + len(of_slid)], of_around[step : step + len(of_slid)]
        summed = np.float32(0)
        for channel in range(len(of_slid)):
            of_means[channel] += kernel_weight[step] * of_slid[channel]
            summed += of_slid[channel] * means[channel]
        of_kernel[step] = summed


@primitive
def find_map_gradients(
    padded, of_update, x, shortcut, gradient, turned, numbers, height, width, tail, has_shortcut, of_x, of_shortcut,
    of_norm,
):  # fmt: skip
    """The gradients of x (or its branch, before its norm) and of the shortcut, from that of y.

    `turned` are the taps for the way back; `numbers` are what reaches x through its mean, lambda, and the mean and the
    scale of the branch's norm.
    """
    step, start, weights = stride(width), corner(width), nine(turned)
    pooled, factor, centre, after = spread(numbers[0]), spread(numbers[1]), spread(numbers[2]), spread(numbers[3])
    summed = centred = spread(np.float32(0))
    for j in range(0, width, LANES):
        inside, upper, middle = lanes(width - j), row(of_update, start + j - step), row(of_update, start + j)
        for i in range(height):
            at, here = i * width + j, start + j + i * step
            lower = row(of_update, here + step)
            found = convolved(upper, middle, lower, weights) + load_lanes(gradient, at, inside) + pooled
            of_added = factor * middle[1]
            upper, middle = middle, lower
            fetch(x, at + height * width)
            fetch(shortcut, at + height * width)
            if tail:
                found = chosen(where_positive(load(padded, here), found), inside)
                of_added = of_added + found
                summed = summed + found
                centred = centred + found * (load_lanes(x, at, inside) - centre)
                found = found * after
            store_lanes(of_x, at, found, inside)
            if has_shortcut:
                store_lanes(of_shortcut, at, of_added, inside)
    of_norm[0], of_norm[1] = total(summed), total(centred)
