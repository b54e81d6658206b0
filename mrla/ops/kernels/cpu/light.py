"""The kernels of MRLA-light: x + norm(gate * v + lambda * s), forward and backward.

Behind a residual block the map that is read is not x but what the block adds its shortcut to, and
x = relu(alpha * branch + beta + shortcut) is made on the way, as often as it is needed, and never stored.
"""

from math import exp, sqrt
from typing import NamedTuple

import numpy as np

from .blocks import BRANCH_SUMS, MapGradient, clear_ends, find_map_gradients, read_x, slide
from .compiling import kernel, primitive
from .memory import channels_of, elements, floats, number_at, number_or, plane_at, record_at
from .norms import NormGradient, branch_mean_and_scale, line_of_update
from .planes import convolved, corner, correlated, nine, nothing, padded_length, row, stride, total_of, write_nine
from .records import EPILOGUE, FLOATS, IMAGES, INTEGER, MAP, UPDATE_NORM, number_record
from .vectors import LANES, chosen, fetch, lanes, load_lanes, spread, store, store_lanes, total

MOMENTS = number_record("mean_v", "mean_s", "vv", "vs", "ss")
"""Per plane: means of v and s, and the sums of (v - mean)^2, (v - mean)(s - mean) and (s - mean)^2."""

SUMS = number_record("g", "gv", "gs")
"""Per plane: the sums of the gradient g, of g (v - mean of v) and of g (s - mean of s)."""


@primitive
def gate_of(means, query, key, first, last, slid_query, slid_key):
    """The gate of the head of channels `first` to before `last`; `means` have zeros on both sides."""
    slide(means, query, first, slid_query)
    slide(means, key, first, slid_key)
    score = np.float32(0)
    for channel in range(last - first):
        score += slid_query[channel] * slid_key[channel]
    return np.float32(1 / (1 + exp(-score / sqrt(last - first))))


@primitive
def mix(call, plane, padded, ahead, taps, decay, shift):
    """One plane of x + (the convolution of x with `taps` + decay * s + shift); prefetches what lies `ahead`."""
    x, shortcut = elements(call, call.x, plane), elements(call, call.shortcut, plane)
    out, has_shortcut, height, width = elements(call, call.out, plane), call.shortcut != 0, plane.height, plane.width
    step, start = stride(width), corner(width)
    weights, decays, shifts = nine(taps), spread(decay), spread(shift)
    for j in range(0, width, LANES):
        inside, upper, middle = lanes(width - j), row(padded, start + j - step), row(padded, start + j)
        for i in range(height):
            at, lower = i * width + j, row(padded, start + j + (i + 1) * step)
            update = convolved(upper, middle, lower, weights) + shifts
            fetch(x, at + ahead)
            fetch(shortcut, at + ahead)
            if has_shortcut:
                update = update + decays * load_lanes(shortcut, at, inside)
            store_lanes(out, at, middle[1] + update, inside)
            upper, middle = middle, lower


@primitive
def num_slots(call):
    """How many planes wait for their head's turn; with known gates none has to, which spares a division a plane."""
    return 1 if call.gates_known else min(call.channels, call.channels // call.heads + 2 * (call.kernel_size // 2))


class _ApplyScratch(NamedTuple):
    ring: np.ndarray
    taps: np.ndarray
    slid_query: np.ndarray
    slid_key: np.ndarray


def _apply_scratch(call):
    """The planes that wait for their head's turn, and room for one head."""
    per_head = call.channels // call.heads
    return _ApplyScratch(
        np.zeros((num_slots(call), padded_length(call.height, call.width)), np.float32),
        np.empty(9, np.float32),
        np.empty(per_head, np.float32),
        np.empty(per_head, np.float32),
    )


@kernel(
    IMAGES,
    EPILOGUE,
    UPDATE_NORM,
    scratch=_apply_scratch,
    gates_known=INTEGER,
    x=MAP,
    shortcut=MAP,
    out=MAP,
    taps=FLOATS,
    decay=FLOATS,
    query=FLOATS,
    key=FLOATS,
    drop_scale=FLOATS,
    gates=FLOATS,
    means=FLOATS,
)
def apply(call, item, scratch):
    """The output x + scale * (gate * v + lambda * s) + shift, each head as soon as its gate is known.

    A head's gate needs the means of its own channels and of a few beside them, so the means run just ahead; the planes
    that were read for them wait in a ring until their head's turn.
    """
    channels, heads, gates_known, has_shortcut = call.channels, call.heads, call.gates_known != 0, call.shortcut != 0
    size, per_head, half_kernel = call.height * call.width, channels // heads, call.kernel_size // 2
    query, key = floats(call.query, 0, call.kernel_size), floats(call.key, 0, call.kernel_size)
    ring, scaled, slots = scratch.ring, scratch.taps, num_slots(call)
    ahead = size if gates_known else size * (per_head + half_kernel)
    image, chunk = item // call.chunks, item % call.chunks
    gates = floats(call.gates, image * heads, heads)
    length = channels + 2 * half_kernel
    means = floats(call.means, image * length, length)
    drop_scale = number_or(call.drop_scale, image, 1)
    if not gates_known:
        clear_ends(means, half_kernel)
    first, last = heads * chunk // call.chunks, heads * (chunk + 1) // call.chunks
    pooled = max(0, first * per_head - half_kernel)
    for head in range(first, last):
        start, end = head * per_head, (head + 1) * per_head
        if not gates_known:
            for channel in range(pooled, min(channels, end + half_kernel)):
                means[half_kernel + channel] = read_x(call, image, channel, ring[channel % slots]) / np.float32(size)
            pooled = min(channels, end + half_kernel)
            gates[head] = gate_of(means, query, key, start, end, scratch.slid_query, scratch.slid_key)
        for channel in range(start, end):
            padded = ring[channel % slots]
            if gates_known:
                read_x(call, image, channel, padded)
            line = line_of_update(call, channel)
            factor = drop_scale * line.scale
            taps = floats(call.taps, 9 * channel, 9)
            for tap in range(9):
                scaled[tap] = taps[tap] * gates[head] * factor
            decay = number_at(call.decay, channel) * factor if has_shortcut else np.float32(0)
            mix(call, plane_at(call, image, channel), padded, ahead, scaled, decay, drop_scale * line.shift)


@primitive
def find_moments(call, plane, padded, taps, mean, found):
    """The `MOMENTS` of one plane, whose x has this mean."""
    x, shortcut = elements(call, call.x, plane), elements(call, call.shortcut, plane)
    has_shortcut, height, width = call.shortcut != 0, plane.height, plane.width
    step, start, size = stride(width), corner(width), np.float32(plane.size)
    weights, sum_of_taps = nine(taps), np.float32(0)
    for tap in range(9):
        sum_of_taps += taps[tap]
    # Sums around a value near the mean: of the plain squares little would be left after subtraction.
    mean_s = total_of(shortcut, height, width) / size if has_shortcut else np.float32(0)
    near_v, near_s = spread(mean * sum_of_taps), spread(mean_s)
    v = vv = vs = ss = spread(np.float32(0))
    for j in range(0, width, LANES):
        inside, upper, middle = lanes(width - j), row(padded, start + j - step), row(padded, start + j)
        for i in range(height):
            at, lower = i * width + j, row(padded, start + j + (i + 1) * step)
            fetch(x, at + plane.size)
            fetch(shortcut, at + plane.size)
            dv = chosen(convolved(upper, middle, lower, weights) - near_v, inside)
            upper, middle = middle, lower
            v, vv = v + dv, vv + dv * dv
            if has_shortcut:
                ds = chosen(load_lanes(shortcut, at, inside) - near_s, inside)
                vs, ss = vs + dv * ds, ss + ds * ds
    off = total(v)
    found.mean_v, found.mean_s = mean * sum_of_taps + off / size, mean_s
    found.vv, found.vs, found.ss = total(vv) - off * off / size, total(vs), total(ss)


def _one_plane(call):
    """Room for one padded plane."""
    return np.zeros(padded_length(call.height, call.width), np.float32)


@kernel(IMAGES, EPILOGUE, scratch=_one_plane, x=MAP, shortcut=MAP, taps=FLOATS, means=FLOATS, moments=FLOATS)
def moments(call, item, padded):
    """The mean of x for every plane, and `MOMENTS` from which those of any gate * v + lambda * s follow.

    So a norm's batch statistics need neither the gates nor a stored update: one pass over memory gives both.
    """
    image, first, end = channels_of(call, item)
    size, half_kernel = call.height * call.width, call.kernel_size // 2
    length = call.channels + 2 * half_kernel
    means = floats(call.means, image * length, length)
    clear_ends(means, half_kernel)
    for channel in range(first, end):
        plane = plane_at(call, image, channel)
        mean = read_x(call, image, channel, padded) / np.float32(size)
        means[half_kernel + channel] = mean
        found = record_at(call.moments, plane.number, MOMENTS)
        find_moments(call, plane, padded, floats(call.taps, 9 * channel, 9), mean, found)


@primitive
def find_sums(call, plane, padded, taps, known, found):
    """The `SUMS` of one plane, of which `MOMENTS` are known."""
    x, shortcut = elements(call, call.x, plane), elements(call, call.shortcut, plane)
    grad_out, has_shortcut = elements(call, call.grad_out, plane), call.shortcut != 0
    height, width = plane.height, plane.width
    step, start, weights = stride(width), corner(width), nine(taps)
    mean_v, mean_s = spread(known.mean_v), spread(known.mean_s)
    sum_g = sum_gv = sum_gs = spread(np.float32(0))
    for j in range(0, width, LANES):
        inside, upper, middle = lanes(width - j), row(padded, start + j - step), row(padded, start + j)
        for i in range(height):
            at, lower = i * width + j, row(padded, start + j + (i + 1) * step)
            g = load_lanes(grad_out, at, inside)
            sum_g = sum_g + g
            fetch(x, at + plane.size)
            fetch(shortcut, at + plane.size)
            fetch(grad_out, at + plane.size)
            sum_gv = sum_gv + g * (convolved(upper, middle, lower, weights) - mean_v)
            upper, middle = middle, lower
            if has_shortcut:
                sum_gs = sum_gs + g * (load_lanes(shortcut, at, inside) - mean_s)
    found.g, found.gv, found.gs = total(sum_g), total(sum_gv), total(sum_gs)


@kernel(
    IMAGES,
    EPILOGUE,
    scratch=_one_plane,
    x=MAP,
    shortcut=MAP,
    grad_out=MAP,
    taps=FLOATS,
    moments=FLOATS,
    sums=FLOATS,
)
def sums(call, item, padded):
    """The `SUMS` of every plane: all that the gradients of gates, lambda and the norm's parameters are made of."""
    image, first, end = channels_of(call, item)
    for channel in range(first, end):
        plane = plane_at(call, image, channel)
        read_x(call, image, channel, padded)
        known, found = record_at(call.moments, plane.number, MOMENTS), record_at(call.sums, plane.number, SUMS)
        find_sums(call, plane, padded, floats(call.taps, 9 * channel, 9), known, found)


@primitive
def find_update_gradient(call, plane, padded, taps, decay, gate, form, grad_update, grad_taps):
    """The gradient of y, into the padded `grad_update`, and that of the taps, but for the gate, into `grad_taps`.

    `form` is the `NormGradient` of the plane.
    """
    shortcut, grad_out = elements(call, call.shortcut, plane), elements(call, call.grad_out, plane)
    has_shortcut, height, width = call.shortcut != 0, plane.height, plane.width
    step, start, weights = stride(width), corner(width), nine(taps)
    gates, incoming, constant = spread(gate), spread(form.incoming), spread(form.constant)
    slope, mean, decays = spread(form.slope), spread(form.mean), spread(decay)
    summed = nothing()
    for j in range(0, width, LANES):
        inside, upper, middle = lanes(width - j), row(padded, start + j - step), row(padded, start + j)
        for i in range(height):
            at, lower = i * width + j, row(padded, start + j + (i + 1) * step)
            deviation = gates * convolved(upper, middle, lower, weights) - mean
            fetch(grad_out, at + plane.size)
            if has_shortcut:
                deviation = deviation + decays * load_lanes(shortcut, at, inside)
            here = chosen(incoming * load_lanes(grad_out, at, inside) - constant - slope * deviation, inside)
            store(grad_update, start + i * step + j, here)
            summed = correlated(summed, upper, middle, lower, here)
            upper, middle = middle, lower
    write_nine(summed, grad_taps)


class _GradientScratch(NamedTuple):
    padded: np.ndarray
    grad_update: np.ndarray
    turned: np.ndarray


def _gradient_scratch(call):
    """Room for x and the gradient of y, and for the taps of the way back."""
    return _GradientScratch(_one_plane_of(call), _one_plane_of(call), np.empty(9, np.float32))


_one_plane_of = primitive(_one_plane)


@kernel(
    IMAGES,
    EPILOGUE,
    scratch=_gradient_scratch,
    x=MAP,
    shortcut=MAP,
    grad_out=MAP,
    grad_x=MAP,
    grad_shortcut=MAP,
    taps=FLOATS,
    decay=FLOATS,
    constant=FLOATS,
    slope=FLOATS,
    mean=FLOATS,
    gates=FLOATS,
    incoming=FLOATS,
    pooled=FLOATS,
    grad_taps=FLOATS,
    branch_sums=FLOATS,
)
def gradients(call, item, scratch):
    """Gradients of x (or of its branch, before its norm) and the shortcut, and what each plane gives to the taps'.

    With the update y = gate * v + lambda * s, the gradient of y is incoming[plane] * g - constant - slope * (y - mean),
    constants per channel that carry the norm's batch statistics. What the mean of x gets through the gates comes in as
    `pooled`, one number a plane.
    """
    image, first, end = channels_of(call, item)
    per_head, has_shortcut = call.channels // call.heads, call.shortcut != 0
    padded, grad_update, turned = scratch.padded, scratch.grad_update, scratch.turned
    for channel in range(first, end):
        plane = plane_at(call, image, channel)
        taps, grad_taps = floats(call.taps, 9 * channel, 9), floats(call.grad_taps, 9 * plane.number, 9)
        decay = number_at(call.decay, channel) if has_shortcut else np.float32(0)
        gate = number_at(call.gates, image * call.heads + channel // per_head)
        form = NormGradient(
            number_at(call.incoming, plane.number),
            number_at(call.constant, channel),
            number_at(call.slope, channel),
            number_at(call.mean, channel),
        )
        read_x(call, image, channel, padded)
        find_update_gradient(call, plane, padded, taps, decay, gate, form, grad_update, grad_taps)
        for tap in range(9):
            grad_taps[tap] *= gate
            turned[tap] = taps[8 - tap] * gate
        branch_mean, branch_scale = branch_mean_and_scale(call, channel)
        way_back = MapGradient(number_at(call.pooled, plane.number), decay, branch_mean, branch_scale)
        found = record_at(call.branch_sums, plane.number, BRANCH_SUMS)
        find_map_gradients(call, plane, padded, grad_update, turned, way_back, found)
