"""Rotation, cache write and paged attention of `packed_decoder`, on the tuples of `packed_state`."""

from __future__ import annotations

import math

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from headrace.kernels.packed_linear import BLOCK, INPUT, quantize
from headrace.kernels.simd import (
    F32,
    FLOATS,
    LANES,
    Vectors,
    add,
    broadcast,
    exponential,
    four_sums,
    fused_multiply_add,
    half_vector,
    larger,
    largest_lane,
    load,
    load_floats,
    multiply,
    pointer,
    splat,
    store,
    store_floats,
    store_halves,
    subtract,
    sum_lanes,
    zeros,
)

AT_ONCE = 4
"""Keys, or vectors of a value, that meet all queries while they are in registers."""
MAX_HEADS = 3
"""Queries that share them: 3 x 4 sums, 3 queries and a key are the 16 registers."""


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


def _for_heads(heads):
    """Scores and weighted values of `heads` queries of a KV head: what is loaded and widened serves them all."""
    sums = Vectors(FLOATS, heads * AT_ONCE)

    def at(builder, index, step, count):
        return builder.add(index, builder.mul(step, step.type(count)))

    def add_all(builder, totals, of_head, of_four):
        """Adds `of_head(h) * of_four(j)` to vector h * 4 + j."""
        left = [of_head(head) for head in range(heads)]
        for j in range(AT_ONCE):
            right = of_four(j)
            for index, factor in enumerate(left):
                place = index * AT_ONCE + j
                total = fused_multiply_add(builder, factor, right, builder.extract_value(totals, place))
                totals = builder.insert_value(totals, total, place)
        return totals

    @intrinsic
    def no_sums(typing):
        return sums(), lambda context, builder, signature, given: ir.Constant(
            sums.ir, [ir.Constant(FLOATS, [0.0] * LANES)] * sums.ir.count
        )

    @intrinsic
    def add_products(typing, totals, queries, query, pages, key, size):
        """Of 8 numbers of each query, `size` apart, and of four keys."""

        def generate(context, builder, signature, given):
            totals, queries, query, pages, key, size = given

            def of_head(head):
                place = at(builder, query, size, head)
                return load(builder, pointer(context, builder, signature.args[1], queries, place, FLOATS))

            def of_key(j):
                return half_vector(context, builder, signature.args[3], pages, at(builder, key, size, j))

            return add_all(builder, totals, of_head, of_key)

        return sums(sums, queries, types.intp, pages, types.intp, types.intp), generate

    @intrinsic
    def store_scores(typing, totals, scores, first, longest):
        """Four scores of each head, `longest` apart."""

        def generate(context, builder, signature, given):
            totals, scores, first, longest = given
            for head in range(heads):
                vectors = [builder.extract_value(totals, head * AT_ONCE + j) for j in range(AT_ONCE)]
                four, place = four_sums(builder, *vectors), at(builder, first, longest, head)
                store(builder, four, pointer(context, builder, signature.args[1], scores, place, four.type))
            return context.get_dummy_value()

        return types.void(sums, scores, types.intp, types.intp), generate

    @intrinsic
    def add_weighted(typing, totals, scores, score, longest, pages, value):
        """32 numbers of a value times each head's score."""

        def generate(context, builder, signature, given):
            totals, scores, score, longest, pages, value = given

            def of_head(head):
                place = at(builder, score, longest, head)
                weight = load(builder, pointer(context, builder, signature.args[1], scores, place, F32))
                return splat(builder, weight, FLOATS)

            def of_value(j):
                return half_vector(context, builder, signature.args[4], pages, at(builder, value, value.type(LANES), j))

            return add_all(builder, totals, of_head, of_value)

        return sums(sums, scores, types.intp, types.intp, pages, types.intp), generate

    def each(context, builder, kind, out, to, size):
        """Where the 32 numbers of each head are, `size` apart."""
        for index in range(sums.ir.count):
            place = builder.add(at(builder, to, size, index // AT_ONCE), to.type(index % AT_ONCE * LANES))
            yield index, pointer(context, builder, kind, out, place, FLOATS)

    @intrinsic
    def load_outputs(typing, out, to, size):
        def generate(context, builder, signature, given):
            totals = ir.Constant(sums.ir, ir.Undefined)
            for index, address in each(context, builder, signature.args[0], *given):
                totals = builder.insert_value(totals, load(builder, address), index)
            return totals

        return sums(out, types.intp, types.intp), generate

    @intrinsic
    def store_outputs(typing, totals, out, to, size):
        def generate(context, builder, signature, given):
            for index, address in each(context, builder, signature.args[1], *given[1:]):
                store(builder, builder.extract_value(given[0], index), address)
            return context.get_dummy_value()

        return types.void(sums, out, types.intp, types.intp), generate

    @njit(nogil=True, forceinline=True)
    def score(queries, query, pages, keys, count, size, scores, first, longest):
        """Products with `count` keys that lie one after the other, and with up to three more that nobody looks at."""
        for key in range(0, count, AT_ONCE):
            totals = no_sums()
            for i in range(0, size, LANES):
                totals = add_products(totals, queries, query + i, pages, keys + key * size + i, size)
            store_scores(totals, scores, first + key, longest)

    @njit(nogil=True, forceinline=True)
    def add_values(scores, first, longest, pages, values, count, size, out, to):
        """Add `count` values that lie one after the other, each times its weight, to each head's output."""
        for i in range(0, size, AT_ONCE * LANES):
            totals = load_outputs(out, to + i, size)
            for key in range(count):
                totals = add_weighted(totals, scores, first + key, longest, pages, values + key * size + i)
            store_outputs(totals, out, to + i, size)

    return score, add_values


_score_1, _add_values_1 = _for_heads(1)
_score_3, _add_values_3 = _for_heads(MAX_HEADS)


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
        head, at = 0, scores + first
        while group - head >= MAX_HEADS:
            _score_3(buffers.qkv, query + head * size, weights.pages, keys, count, size, buffers.scores, at, longest)
            head, at = head + MAX_HEADS, at + MAX_HEADS * longest
        while head < group:
            _score_1(buffers.qkv, query + head * size, weights.pages, keys, count, size, buffers.scores, at, longest)
            head, at = head + 1, at + longest
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
        to, at, end = out, scores + first, out + group * size
        while end - to >= MAX_HEADS * size:
            _add_values_3(buffers.scores, at, longest, weights.pages, values, count, size, buffers.attended, to)
            to, at = to + MAX_HEADS * size, at + MAX_HEADS * longest
        while to < end:
            _add_values_1(buffers.scores, at, longest, weights.pages, values, count, size, buffers.attended, to)
            to, at = to + size, at + longest
    for head in range(group):
        at, share = out + head * size, buffers.shares[thread * group + head]
        quantize(buffers.attended, at, size, share, buffers.inner_inputs, at // BLOCK * INPUT)
