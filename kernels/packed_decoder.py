"""A whole decoder of Llama's shape with packed weights on a CPU: one call of a compiled function for all layers.

The work is a list of *phases*, eight a layer and three for the logits, each cut into *chunks*. Threads take chunks of
the current phase from one counter, and whoever ends the last one opens the next phase. So nobody waits for a thread
that does not run, be it that another process has its core: the others do its part.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from headrace.kernels.packed_attention import attend, rotate_and_write
from headrace.kernels.packed_linear import BLOCK, GROUP, INPUT, RECORD, project, quantize
from headrace.kernels.simd import (
    LANES,
    add,
    add_atomic,
    broadcast,
    compare_and_swap,
    divide,
    exponential,
    larger,
    largest_lane,
    load_acquire,
    load_floats,
    multiply,
    multiply_add,
    pause,
    post_semaphore,
    store_floats,
    store_release,
    subtract,
    sum_lanes,
    wait_semaphore,
    yield_processor,
    zeros,
)

INPUT_NORM, QKV, ROPE, ATTENTION, OUTPUT, MLP_NORM, GATE_UP, DOWN = range(8)
PHASES_OF_LAYER = 8
LAST_NORM, HEAD_INPUT, HEAD = range(3)
"""Phases after the layers."""
CHUNKS, CHUNKS_OF_MANY_ROWS = 16, 48
"""About so many a phase: few enough to cost nothing, enough that threads end together."""
MANY_ROWS = 16
ROW_CHUNKS = 64
HEAD_GROUPS = 32
"""Groups of the head's outputs in a chunk."""
SPINS = 4000
"""Looks for work before a thread lets others have the core, some 100 microseconds."""

TICKET, DONE, STEP, END, ROWS, OUTPUT_ROWS, STOP = range(0, 56, 8)
"""Places in the control array, each in a line of the cache of its own. The ticket holds step << 32 | phase << 16 | next
chunk."""
NO_PHASE = 0xFFFF
CONTROL_SIZE = 64


@njit(nogil=True)
def _chunks(phase, shape, control):
    """How many chunks a phase has."""
    rows = control[ROWS]
    of_rows = min(rows, ROW_CHUNKS)
    after = phase - shape.layers * PHASES_OF_LAYER
    if after >= 0:
        if after == HEAD:
            return -(-(shape.vocabulary // GROUP) // HEAD_GROUPS)
        return of_rows if after == LAST_NORM else min(control[OUTPUT_ROWS], ROW_CHUNKS)
    kind = phase % PHASES_OF_LAYER
    if kind in (INPUT_NORM, ROPE, MLP_NORM):
        return of_rows
    if kind == ATTENTION:
        return of_rows * shape.kv_heads
    most = CHUNKS if rows < MANY_ROWS else CHUNKS_OF_MANY_ROWS
    return min(shape.inner // BLOCK if kind == GATE_UP else shape.hidden // GROUP, most)


@njit(nogil=True, forceinline=True)
def _part(chunk, chunks, whole):
    """Where a chunk's part of something begins and ends."""
    return whole * chunk // chunks, whole * (chunk + 1) // chunks


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
    size, one = shape.hidden, np.float32(1)
    for row in range(first, end):
        _normalize(row, size, buffers.residual, weights, weight, shape.eps, buffers.hidden)
        quantize(buffers.hidden, row * size, size, one, buffers.inputs, row * size // BLOCK * INPUT)


@njit(nogil=True)
def _normalize_pairs(first, end, weights, shape, buffers):
    """A draft head's input: RMS norms of the token's embedding and of the state, side by side, rounded."""
    size, one = shape.hidden, np.float32(1)
    half = size // BLOCK * INPUT
    for row in range(first, end):
        at = row * size
        _normalize(row, size, buffers.embedded, weights.input_norms, 0, shape.eps, buffers.hidden)
        quantize(buffers.hidden, at, size, one, buffers.inputs, 2 * row * half)
        _normalize(row, size, buffers.residual, weights.input_norms, size, shape.eps, buffers.hidden)
        quantize(buffers.hidden, at, size, one, buffers.inputs, (2 * row + 1) * half)


@njit(nogil=True)
def _keep_features(first, end, layer, shape, buffers):
    """Copy the residual stream where it is one of the features that a draft head is fed with."""
    for index in range(3):
        if shape.feature_layers[index] == layer:
            for row in range(first, end):
                to, at = row * shape.num_features + index * shape.hidden, row * shape.hidden
                for i in range(0, shape.hidden, LANES):
                    store_floats(buffers.features, to + i, load_floats(buffers.residual, at + i))


@njit(nogil=True, cache=True)
def fuse(rows, records, shape, buffers):
    """A draft head's first states, in `residual`, from the target's features."""
    size, one = shape.num_features, np.float32(1)
    blocks = size // BLOCK
    for row in range(rows):
        quantize(buffers.features, row * size, size, one, buffers.inputs, row * blocks * INPUT)
    groups = shape.hidden // GROUP
    project(records, 0, blocks, groups, buffers.inputs, rows, buffers.residual, 0, shape.hidden, np.int64(0))


@njit(nogil=True, cache=True)
def likeliest(first, rows, shape, buffers, found, chances):
    """Of rows of logits: where each one's greatest is, to int64 `found`, and its probability, to float32 `chances`."""
    size = shape.vocabulary
    for row in range(rows):
        at = (first + row) * size
        highest = load_floats(buffers.logits, at)
        for i in range(at + LANES, at + size, LANES):
            highest = larger(load_floats(buffers.logits, i), highest)
        top = largest_lane(highest)
        highest, total = broadcast(top), zeros()
        for i in range(at, at + size, LANES):
            total = add(total, exponential(subtract(load_floats(buffers.logits, i), highest)))
        found[row] = 0
        while buffers.logits[at + found[row]] < top:
            found[row] += 1
        chances[row] = np.float32(1) / sum_lanes(total)


@njit(nogil=True, forceinline=True)
def _activate(gate_up, gate, up):
    """SiLU of a block of the gate, times up, in place of the gate."""
    one = broadcast(np.float32(1))
    for i in range(0, BLOCK, LANES):
        x = load_floats(gate_up, gate + i)
        sigmoid = divide(one, add(one, exponential(subtract(zeros(), x))))
        store_floats(gate_up, gate + i, multiply(multiply(x, sigmoid), load_floats(gate_up, up + i)))


@njit(nogil=True)
def _gate_up(first, end, layer, thread, weights, shape, rows, buffers):
    """Blocks `first` to `end` of the inner activations of all rows."""
    blocks, groups, both = shape.hidden // BLOCK, 2 * BLOCK // GROUP, 2 * BLOCK
    inner_blocks, gate_up, one = shape.inner // BLOCK, buffers.gate_up, np.float32(1)
    place = thread * rows * both
    for block in range(first, end):
        base = (layer * inner_blocks + block) * groups * blocks * RECORD
        project(weights.gate_up, base, blocks, groups, buffers.inputs, rows, gate_up, place, both, np.int64(0))
        for row in range(rows):
            at = place + row * both
            _activate(gate_up, at, at + BLOCK)
            quantize(gate_up, at, BLOCK, one, buffers.inner_inputs, (row * inner_blocks + block) * INPUT)


@njit(nogil=True)
def _project(first, end, layer, records, outputs, size, inputs, rows, out, is_sum):
    """Groups `first` to `end` of a projection of all rows."""
    blocks = size // BLOCK
    base = (layer * outputs // GROUP + first) * blocks * RECORD
    project(records, base, blocks, end - first, inputs, rows, out, first * GROUP, outputs, is_sum)


@njit(nogil=True)
def _run_in_layer(kind, layer, chunk, chunks, thread, weights, shape, inputs, buffers, rows):
    first, end = _part(chunk, chunks, rows)
    if kind == INPUT_NORM and shape.qkv_inputs > shape.hidden:
        _normalize_pairs(first, end, weights, shape, buffers)
    elif kind == INPUT_NORM:
        _keep_features(first, end, layer, shape, buffers)
        _normalize_rows(first, end, weights.input_norms, layer * shape.hidden, shape, buffers)
    elif kind == MLP_NORM:
        _normalize_rows(first, end, weights.mlp_norms, layer * shape.hidden, shape, buffers)
    elif kind == ROPE:
        rotate_and_write(first, end, layer, weights, shape, inputs, buffers)
    elif kind == ATTENTION:
        first, end = _part(chunk // shape.kv_heads, chunks // shape.kv_heads, rows)
        for row in range(first, end):
            attend(row, chunk % shape.kv_heads, layer, thread, weights, shape, inputs, buffers)
    elif kind == QKV:
        outputs = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
        first, end = _part(chunk, chunks, outputs // GROUP)
        size = shape.qkv_inputs
        _project(first, end, layer, weights.qkv, outputs, size, buffers.inputs, rows, buffers.qkv, np.int64(0))
    elif kind == GATE_UP:
        first, end = _part(chunk, chunks, shape.inner // BLOCK)
        _gate_up(first, end, layer, thread, weights, shape, rows, buffers)
    else:
        first, end = _part(chunk, chunks, shape.hidden // GROUP)
        records, size = weights.down, shape.inner
        if kind == OUTPUT:
            records, size = weights.output, shape.heads * shape.head_dim
        _project(
            first, end, layer, records, shape.hidden, size, buffers.inner_inputs, rows, buffers.residual, np.int64(1)
        )


@njit(nogil=True)
def _run_after_layers(kind, chunk, chunks, weights, shape, buffers, rows, output_rows):
    size, copies = shape.hidden, shape.head_copies
    if kind == LAST_NORM:
        first, end = _part(chunk, chunks, rows)
        for row in range(first, end):
            _normalize(row, size, buffers.residual, weights.norm, 0, shape.eps, buffers.hidden)
    elif kind == HEAD_INPUT:
        first, end = _part(chunk, chunks, output_rows)
        for row in range(first, end):
            for copy in range(row * copies, (row + 1) * copies):
                place = copy * size // BLOCK * INPUT
                quantize(buffers.hidden, row * size, size, np.float32(1), buffers.inputs, place)
    else:
        groups = shape.vocabulary // GROUP
        first = chunk * HEAD_GROUPS
        end = min(first + HEAD_GROUPS, groups)
        _project(
            first,
            end,
            np.int64(0),
            weights.head,
            shape.vocabulary,
            size * copies,
            buffers.inputs,
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
