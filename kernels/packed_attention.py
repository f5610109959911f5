"""Rotation, cache write and paged attention of `packed_decoder`, on the tuples of `packed_state`."""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from headrace.kernels.packed_linear import BLOCK, quantize
from headrace.kernels.simd import (
    LANES,
    add,
    broadcast,
    exponential,
    larger,
    largest_lane,
    load_floats,
    load_halves,
    multiply,
    multiply_add,
    store_floats,
    store_four_sums,
    store_halves,
    subtract,
    sum_lanes,
    zeros,
)


@njit(nogil=True, forceinline=True)
def _page_of(row, position, shape, inputs):
    return inputs.tables[inputs.request[row] * shape.table_width + position // shape.page_size]


@njit(nogil=True, forceinline=True)
def _page_at(layer, page, values, kv_head, weights, shape):
    """Where the keys (`values` 0) or values (1) of a head begin in a page."""
    block = values * shape.kv_heads + kv_head
    return weights.pages_at[layer] + page * shape.page_stride + block * shape.page_size * shape.head_dim


@njit(nogil=True)
def rotate_and_write(first, end, layer, weights, shape, inputs, buffers):
    """Rotate queries and keys, and put keys and values into the cache."""
    size, half = shape.head_dim, shape.head_dim // 2
    width = (shape.heads + 2 * shape.kv_heads) * size
    for row in range(first, end):
        position = inputs.positions[row]
        angles = row * half
        if layer == 0:
            for i in range(half):
                angle = np.float32(position) * weights.inverse_frequencies[i]
                buffers.cosines[angles + i], buffers.sines[angles + i] = math.cos(angle), math.sin(angle)
        for head in range(shape.heads + shape.kv_heads):
            at = row * width + head * size
            for i in range(0, half, LANES):
                one, other = load_floats(buffers.qkv, at + i), load_floats(buffers.qkv, at + half + i)
                cos, sin = load_floats(buffers.cosines, angles + i), load_floats(buffers.sines, angles + i)
                store_floats(buffers.qkv, at + i, subtract(multiply(one, cos), multiply(other, sin)))
                store_floats(buffers.qkv, at + half + i, add(multiply(other, cos), multiply(one, sin)))
        page, slot = _page_of(row, position, shape, inputs), position % shape.page_size
        for values in range(2):
            for head in range(shape.kv_heads):
                at = row * width + (shape.heads + values * shape.kv_heads + head) * size
                to = _page_at(layer, page, values, head, weights, shape) + slot * size
                for i in range(0, size, LANES):
                    store_halves(weights.pages, to + i, load_floats(buffers.qkv, at + i))


@njit(nogil=True, forceinline=True)
def _scores(queries, query, pages, keys, count, page_size, size, scores, at):
    """Products of one query with `count` keys of a page, and with up to three more that nobody looks at."""
    key = 0
    while key < count:
        place = keys + key * size
        if key + 4 <= page_size:
            a, b, c, d = zeros(), zeros(), zeros(), zeros()
            for i in range(0, size, LANES):
                some = load_floats(queries, query + i)
                a = multiply_add(some, load_halves(pages, place + i), a)
                b = multiply_add(some, load_halves(pages, place + size + i), b)
                c = multiply_add(some, load_halves(pages, place + 2 * size + i), c)
                d = multiply_add(some, load_halves(pages, place + 3 * size + i), d)
            store_four_sums(scores, at + key, a, b, c, d)
            key += 4
        else:
            a = zeros()
            for i in range(0, size, LANES):
                a = multiply_add(load_floats(queries, query + i), load_halves(pages, place + i), a)
            scores[at + key] = sum_lanes(a)
            key += 1


@njit(nogil=True, forceinline=True)
def _softmax(scores, at, count, scaling):
    """Exponentials in place; returns one over their sum. Scores up to the next multiple of 8 are overwritten."""
    for i in range(at + count, at + -(-count // LANES) * LANES):
        scores[i] = -np.inf
    highest = broadcast(scores[at])
    for i in range(at, at + count, LANES):
        highest = larger(load_floats(scores, i), highest)
    highest, factor, total = broadcast(largest_lane(highest)), broadcast(scaling), zeros()
    for i in range(at, at + count, LANES):
        some = exponential(multiply(subtract(load_floats(scores, i), highest), factor))
        store_floats(scores, i, some)
        total = add(total, some)
    return np.float32(1) / sum_lanes(total)


@njit(nogil=True, forceinline=True)
def _add_values(scores, at, pages, values, count, size, out, to):
    """Add `count` values that lie one after the other, each times its weight, 64 numbers at a time, or 32."""
    i = 0
    while size - i >= 8 * LANES:
        a, b = load_floats(out, to + i), load_floats(out, to + i + LANES)
        c, d = load_floats(out, to + i + 2 * LANES), load_floats(out, to + i + 3 * LANES)
        e, f = load_floats(out, to + i + 4 * LANES), load_floats(out, to + i + 5 * LANES)
        g, h = load_floats(out, to + i + 6 * LANES), load_floats(out, to + i + 7 * LANES)
        for key in range(count):
            weight, place = broadcast(scores[at + key]), values + key * size + i
            a = multiply_add(weight, load_halves(pages, place), a)
            b = multiply_add(weight, load_halves(pages, place + LANES), b)
            c = multiply_add(weight, load_halves(pages, place + 2 * LANES), c)
            d = multiply_add(weight, load_halves(pages, place + 3 * LANES), d)
            e = multiply_add(weight, load_halves(pages, place + 4 * LANES), e)
            f = multiply_add(weight, load_halves(pages, place + 5 * LANES), f)
            g = multiply_add(weight, load_halves(pages, place + 6 * LANES), g)
            h = multiply_add(weight, load_halves(pages, place + 7 * LANES), h)
        store_floats(out, to + i, a)
        store_floats(out, to + i + LANES, b)
        store_floats(out, to + i + 2 * LANES, c)
        store_floats(out, to + i + 3 * LANES, d)
        store_floats(out, to + i + 4 * LANES, e)
        store_floats(out, to + i + 5 * LANES, f)
        store_floats(out, to + i + 6 * LANES, g)
        store_floats(out, to + i + 7 * LANES, h)
        i += 8 * LANES
    while i < size:
        a = load_floats(out, to + i)
        for key in range(count):
            place = values + key * size + i
            a = multiply_add(broadcast(scores[at + key]), load_halves(pages, place), a)
        store_floats(out, to + i, a)
        i += LANES


@njit(nogil=True)
def attend(row, kv_head, layer, thread, weights, shape, inputs, buffers):
    """All query heads of a row that share a KV head, over all tokens up to the row's own; rounded for the output."""
    size, group, page_size = shape.head_dim, shape.heads // shape.kv_heads, shape.page_size
    context, longest = inputs.positions[row] + 1, shape.longest
    query = (row * (shape.heads + 2 * shape.kv_heads) + kv_head * group) * size
    scores = thread * group * longest
    for first in range(0, context, page_size):
        count = min(page_size, context - first)
        keys = _page_at(layer, _page_of(row, first, shape, inputs), 0, kv_head, weights, shape)
        for head in range(group):
            at = scores + head * longest + first
            _scores(buffers.qkv, query + head * size, weights.pages, keys, count, page_size, size, buffers.scores, at)
    out = (row * shape.heads + kv_head * group) * size
    for i in range(out, out + group * size, LANES):
        store_floats(buffers.attended, i, zeros())
    scaling = np.float32(1 / math.sqrt(size))
    for head in range(group):
        share = _softmax(buffers.scores, scores + head * longest, context, scaling)
        buffers.shares[thread * group + head] = share
    for first in range(0, context, page_size):
        count = min(page_size, context - first)
        values = _page_at(layer, _page_of(row, first, shape, inputs), 1, kv_head, weights, shape)
        for head in range(group):
            at = scores + head * longest + first
            _add_values(buffers.scores, at, weights.pages, values, count, size, buffers.attended, out + head * size)
    codes, scales, sums = buffers.inner_codes, buffers.inner_scales, buffers.inner_sums
    for head in range(group):
        at, share = out + head * size, buffers.shares[thread * group + head]
        quantize(buffers.attended, at, size, share, codes, at, scales, sums, at // BLOCK)
