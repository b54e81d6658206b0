"""What kernels do with one channel of one image, laid out so that every loop over it is one run.

A *flat* plane of an (h, w) map holds its rows one after the other with a gap of one element between them: pixel (i, j)
stands at i (w + 1) + j, and the plane is (h - 1)(w + 1) + w long. A *padded* plane is a flat one with zeros around it,
beginning at w + 2: the gap after a row is also the one before the next, so all nine neighbours of a pixel stand at
fixed distances, and a 3x3 convolution is one loop without borders.
"""

import numpy as np

from .compiling import primitive
from .memory import STEP, as_element, as_float, read_step, write_step


@primitive
def flat_length(height, width):
    """Length of a flat plane."""
    return (height - 1) * (width + 1) + width


@primitive
def padded_length(height, width):
    """Length of a padded plane."""
    return (height + 2) * (width + 1) + 1


@primitive
def whole_steps(height, width):
    """How many rows, from the first on, may be copied in whole steps without going past the end of the plane.

    What a step copies beyond its row is the gap's, which holds nothing of use, and the next row's, which comes next.
    """
    beyond = (width + STEP - 1) // STEP * STEP - width
    return max(height - (beyond + width - 1) // width, 0)


@primitive
def read_rows(source, height, width, flat):
    """Copies a map's plane into a flat one; the gaps hold nothing of use afterwards."""
    whole = whole_steps(height, width)
    for i in range(whole):
        for j in range(0, width, STEP):
            read_step(source, i * width + j, flat, i * (width + 1) + j)
    for i in range(whole, height):
        for j in range(width):
            flat[i * (width + 1) + j] = as_float(source[i * width + j])


@primitive
def write_rows(flat, height, width, target):
    """Copies a flat plane into a map's."""
    whole = whole_steps(height, width)
    for i in range(whole):
        for j in range(0, width, STEP):
            write_step(flat, i * (width + 1) + j, target, i * width + j)
    for i in range(whole, height):
        for j in range(width):
            target[i * width + j] = as_element(flat[i * (width + 1) + j], target[0])


@primitive
def fill_gaps(flat, height, width, value):
    """Sets what stands between the rows of a flat plane."""
    for i in range(height - 1):
        flat[i * (width + 1) + width] = value


@primitive
def total(flat):
    """The sum of a plane whose gaps are zero."""
    result = np.float32(0)
    for q in range(len(flat)):
        result += flat[q]
    return result


@primitive
def add_and_rectify(branch, shortcut, alpha, beta, kind, result):
    """relu(alpha * branch + beta + shortcut), rounded where a network that keeps its maps in `kind` would round."""
    for q in range(len(result)):
        normed = as_float(as_element(alpha * branch[q] + beta, kind))
        added = as_float(as_element(normed + shortcut[q], kind))
        result[q] = np.float32(0) if added <= 0 else added


@primitive
def convolve(padded, stride, taps, result):
    """The 3x3 convolution of a padded plane, as a flat one; its gaps hold nothing of use."""
    n = len(result)
    a, b, c = padded[0 : n + 2], padded[stride : stride + n + 2], padded[2 * stride : 2 * stride + n + 2]
    t0, t1, t2, t3, t4, t5, t6, t7, t8 = (
        taps[0], taps[1], taps[2], taps[3], taps[4], taps[5], taps[6], taps[7], taps[8],
    )  # fmt: skip
    for q in range(n):
        upper = t0 * a[q] + t1 * a[q + 1] + t2 * a[q + 2]
        middle = t3 * b[q] + t4 * b[q + 1] + t5 * b[q + 2]
        result[q] = upper + middle + (t6 * c[q] + t7 * c[q + 1] + t8 * c[q + 2])


@primitive
def correlate(padded, stride, gradient, taps):
    """The gradient of a 3x3 convolution's taps; the gaps of `gradient` are zero."""
    n = len(gradient)
    a, b, c = padded[0 : n + 2], padded[stride : stride + n + 2], padded[2 * stride : 2 * stride + n + 2]
    s0 = s1 = s2 = s3 = s4 = s5 = s6 = s7 = s8 = np.float32(0)
    for q in range(n):
        here = gradient[q]
        s0 += here * a[q]
        s1 += here * a[q + 1]
        s2 += here * a[q + 2]
        s3 += here * b[q]
        s4 += here * b[q + 1]
        s5 += here * b[q + 2]
        s6 += here * c[q]
        s7 += here * c[q + 1]
        s8 += here * c[q + 2]
    taps[0], taps[1], taps[2], taps[3], taps[4] = s0, s1, s2, s3, s4
    taps[5], taps[6], taps[7], taps[8] = s5, s6, s7, s8
