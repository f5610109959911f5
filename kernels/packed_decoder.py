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

from headrace.kernels.packed_linear import BLOCK, ORDER_KEPT, RECORD, multiply, quantize
from headrace.kernels.simd import (
    LANES,
    add_atomic,
    broadcast,
    compare_and_swap,
    float_of_bits,
    load_acquire,
    load_floats,
    multiply_add,
    pause,
    post_semaphore,
    store_floats,
    store_release,
    sum_lanes,
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
    """The KV cache, float32 [layers, pages, 2, KV heads, page size, head size]."""


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
    """Tokens of a context at most."""
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


@njit(nogil=True)
def _part(chunk, chunks, whole):
    """Where a chunk's part of something begins and ends."""
    return whole * chunk // chunks, whole * (chunk + 1) // chunks


@njit(nogil=True)
def _exp(x):
    """Exponential to 7 digits, in steps that compile to vectors."""
    power = min(max(x * np.float32(1.4426950408889634), np.float32(-126)), np.float32(126))
    whole = np.rint(power)
    part = (power - whole) * np.float32(0.6931471805599453)
    value = np.float32(1.0 / 720)
    value = value * part + np.float32(1.0 / 120)
    value = value * part + np.float32(1.0 / 24)
    value = value * part + np.float32(1.0 / 6)
    value = value * part + np.float32(0.5)
    value = value * part + np.float32(1)
    value = value * part + np.float32(1)
    return value * float_of_bits((np.int32(whole) + np.int32(127)) << np.int32(23))


@njit(nogil=True)
def _normalize(values, weight, eps, out):
    """See `rms_norm`."""
    squares = zeros()
    for i in range(0, len(values), LANES):
        some = load_floats(values, i)
        squares = multiply_add(some, some, squares)
    scale = np.float32(1) / np.sqrt(sum_lanes(squares) / np.float32(len(values)) + np.float32(eps))
    for i in range(len(values)):
        out[i] = values[i] * scale * weight[i]


@njit(nogil=True)
def _normalize_rows(first, end, weights, at, shape, buffers):
    """RMS norm of the residual stream, rounded for the projection that follows."""
    size, blocks = shape.hidden, shape.hidden // BLOCK
    for row in range(first, end):
        normed = buffers.hidden[row * size : (row + 1) * size]
        _normalize(buffers.residual[row * size : (row + 1) * size], weights[at : at + size], shape.eps, normed)
        quantize(
            normed,
            np.float32(1),
            buffers.codes[row * size : (row + 1) * size],
            buffers.scales[row * blocks : (row + 1) * blocks],
            buffers.sums[row * blocks : (row + 1) * blocks],
        )


@njit(nogil=True)
def _page_of(row, position, shape, inputs):
    return inputs.tables[inputs.request[row] * shape.table_width + position // shape.page_size]


@njit(nogil=True)
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
        cosines, sines = buffers.cosines[row * half : (row + 1) * half], buffers.sines[row * half : (row + 1) * half]
        if layer == 0:
            for i in range(half):
                angle = np.float32(position) * weights.inverse_frequencies[i]
                cosines[i], sines[i] = math.cos(angle), math.sin(angle)
        for head in range(shape.heads + shape.kv_heads):
            at = row * width + head * size
            ones, others = buffers.qkv[at : at + half], buffers.qkv[at + half : at + size]
            for i in range(half):
                one, other = ones[i], others[i]
                ones[i] = one * cosines[i] - other * sines[i]
                others[i] = other * cosines[i] + one * sines[i]
        page, slot = _page_of(row, position, shape, inputs), position % shape.page_size
        for values in range(2):
            for head in range(shape.kv_heads):
                at = row * width + (shape.heads + values * shape.kv_heads + head) * size
                to = _page_at(layer, page, values, head, shape) + slot * size
                weights.pages[to : to + size] = buffers.qkv[at : at + size]


@njit(nogil=True)
def _scores(queries, query, pages, keys, count, size, scores, at):
    """Products of one query with `count` keys that lie one after the other."""
    for key in range(count):
        even, odd = zeros(), zeros()
        for i in range(0, size, 2 * LANES):
            place = keys + key * size + i
            even = multiply_add(load_floats(queries, query + i), load_floats(pages, place), even)
            odd = multiply_add(load_floats(queries, query + i + LANES), load_floats(pages, place + LANES), odd)
        scores[at + key] = sum_lanes(even) + sum_lanes(odd)


@njit(nogil=True, fastmath=ORDER_KEPT)
def _softmax(scores, scaling):
    """Exponentials in place; returns one over their sum."""
    highest = np.float32(-np.inf)
    for i in range(len(scores)):
        highest = max(highest, scores[i])
    for i in range(len(scores)):
        scores[i] = _exp((scores[i] - highest) * scaling)
    totals, one = zeros(), broadcast(np.float32(1))
    whole = len(scores) // LANES * LANES
    for i in range(0, whole, LANES):
        totals = multiply_add(load_floats(scores, i), one, totals)
    total = sum_lanes(totals)
    for i in range(whole, len(scores)):
        total += scores[i]
    return np.float32(1) / total


@njit(nogil=True)
def _add_values(scores, at, pages, values, count, size, out, to):
    """Add `count` values that lie one after the other, each times its weight, 32 numbers at a time."""
    for i in range(to, to + size, 4 * LANES):
        a, b = load_floats(out, i), load_floats(out, i + LANES)
        c, d = load_floats(out, i + 2 * LANES), load_floats(out, i + 3 * LANES)
        for key in range(count):
            weight, place = broadcast(scores[at + key]), values + key * size + i - to
            a = multiply_add(weight, load_floats(pages, place), a)
            b = multiply_add(weight, load_floats(pages, place + LANES), b)
            c = multiply_add(weight, load_floats(pages, place + 2 * LANES), c)
            d = multiply_add(weight, load_floats(pages, place + 3 * LANES), d)
        store_floats(out, i, a)
        store_floats(out, i + LANES, b)
        store_floats(out, i + 2 * LANES, c)
        store_floats(out, i + 3 * LANES, d)


@njit(nogil=True)
def _attend(row, kv_head, layer, thread, weights, shape, inputs, buffers):
    """All query heads of a row that share a KV head, over all tokens up to the row's own; rounded for the output."""
    size, group = shape.head_dim, shape.heads // shape.kv_heads
    context, longest = inputs.positions[row] + 1, shape.longest
    query = (row * (shape.heads + 2 * shape.kv_heads) + kv_head * group) * size
    scores = thread * group * longest
    for first in range(0, context, shape.page_size):
        count = min(shape.page_size, context - first)
        keys = _page_at(layer, _page_of(row, first, shape, inputs), 0, kv_head, shape)
        for head in range(group):
            at = scores + head * longest + first
            _scores(buffers.qkv, query + head * size, weights.pages, keys, count, size, buffers.scores, at)
    out = (row * shape.heads + kv_head * group) * size
    buffers.attended[out : out + group * size] = np.float32(0)
    scaling = np.float32(1 / math.sqrt(size))
    shares = buffers.shares[thread * group : (thread + 1) * group]
    for head in range(group):
        at = scores + head * longest
        shares[head] = _softmax(buffers.scores[at : at + context], scaling)
    for first in range(0, context, shape.page_size):
        count = min(shape.page_size, context - first)
        values = _page_at(layer, _page_of(row, first, shape, inputs), 1, kv_head, shape)
        for head in range(group):
            at = scores + head * longest + first
            _add_values(buffers.scores, at, weights.pages, values, count, size, buffers.attended, out + head * size)
    for head in range(group):
        at = out + head * size
        block, end = at // BLOCK, (at + size) // BLOCK
        quantize(
            buffers.attended[at : at + size],
            shares[head],
            buffers.inner_codes[at : at + size],
            buffers.inner_scales[block:end],
            buffers.inner_sums[block:end],
        )


@njit(nogil=True)
def _activate(gate, up):
    """SiLU of the gate, times up, in place of the gate."""
    for i in range(len(gate)):
        gate[i] = gate[i] / (np.float32(1) + _exp(-gate[i])) * up[i]


@njit(nogil=True)
def _gate_up(first, end, layer, weights, shape, rows, buffers):
    """Blocks `first` to `end` of the inner activations of all rows."""
    blocks, groups = shape.hidden // BLOCK, 2 * BLOCK // LANES
    base = (layer * 2 * shape.inner // LANES + first * groups) * blocks * RECORD
    inputs = (buffers.codes, buffers.scales, buffers.sums)
    width, inner_blocks = 2 * shape.inner, shape.inner // BLOCK
    column = first * 2 * BLOCK
    multiply(weights.gate_up, base, blocks, (end - first) * groups, inputs, rows, buffers.gate_up, column, width, False)
    for row in range(rows):
        for block in range(first, end):
            at = row * width + block * 2 * BLOCK
            gate, up = buffers.gate_up[at : at + BLOCK], buffers.gate_up[at + BLOCK : at + 2 * BLOCK]
            _activate(gate, up)
            to = row * inner_blocks + block
            quantize(
                gate,
                np.float32(1),
                buffers.inner_codes[to * BLOCK : (to + 1) * BLOCK],
                buffers.inner_scales[to : to + 1],
                buffers.inner_sums[to : to + 1],
            )


@njit(nogil=True)
def _project(first, end, layer, records, outputs, size, inputs, rows, out, is_sum):
    """Groups `first` to `end` of a projection of all rows."""
    blocks = size // BLOCK
    base = (layer * outputs // LANES + first) * blocks * RECORD
    multiply(records, base, blocks, end - first, inputs, rows, out, first * LANES, outputs, is_sum)


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
        _project(first, end, layer, weights.qkv, outputs, shape.hidden, hidden_inputs, rows, buffers.qkv, False)
    elif kind == GATE_UP:
        first, end = _part(chunk, chunks, shape.inner // BLOCK)
        _gate_up(first, end, layer, weights, shape, rows, buffers)
    else:
        first, end = _part(chunk, chunks, shape.hidden // LANES)
        records, size = weights.down, shape.inner
        if kind == OUTPUT:
            records, size = weights.output, shape.heads * shape.head_dim
        _project(first, end, layer, records, shape.hidden, size, inner_inputs, rows, buffers.residual, True)


@njit(nogil=True)
def _run_after_layers(kind, chunk, chunks, weights, shape, buffers, rows, output_rows):
    size, copies = shape.hidden, shape.head_copies
    if kind == LAST_NORM:
        first, end = _part(chunk, chunks, rows)
        for row in range(first, end):
            at, to = row * size, (row + 1) * size
            _normalize(buffers.residual[at:to], weights.norm, shape.eps, buffers.hidden[at:to])
    elif kind == HEAD_INPUT:
        first, end = _part(chunk, chunks, output_rows)
        blocks = size // BLOCK
        for row in range(first, end):
            for copy in range(row * copies, (row + 1) * copies):
                quantize(
                    buffers.hidden[row * size : (row + 1) * size],
                    np.float32(1),
                    buffers.codes[copy * size : (copy + 1) * size],
                    buffers.scales[copy * blocks : (copy + 1) * blocks],
                    buffers.sums[copy * blocks : (copy + 1) * blocks],
                )
    else:
        groups = shape.vocabulary // LANES
        first = chunk * HEAD_GROUPS
        end = min(first + HEAD_GROUPS, groups)
        inputs = (buffers.codes, buffers.scales, buffers.sums)
        _project(
            first, end, 0, weights.head, shape.vocabulary, size * copies, inputs, output_rows, buffers.logits, False
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
