"""The kernels of MRLA-base: x + scale * act(norm(sum_s a_s v_s)), each value read where its block has left it.

`num_layers` T is the number of blocks attended to, this one last. Values and keys come as arrays of T addresses, the
block's own last.
"""

from math import exp, sqrt
from typing import NamedTuple

import numpy as np

from .blocks import BRANCH_SUMS, MapGradient, clear_ends, find_map_gradients, read_x, slide
from .compiling import kernel, primitive
from .memory import channels_of, elements, floats, integers, number_at, number_or, plane_at, record_at, records
from .norms import NormGradient, branch_mean_and_scale, line_of_branch, line_of_update
from .planes import convolved, corner, correlated, nine, nothing, padded_length, rectified, row, stride, write_nine
from .records import EPILOGUE, FLOATS, IMAGES, INTEGER, INTEGERS, MAP, NO_EPILOGUE, SCALES, UPDATE_NORM, number_record
from .vectors import (
    AHEAD,
    LANES,
    as_stored,
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

MOMENTS = number_record("mean", "yy")
"""Per plane: the mean of y and the sum of (y - mean)^2."""

SUMS = number_record("z", "zy", "g_act")
"""Per plane: the sums of z, of z (y - mean) and of g act(norm(y)), where z is the gradient of norm(y)."""

VALUE_SUMS = number_record("v", "zv", "yv")
"""Per plane and value: the sums of v, of z v and of (y - mean) v."""

_RUNS = len(VALUE_SUMS)
"""Runs of lanes that a value's sums take while a plane is worked on."""

PENDING = number_record("grad_update", "attn", "num_layers", "layer", number=np.int64)
"""What a later block has left for this one's value: the addresses of the gradient of its y and of its heads' weights,
of how many layers, and which of those this block is."""


@primitive
def weigh(query, keys, at, softmax, attn):
    """Attention weights of one head over the layers; `at` is where the head's channels are in every key."""
    largest = np.float32(-np.inf)
    for layer in range(len(attn)):
        key = floats(keys[layer], at, len(query))
        score = np.float32(0)
        for channel in range(len(query)):
            score += query[channel] * key[channel]
        attn[layer] = score / np.float32(sqrt(len(query)))
        largest = max(largest, attn[layer])
    summed = np.float32(0)
    for layer in range(len(attn)):
        attn[layer] = exp(attn[layer] - largest) if softmax else 1 / (1 + exp(-attn[layer]))
        summed += attn[layer]
    if softmax:
        for layer in range(len(attn)):
            attn[layer] /= summed


@primitive
def update_scale(call, plane):
    """What multiplies a plane's update: the scale and DropPath's factor."""
    return number_or(call.scale, plane.channel, 1) * number_or(call.drop_scale, plane.image, 1)


@primitive
def mixed(call, plane, values, attn, count, at, inside):
    """A run of sum_s a_s v_s over the first `count` layers; prefetches the next plane of each value."""
    summed = spread(np.float32(0))
    for layer in range(count):
        value = elements(call, values[layer], plane)
        fetch(value, at + plane.size)
        summed = summed + spread(attn[layer]) * load_lanes(value, at, inside)
    return summed


@primitive
def follow(call, plane, padded, ahead, taps, values, attn, line, factor):
    """One plane of the block's own value, where it is stored, and of x + factor * act(norm(y))."""
    x, shortcut, out = (
        elements(call, call.x, plane), elements(call, call.shortcut, plane), elements(call, call.out, plane)
    )  # fmt: skip
    rectify, height, width, own = call.rectify != 0, plane.height, plane.width, len(attn) - 1
    step, start, kernel_weights = stride(width), corner(width), nine(taps)
    scale, shift, factors, own_attn = spread(line.scale), spread(line.shift), spread(factor), spread(attn[own])
    store_value, value = values[own] != 0, elements(call, values[own], plane)
    for j in range(0, width, LANES):
        inside, upper, middle = lanes(width - j), row(padded, start + j - step), row(padded, start + j)
        for i in range(height):
            at, lower = i * width + j, row(padded, start + j + (i + 1) * step)
            fetch(x, at + ahead)
            fetch(shortcut, at + ahead)
            mine = as_stored(convolved(upper, middle, lower, kernel_weights), x)
            if store_value:
                store_lanes(value, at, mine, inside)
            y = mixed(call, plane, values, attn, own, at, inside) + own_attn * mine
            update = y * scale + shift
            if rectify:
                update = where_positive(update, update)
            store_lanes(out, at, middle[1] + factors * update, inside)
            upper, middle = middle, lower


@primitive
def collect(call, plane, padded, ahead, taps, values, attn, found):
    """One plane of the block's own value and of y, and the `MOMENTS` of y."""
    x, shortcut, out = (
        elements(call, call.x, plane), elements(call, call.shortcut, plane), elements(call, call.out, plane)
    )  # fmt: skip
    height, width, own = plane.height, plane.width, len(attn) - 1
    step, start, kernel_weights, own_attn = stride(width), corner(width), nine(taps), spread(attn[own])
    value = elements(call, values[own], plane)
    near = off = square = spread(np.float32(0))
    for j in range(0, width, LANES):
        inside, upper, middle = lanes(width - j), row(padded, start + j - step), row(padded, start + j)
        for i in range(height):
            at, lower = i * width + j, row(padded, start + j + (i + 1) * step)
            fetch(x, at + ahead)
            fetch(shortcut, at + ahead)
            mine = as_stored(convolved(upper, middle, lower, kernel_weights), x)
            upper, middle = middle, lower
            store_lanes(value, at, mine, inside)
            y = mixed(call, plane, values, attn, own, at, inside) + own_attn * mine
            store_lanes(out, at, y, inside)
            if at == 0:
                # Sums around a value of the plane: of the plain squares little would be left after subtraction.
                near = spread(total(chosen(y, lanes(1))))
            deviation = chosen(y - near, inside)
            off, square = off + deviation, square + deviation * deviation
    summed, size = total(off), np.float32(plane.size)
    found.mean = total(chosen(near, lanes(1))) + summed / size
    found.yy = total(square) - summed * summed / size


def _ring(call):
    """The planes that wait for their head's turn."""
    slots = min(call.channels, call.channels // call.heads + 2 * (call.kernel_size // 2))
    return np.zeros((slots, padded_length(call.height, call.width)), np.float32)


@kernel(
    IMAGES,
    EPILOGUE,
    UPDATE_NORM,
    SCALES,
    scratch=_ring,
    num_layers=INTEGER,
    softmax=INTEGER,
    rectify=INTEGER,
    by_batch=INTEGER,
    x=MAP,
    shortcut=MAP,
    out=MAP,
    taps=FLOATS,
    values=INTEGERS,
    keys=INTEGERS,
    query=FLOATS,
    query_weight=FLOATS,
    key_weight=FLOATS,
    attn=FLOATS,
    means=FLOATS,
    moments=FLOATS,
)
def apply(call, item, ring):
    """The block's value, its key and query, its attention over layers, and the output.

    Where the norm goes by its batch, the output is y, not yet normed, with its `MOMENTS`; `finish` does the rest.
    """
    channels, heads, num_layers, slots = call.channels, call.heads, call.num_layers, len(ring)
    softmax, by_batch = call.softmax != 0, call.by_batch != 0
    size, per_head, half_kernel = call.height * call.width, channels // heads, call.kernel_size // 2
    query_weight, key_weight = (
        floats(call.query_weight, 0, call.kernel_size),
        floats(call.key_weight, 0, call.kernel_size),
    )
    values, keys = integers(call.values, num_layers), integers(call.keys, num_layers)
    image, chunk = item // call.chunks, item % call.chunks
    length = channels + 2 * half_kernel
    means = floats(call.means, image * length, length)
    clear_ends(means, half_kernel)
    first, last = heads * chunk // call.chunks, heads * (chunk + 1) // call.chunks
    pooled = max(0, first * per_head - half_kernel)
    for head in range(first, last):
        start, end = head * per_head, (head + 1) * per_head
        for channel in range(pooled, min(channels, end + half_kernel)):
            means[half_kernel + channel] = read_x(call, image, channel, ring[channel % slots]) / np.float32(size)
        pooled = min(channels, end + half_kernel)
        query = floats(call.query, image * channels + start, per_head)
        slide(means, query_weight, start, query)
        slide(means, key_weight, start, floats(keys[num_layers - 1], image * channels + start, per_head))
        attn = floats(call.attn, (image * heads + head) * num_layers, num_layers)
        weigh(query, keys, image * channels + start, softmax, attn)
        for channel in range(start, end):
            plane, padded = plane_at(call, image, channel), ring[channel % slots]
            taps, ahead = floats(call.taps, 9 * channel, 9), size * (per_head + half_kernel)
            if by_batch:
                found = record_at(call.moments, plane.number, MOMENTS)
                collect(call, plane, padded, ahead, taps, values, attn, found)
            else:
                line, factor = line_of_update(call, channel), update_scale(call, plane)
                follow(call, plane, padded, ahead, taps, values, attn, line, factor)


@primitive
def follow_stored(call, plane, update_line, factor):
    """One plane of `finish`."""
    x, shortcut, out = (
        elements(call, call.x, plane), elements(call, call.shortcut, plane), elements(call, call.out, plane)
    )  # fmt: skip
    branch_line, has_epilogue = line_of_branch(call, plane.channel), call.epilogue != NO_EPILOGUE
    rectify, size = call.rectify != 0, plane.size
    scale, shift, factors = spread(update_line.scale), spread(update_line.shift), spread(factor)
    branch_scale, branch_shift = spread(branch_line.scale), spread(branch_line.shift)
    for at in range(0, size, LANES):
        inside = lanes(size - at)
        fetch(x, at + AHEAD)
        fetch(out, at + AHEAD)
        found = load_lanes(x, at, inside)
        if has_epilogue:
            fetch(shortcut, at + AHEAD)
            found = rectified(found, load_lanes(shortcut, at, inside), branch_scale, branch_shift, x)
        update = load_lanes(out, at, inside) * scale + shift
        if rectify:
            update = where_positive(update, update)
        store_lanes(out, at, found + factors * update, inside)


@kernel(IMAGES, EPILOGUE, UPDATE_NORM, SCALES, rectify=INTEGER, x=MAP, shortcut=MAP, out=MAP)
def finish(call, item):
    """The output x + factor * act(norm(y)), where the output holds y."""
    image, first, end = channels_of(call, item)
    for channel in range(first, end):
        plane = plane_at(call, image, channel)
        follow_stored(call, plane, line_of_update(call, channel), update_scale(call, plane))


@primitive
def find_sums(call, plane, values, attn, room, found, value_sums):
    """The `SUMS` of one plane, the `VALUE_SUMS` of every value, and y; `room` is for a run of each value's sums."""
    out, grad_out = elements(call, call.grad_x, plane), elements(call, call.grad_out, plane)
    line, num_layers, rectify, size = line_of_update(call, plane.channel), len(attn), call.rectify != 0, plane.size
    scale, shift = spread(line.scale), spread(line.shift)
    mean, factor = spread(number_at(call.norm_mean, plane.channel)), spread(update_scale(call, plane))
    sum_z = sum_zy = sum_g_act = spread(np.float32(0))
    for at in range(0, _RUNS * num_layers * LANES, LANES):
        store(room, at, sum_z)
    for at in range(0, size, LANES):
        inside = lanes(size - at)
        y = as_stored(mixed(call, plane, values, attn, num_layers, at, inside), out)
        store_lanes(out, at, y, inside)
        fetch(grad_out, at + size)
        g, normed, deviation = load_lanes(grad_out, at, inside), y * scale + shift, chosen(y - mean, inside)
        z = g * factor
        if rectify:
            sum_g_act = sum_g_act + g * where_positive(normed, normed)
            z = where_positive(normed, z)
        else:
            sum_g_act = sum_g_act + g * normed
        sum_z, sum_zy = sum_z + z, sum_zy + z * deviation
        for layer in range(num_layers):
            value = load_lanes(elements(call, values[layer], plane), at, inside)
            run = _RUNS * layer * LANES
            store(room, run, load(room, run) + value)
            store(room, run + LANES, load(room, run + LANES) + value * z)
            store(room, run + 2 * LANES, load(room, run + 2 * LANES) + value * deviation)
    found.z, found.zy, found.g_act = total(sum_z), total(sum_zy), total(sum_g_act)
    for layer in range(num_layers):
        run, of_value = _RUNS * layer * LANES, value_sums[layer]
        of_value.v, of_value.zv = total(load(room, run)), total(load(room, run + LANES))
        of_value.yv = total(load(room, run + 2 * LANES))


def _value_runs(call):
    """A run for each of the `VALUE_SUMS` of every layer."""
    return np.empty(_RUNS * call.num_layers * LANES, np.float32)


@kernel(
    IMAGES,
    UPDATE_NORM,
    SCALES,
    scratch=_value_runs,
    num_layers=INTEGER,
    rectify=INTEGER,
    grad_out=MAP,
    grad_x=MAP,
    values=INTEGERS,
    attn=FLOATS,
    sums=FLOATS,
    value_sums=FLOATS,
)
def sums(call, item, room):
    """The `SUMS` and `VALUE_SUMS` of every plane, all that the small gradients are made of, and y for `gradients`.

    y goes where the gradient of x will be.
    """
    num_layers, per_head = call.num_layers, call.channels // call.heads
    values = integers(call.values, num_layers)
    image, first, end = channels_of(call, item)
    for channel in range(first, end):
        plane = plane_at(call, image, channel)
        attn = floats(call.attn, (image * call.heads + channel // per_head) * num_layers, num_layers)
        found = record_at(call.sums, plane.number, SUMS)
        value_sums = records(call.value_sums, plane.number * num_layers, num_layers, VALUE_SUMS)
        find_sums(call, plane, values, attn, room, found, value_sums)


@primitive
def find_update_gradient(call, plane, attn, form, pending, pending_attn, padded, x_padded, grad_taps):
    """The gradient of y, into `call.grad_update` where that is wanted, and what follows from it.

    The gradient of the block's own value goes into `padded`, that of its taps into `grad_taps`; those of earlier values
    where `call.grad_values` names a place.

    Args:
        call: With y where the gradient of x goes, and `grad_value`, what else reaches the block's own value.
        plane: Which.
        attn: The head's attention weights.
        form: The `NormGradient` of the plane.
        pending: Addresses where later blocks have left the gradient of their y.
        pending_attn: What they took of this block's value.
        padded: Room.
        x_padded: x.
        grad_taps: Room.
    """
    y_plane, grad_out = elements(call, call.grad_x, plane), elements(call, call.grad_out, plane)
    grad_value, has_grad_value = elements(call, call.grad_value, plane), call.grad_value != 0
    grad_update, store_update = elements(call, call.grad_update, plane), call.grad_update != 0
    grad_values, rectify = integers(call.grad_values, len(attn)), call.rectify != 0
    height, width, size, own = plane.height, plane.width, plane.size, len(attn) - 1
    line, step, start = line_of_update(call, plane.channel), stride(width), corner(width)
    scale, shift, mean = spread(line.scale), spread(line.shift), spread(form.mean)
    factor, incoming = spread(update_scale(call, plane)), spread(form.incoming)
    constant, slope = spread(form.constant), spread(form.slope)
    summed, own_attn = nothing(), spread(attn[own])
    for j in range(0, width, LANES):
        inside, upper, middle = lanes(width - j), row(x_padded, start + j - step), row(x_padded, start + j)
        for i in range(height):
            at, lower = i * width + j, row(x_padded, start + j + (i + 1) * step)
            fetch(y_plane, at + size)
            fetch(grad_out, at + size)
            y, z = load_lanes(y_plane, at, inside), load_lanes(grad_out, at, inside) * factor
            if rectify:
                z = where_positive(y * scale + shift, z)
            grad_y = chosen(incoming * z - constant - slope * (y - mean), inside)
            here = own_attn * grad_y + mixed(call, plane, pending, pending_attn, len(pending_attn), at, inside)
            if has_grad_value:
                here = here + load_lanes(grad_value, at, inside)
            if store_update:
                store_lanes(grad_update, at, grad_y, inside)
            for layer in range(own):
                if grad_values[layer] != 0:
                    found = spread(attn[layer]) * grad_y
                    store_lanes(elements(call, grad_values[layer], plane), at, found, inside)
            store(padded, start + i * step + j, here)
            summed = correlated(summed, upper, middle, lower, here)
            upper, middle = middle, lower
    write_nine(summed, grad_taps)


class _GradientScratch(NamedTuple):
    x_padded: np.ndarray
    padded: np.ndarray
    turned: np.ndarray
    pending: np.ndarray
    pending_attn: np.ndarray


def _gradient_scratch(call):
    """Room for x and the gradient of the block's value, the taps of the way back, and what later blocks have left."""
    length, rows = padded_length(call.height, call.width), records(call.pending, 0, call.num_pending, PENDING)
    pending = np.empty(call.num_pending, np.int64)
    for later in range(call.num_pending):
        pending[later] = rows[later].grad_update
    return _GradientScratch(
        np.zeros(length, np.float32),
        np.zeros(length, np.float32),
        np.empty(9, np.float32),
        pending,
        np.empty(call.num_pending, np.float32),
    )


@kernel(
    IMAGES,
    EPILOGUE,
    UPDATE_NORM,
    SCALES,
    scratch=_gradient_scratch,
    num_layers=INTEGER,
    rectify=INTEGER,
    num_pending=INTEGER,
    x=MAP,
    shortcut=MAP,
    grad_out=MAP,
    grad_value=MAP,
    grad_x=MAP,
    grad_shortcut=MAP,
    grad_update=MAP,
    grad_values=INTEGERS,
    pending=INTEGERS,
    attn=FLOATS,
    taps=FLOATS,
    incoming=FLOATS,
    constant=FLOATS,
    slope=FLOATS,
    pooled=FLOATS,
    grad_taps=FLOATS,
    branch_sums=FLOATS,
)
def gradients(call, item, scratch):
    """Gradients of x (or of its branch, before its norm), the shortcut and y; of each plane's taps.

    With z the gradient of norm(y), that of y is incoming * z - constant - slope * (y - mean), numbers per channel that
    carry the norm's batch statistics. What the mean of x gets through query and key comes in as `pooled`. Where the
    gradient of x goes, y is at first.
    """
    num_layers, per_head = call.num_layers, call.channels // call.heads
    rows = records(call.pending, 0, call.num_pending, PENDING)
    padded, x_padded, turned, pending_attn = scratch.padded, scratch.x_padded, scratch.turned, scratch.pending_attn
    image, first, end = channels_of(call, item)
    for channel in range(first, end):
        plane, head = plane_at(call, image, channel), image * call.heads + channel // per_head
        for later in range(call.num_pending):
            left = rows[later]
            pending_attn[later] = number_at(left.attn, head * left.num_layers + left.layer)
        attn = floats(call.attn, head * num_layers, num_layers)
        taps, grad_taps = floats(call.taps, 9 * channel, 9), floats(call.grad_taps, 9 * plane.number, 9)
        form = NormGradient(
            number_at(call.incoming, channel),
            number_at(call.constant, channel),
            number_at(call.slope, channel),
            number_at(call.norm_mean, channel),
        )
        read_x(call, image, channel, x_padded)
        find_update_gradient(call, plane, attn, form, scratch.pending, pending_attn, padded, x_padded, grad_taps)
        for tap in range(9):
            turned[tap] = taps[8 - tap]
        branch_mean, branch_scale = branch_mean_and_scale(call, channel)
        way_back = MapGradient(number_at(call.pooled, plane.number), np.float32(0), branch_mean, branch_scale)
        found = record_at(call.branch_sums, plane.number, BRANCH_SUMS)
        find_map_gradients(call, plane, x_padded, padded, turned, way_back, found)
