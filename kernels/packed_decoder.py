"""A whole decoder of Llama's shape with packed weights on a CPU: one call of a compiled function for all layers.

The work is a list of *phases*, eight a layer and three for the logits, each cut into *chunks*. Threads take chunks of
the current phase from one counter, and whoever ends the last one opens the next phase. So nobody waits for a thread
that does not run, be it that another process has its core: the others do its part.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numba import njit

from headrace.kernels.packed_linear import BLOCK, RECORD, project, quantize
from headrace.kernels.simd import (
    LANES,
    add,
    add_atomic,
    broadcast,
    compare_and_swap,
    divide,
    larger,
    largest_lane,
    load_acquire,
    load_floats,
    load_halves,
    multiply,
    multiply_add,
    pause,
    post_semaphore,
    rounded,
    smaller,
    store_floats,
    store_four_sums,
    store_halves,
    store_release,
    subtract,
    sum_lanes,
    times_power_of_two,
    wait_semaphore,
    yield_processor,
    zeros,
)

INPUT_NORM, QKV, ROPE, ATTENTION, OUTPUT, MLP_NORM, GATE_UP, DOWN = range(8)
PHASES_OF_LAYER = 8
LAST_NORM, HEAD_INPUT, HEAD = range(3)
"""Phases after the layers."""
CHUNKS = 16
"""About so many a phase: few enough to cost nothing, enough that threads end together."""
ROW_CHUNKS = 64
HEAD_GROUPS = 64
"""Groups of the head's outputs in a chunk."""
SPINS = 4000
"""Looks for work before a thread lets others have the core, some 100 microseconds."""

TICKET, DONE, STEP, END, ROWS, OUTPUT_ROWS, STOP = range(0, 56, 8)
"""Places in the control array, each in a line of the cache of its own. The ticket holds step << 32 | phase << 16 | next
chunk."""
NO_PHASE = 0xFFFF
CONTROL_SIZE = 64


class Weights(NamedTuple):
    """All flat. `records` of a projection are those of all layers, one after the other."""

    input_norms: np.ndarray
    qkv: np.ndarray
    output: np.ndarray
    mlp_norms: np.ndarray
    gate_up: np.ndarray
    """Rows in turn: 32 of the gate, the same 32 of up."""
    down: np.ndarray
    norm: np.ndarray
    head: np.ndarray
    inverse_frequencies: np.ndarray
    pages: np.ndarray
    """The KV cache, bits of float16 [layers, pages, 2, KV heads, page size, head size]."""


class Shape(NamedTuple):
    """Numbers of the model and its cache."""

    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    head_copies: int
    num_pages: int
    page_size: int
    table_width: int
    longest: int
    """Room for the scores of a context, whole pages and a multiple of 8."""
    eps: float


class Inputs(NamedTuple):
    """int64; `tables` is [requests, table_width], and `request` names each row's."""

    positions: np.ndarray
    request: np.ndarray
    tables: np.ndarray


class Buffers(NamedTuple):
    """float32, but int8 for what ends in codes; a row for each token, and for the head one for each row of logits."""

    residual: np.ndarray
    cosines: np.ndarray
    sines: np.ndarray
    hidden: np.ndarray
    qkv: np.ndarray
    attended: np.ndarray
    gate_up: np.ndarray
    logits: np.ndarray
    codes: np.ndarray
    scales: np.ndarray
    sums: np.ndarray
    inner_codes: np.ndarray
    inner_scales: np.ndarray
    inner_sums: np.ndarray
    shares: np.ndarray
    """[threads, query heads of a KV head]: one over the sum of a softmax."""
    scores: np.ndarray
    """[threads, query heads of a KV head, longest context]: before and after the softmax."""


@njit(nogil=True)
def _chunks(phase, shape, control):
    """How many chunks a phase has."""
    rows = control[ROWS]
    of_rows = min(rows, ROW_CHUNKS)
    after = phase - shape.layers * PHASES_OF_LAYER
    if after >= 0:
        if after == HEAD:
            return -(-(shape.vocabulary // LANES) // HEAD_GROUPS)
        return of_rows if after == LAST_NORM else min(control[OUTPUT_ROWS], ROW_CHUNKS)
    kind = phase % PHASES_OF_LAYER
    if kind in (INPUT_NORM, ROPE, MLP_NORM):
        return of_rows
    if kind == ATTENTION:
        return of_rows * shape.kv_heads
    if kind == GATE_UP:
        return min(shape.inner // BLOCK, CHUNKS)
    return min(shape.hidden // LANES, CHUNKS)


@njit(nogil=True, forceinline=True)
def _part(chunk, chunks, whole):
    """Where a chunk's part of something begins and ends."""
    return whole * chunk // chunks, whole * (chunk + 1) // chunks


@njit(nogil=True, forceinline=True)
def _exp(x):
    """Exponentials of eight, to 7 digits."""
    power = multiply(x, broadcast(np.float32(1.4426950408889634)))
    power = smaller(larger(power, broadcast(np.float32(-126))), broadcast(np.float32(126)))
    whole = rounded(power)
    part = multiply(subtract(power, whole), broadcast(np.float32(0.6931471805599453)))
    value = broadcast(np.float32(1 / 720))
    value = multiply_add(value, part, broadcast(np.float32(1 / 120)))
    value = multiply_add(value, part, broadcast(np.float32(1 / 24)))
    value = multiply_add(value, part, broadcast(np.float32(1 / 6)))
    value = multiply_add(value, part, broadcast(np.float32(0.5)))
    value = multiply_add(value, part, broadcast(np.float32(1)))
    value = multiply_add(value, part, broadcast(np.float32(1)))
    return times_power_of_two(value, whole)


@njit(nogil=True, forceinline=True)
def _normalize(row, size, residual, weights, weight, eps, out):
    """See `rms_norm`."""
    squares = zeros()
    for i in range(row * size, (row + 1) * size, LANES):
        some = load_floats(residual, i)
        squares = multiply_add(some, some, squares)
    scale = broadcast(np.float32(1) / np.sqrt(sum_lanes(squares) / np.float32(size) + np.float32(eps)))
    for i in range(0, size, LANES):
        normed = multiply(load_floats(residual, row * size + i), scale)
        store_floats(out, row * size + i, multiply(normed, load_floats(weights, weight + i)))


@njit(nogil=True)
def _normalize_rows(first, end, weights, weight, shape, buffers):
    """RMS norm of the residual stream, rounded for the projection that follows."""
    size, blocks, one = shape.hidden, shape.hidden // BLOCK, np.float32(1)
    for row in range(first, end):
        _normalize(row, size, buffers.residual, weights, weight, shape.eps, buffers.hidden)
        at = row * size
        quantize(buffers.hidden, at, size, one, buffers.codes, at, buffers.scales, buffers.sums, row * blocks)


@njit(nogil=True, forceinline=True)
def _page_of(row, position, shape, inputs):
    return inputs.tables[inputs.request[row] * shape.table_width + position // shape.page_size]


@njit(nogil=True, forceinline=True)
def _page_at(layer, page, values, kv_head, shape):
    """Where the keys (`values` 0) or values (1) of a head begin in a page."""
    block = ((layer * shape.num_pages + page) * 2 + values) * shape.kv_heads + kv_head
    return block * shape.page_size * shape.head_dim


@njit(nogil=True)
def _rotate_and_write(first, end, layer, weights, shape, inputs, buffers):
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
                to = _page_at(layer, page, values, head, shape) + slot * size
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
        some = _exp(multiply(subtract(load_floats(scores, i), highest), factor))
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
def _attend(row, kv_head, layer, thread, weights, shape, inputs, buffers):
    """All query heads of a row that share a KV head, over all tokens up to the row's own; rounded for the output."""
    size, group, page_size = shape.head_dim, shape.heads // shape.kv_heads, shape.page_size
    context, longest = inputs.positions[row] + 1, shape.longest
    query = (row * (shape.heads + 2 * shape.kv_heads) + kv_head * group) * size
    scores = thread * group * longest
    for first in range(0, context, page_size):
        count = min(page_size, context - first)
        keys = _page_at(layer, _page_of(row, first, shape, inputs), 0, kv_head, shape)
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
        values = _page_at(layer, _page_of(row, first, shape, inputs), 1, kv_head, shape)
        for head in range(group):
            at = scores + head * longest + first
            _add_values(buffers.scores, at, weights.pages, values, count, size, buffers.attended, out + head * size)
    codes, scales, sums = buffers.inner_codes, buffers.inner_scales, buffers.inner_sums
    for head in range(group):
        at, share = out + head * size, buffers.shares[thread * group + head]
        quantize(buffers.attended, at, size, share, codes, at, scales, sums, at // BLOCK)


@njit(nogil=True, forceinline=True)
def _activate(gate_up, gate, up):
    """SiLU of a block of the gate, times up, in place of the gate."""
    one = broadcast(np.float32(1))
    for i in range(0, BLOCK, LANES):
        x = load_floats(gate_up, gate + i)
        sigmoid = divide(one, add(one, _exp(subtract(zeros(), x))))
        store_floats(gate_up, gate + i, multiply(multiply(x, sigmoid), load_floats(gate_up, up + i)))


@njit(nogil=True)
def _gate_up(first, end, layer, weights, shape, rows, buffers):
    """Blocks `first` to `end` of the inner activations of all rows."""
    blocks, groups = shape.hidden // BLOCK, 2 * BLOCK // LANES
    base = (layer * 2 * shape.inner // LANES + first * groups) * blocks * RECORD
    inputs = (buffers.codes, buffers.scales, buffers.sums)
    width, inner_blocks = 2 * shape.inner, shape.inner // BLOCK
    column = first * 2 * BLOCK
    codes, scales, sums = buffers.inner_codes, buffers.inner_scales, buffers.inner_sums
    project(
        weights.gate_up, base, blocks, (end - first) * groups, inputs, rows, buffers.gate_up, column, width, np.int64(0)
    )
    for row in range(rows):
        for block in range(first, end):
            at = row * width + block * 2 * BLOCK
            _activate(buffers.gate_up, at, at + BLOCK)
            to = row * inner_blocks + block
            quantize(buffers.gate_up, at, BLOCK, np.float32(1), codes, to * BLOCK, scales, sums, to)


@njit(nogil=True)
def _project(first, end, layer, records, outputs, size, inputs, rows, out, is_sum):
    """Groups `first` to `end` of a projection of all rows."""
    blocks = size // BLOCK
    base = (layer * outputs // LANES + first) * blocks * RECORD
    project(records, base, blocks, end - first, inputs, rows, out, first * LANES, outputs, is_sum)


@njit(nogil=True)
def _run_in_layer(kind, layer, chunk, chunks, thread, weights, shape, inputs, buffers, rows):
    hidden_inputs = (buffers.codes, buffers.scales, buffers.sums)
    inner_inputs = (buffers.inner_codes, buffers.inner_scales, buffers.inner_sums)
    first, end = _part(chunk, chunks, rows)
    if kind == INPUT_NORM:
        _normalize_rows(first, end, weights.input_norms, layer * shape.hidden, shape, buffers)
    elif kind == MLP_NORM:
        _normalize_rows(first, end, weights.mlp_norms, layer * shape.hidden, shape, buffers)
    elif kind == ROPE:
        _rotate_and_write(first, end, layer, weights, shape, inputs, buffers)
    elif kind == ATTENTION:
        first, end = _part(chunk // shape.kv_heads, chunks // shape.kv_heads, rows)
        for row in range(first, end):
            _attend(row, chunk % shape.kv_heads, layer, thread, weights, shape, inputs, buffers)
    elif kind == QKV:
        outputs = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
        first, end = _part(chunk, chunks, outputs // LANES)
        _project(first, end, layer, weights.qkv, outputs, shape.hidden, hidden_inputs, rows, buffers.qkv, np.int64(0))
    elif kind == GATE_UP:
        first, end = _part(chunk, chunks, shape.inner // BLOCK)
        _gate_up(first, end, layer, weights, shape, rows, buffers)
    else:
        first, end = _part(chunk, chunks, shape.hidden // LANES)
        records, size = weights.down, shape.inner
        if kind == OUTPUT:
            records, size = weights.output, shape.heads * shape.head_dim
        _project(first, end, layer, records, shape.hidden, size, inner_inputs, rows, buffers.residual, np.int64(1))


@njit(nogil=True)
def _run_after_layers(kind, chunk, chunks, weights, shape, buffers, rows, output_rows):
    size, copies = shape.hidden, shape.head_copies
    if kind == LAST_NORM:
        first, end = _part(chunk, chunks, rows)
        for row in range(first, end):
            _normalize(row, size, buffers.residual, weights.norm, 0, shape.eps, buffers.hidden)
    elif kind == HEAD_INPUT:
        first, end = _part(chunk, chunks, output_rows)
        blocks, one = size // BLOCK, np.float32(1)
        codes, scales, sums = buffers.codes, buffers.scales, buffers.sums
        for row in range(first, end):
            for copy in range(row * copies, (row + 1) * copies):
                quantize(buffers.hidden, row * size, size, one, codes, copy * size, scales, sums, copy * blocks)
    else:
        groups = shape.vocabulary // LANES
        first = chunk * HEAD_GROUPS
        end = min(first + HEAD_GROUPS, groups)
        inputs = (buffers.codes, buffers.scales, buffers.sums)
        _project(
            first,
            end,
            np.int64(0),
            weights.head,
            shape.vocabulary,
            size * copies,
            inputs,
            output_rows,
            buffers.logits,
            np.int64(0),
        )


@njit(nogil=True)
def _work(thread, control, weights, shape, inputs, buffers):
    """Take chunks until the last phase is over."""
    spins = 0
    while True:
        ticket = load_acquire(control, TICKET)
        phase, chunk = (ticket >> 16) & 0xFFFF, ticket & 0xFFFF
        if phase == NO_PHASE:
            return
        chunks = _chunks(phase, shape, control)
        if chunk >= chunks:
            spins += 1
            pause()
            if spins > SPINS:
                yield_processor()
            continue
        if not compare_and_swap(control, TICKET, ticket, ticket + 1):
            continue
        spins = 0
        layer = phase // PHASES_OF_LAYER
        rows = control[ROWS]
        if layer < shape.layers:
            kind = phase % PHASES_OF_LAYER
            _run_in_layer(kind, layer, chunk, chunks, thread, weights, shape, inputs, buffers, rows)
        else:
            kind = phase - shape.layers * PHASES_OF_LAYER
            _run_after_layers(kind, chunk, chunks, weights, shape, buffers, rows, control[OUTPUT_ROWS])
        if add_atomic(control, DONE, 1) + 1 == chunks:
            store_release(control, DONE, 0)
            following = phase + 1 if phase + 1 < control[END] else NO_PHASE
            store_release(control, TICKET, (control[STEP] << 32) | (following << 16))


@njit(nogil=True, cache=True)
def take_part(thread, helpers, semaphore, control, weights, shape, inputs, buffers):
    """Thread 0 wakes `helpers` others and works until the phases that `open_phases` named are over.

    The others take part in each run that wakes them, until told to stop. (One function, so that all run the same code.)
    """
    for _ in range(helpers):
        post_semaphore(semaphore)
    while True:
        if thread != 0:
            wait_semaphore(semaphore)
            if load_acquire(control, STOP) != 0:
                return
        _work(thread, control, weights, shape, inputs, buffers)
        if thread == 0:
            return


@njit(nogil=True, cache=True)
def open_phases(control, first, end):
    """Let `take_part` work on phases `first` to `end`, once the last ones are over."""
    control[END] = end
    control[STEP] = (control[STEP] + 1) & 0x3FFFFFFF
    store_release(control, TICKET, (control[STEP] << 32) | (first << 16))
