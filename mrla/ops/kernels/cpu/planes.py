"""What kernels do with one channel of one image.

A *padded* plane has an (h, w) map's rows in whole runs, with zeros where a row ends inside one, one zero in front of
each and a row of zeros above and below. So the nine neighbours of a run of pixels stand at fixed distances, and a 3x3
convolution needs no borders. Pixel (i, j) is number ``corner(width) + i * stride(width) + j``.

Kernels go down a column of runs, not along a row: the mask is the same all the way, and of the three rows around a run
two are at hand from the run above it.
"""

import numpy as np

from .compiling import exact, primitive
from .vectors import (
    LANES,
    added_alone,
    as_stored,
    lanes,
    load,
    load_lanes,
    scaled_and_shifted,
    spread,
    total,
    where_positive,
)


@primitive
def stride(width):
    """From one row of a padded plane to the next."""
    return (width + LANES - 1) // LANES * LANES + 1


@primitive
def corner(width):
    """Where the first pixel of a padded plane is."""
    return stride(width) + 1


@primitive
def padded_length(height, width):
    """Length of a padded plane."""
    return (height + 2) * stride(width) + 1


@primitive
def nine(taps):
    """Nine numbers, each in all lanes."""
    return (
        spread(taps[0]), spread(taps[1]), spread(taps[2]), spread(taps[3]), spread(taps[4]),
        spread(taps[5]), spread(taps[6]), spread(taps[7]), spread(taps[8]),
    )  # fmt: skip


@primitive
def row(padded, at):
    """The run at a place of a padded plane between the one begun a pixel before and the one begun a pixel behind."""
    return load(padded, at - 1), load(padded, at), load(padded, at + 1)


@primitive
def convolved(upper, middle, lower, taps):
    """The 3x3 convolution at a run of pixels, of the three `row`s around it."""
    above = upper[0] * taps[0] + upper[1] * taps[1] + upper[2] * taps[2]
    beside = middle[0] * taps[3] + middle[1] * taps[4] + middle[2] * taps[5]
    return above + beside + (lower[0] * taps[6] + lower[1] * taps[7] + lower[2] * taps[8])


@primitive
def nothing():
    """Nine runs of zeros."""
    zero = spread(np.float32(0))
    return zero, zero, zero, zero, zero, zero, zero, zero, zero


@primitive
def correlated(summed, upper, middle, lower, grad):
    """Nine sums and what a run of pixels adds to them: a 3x3 convolution's gradient for its taps."""
    return (
        summed[0] + grad * upper[0], summed[1] + grad * upper[1], summed[2] + grad * upper[2],
        summed[3] + grad * middle[0], summed[4] + grad * middle[1], summed[5] + grad * middle[2],
        summed[6] + grad * lower[0], summed[7] + grad * lower[1], summed[8] + grad * lower[2],
    )  # fmt: skip


@primitive
def write_nine(summed, taps):
    """Nine sums over lanes."""
    taps[0], taps[1], taps[2] = total(summed[0]), total(summed[1]), total(summed[2])
    taps[3], taps[4], taps[5] = total(summed[3]), total(summed[4]), total(summed[5])
    taps[6], taps[7], taps[8] = total(summed[6]), total(summed[7]), total(summed[8])


@exact
def rectified(branch, shortcut, alpha, beta, like):
    """relu(alpha * branch + beta + shortcut), rounded wherever a network with maps like `like` would round."""
    normed = as_stored(scaled_and_shifted(branch, alpha, beta), like)
    added = as_stored(added_alone(normed, shortcut), like)
    return where_positive(added, added)


@exact
def gathered(summed, found):
    """A sum and a run, added in the order they come: the same sum whichever way the kernel around it is compiled."""
    return added_alone(summed, found)


@primitive
def total_of(plane, height, width):
    """The sum of a map's plane."""
    summed = spread(np.float32(0))
    for at in range(0, height * width, LANES):
        summed = summed + load_lanes(plane, at, lanes(height * width - at))
    return total(summed)
