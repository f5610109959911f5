"""Projections of a decode step on a Hopper GPU, in Gluon, where shared memory and its barriers are explicit.

What Triton's own language can't say: weights come before the wait for the input. Each program fills its ring of buffers
with weights while the kernel ahead is still at work (programmatic dependent launch), asks for the input once that has
ended, and keeps the ring full across the borders of tiles.

A tile of weights has all of K, or where there are few tiles, `split` programs share one: each then adds up some
columns of it out of what all of them left in memory, always in the same order, so that results don't depend on timing.

The weights come at the memory's speed, so what is left to save is the time between a program's last product and its
end: what the epilogue needs is loaded before the products, and what it stores are 16 bytes a thread.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language import debug_barrier
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from headrace.kernels.epilogue import LARGEST_SPLIT, MAX_SHARED_TILES, SQUARES_SCALE, Epilogue, Workspace
from headrace.kernels.gated_activation import activated
from headrace.kernels.hopper import async_load
from headrace.kernels.launch import num_processors, power_of_two

ROWS = 64
"""Of the weights, in a tile: as many as one instruction of the tensor cores takes."""
PIECE = 8192
"""Bytes of a tile's results that change hands in shared memory at once."""


@dataclass(frozen=True)
class _Ring:
    """Bytes along K of a tile, and how many tiles fit a processor's shared memory, for as many rows of input."""

    line: int
    stages: int


# By a sweep on an H100, see docs/log.md: the more bytes are on their way, the better
_RINGS = {16: _Ring(256, 11), 32: _Ring(256, 9), 64: _Ring(256, 6), 128: _Ring(128, 9)}
_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float8_e4m3fn: gl.float8e4nv}


def ring_linear(
    x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, epilogue: Epilogue, workspace: Workspace
) -> None:
    """See `decode_linear`; x has at most 128 rows, and the dtype of the weight, of 16 or 8 bits."""
    dtype, n, k = _DTYPES[x.dtype], out.shape[1], x.shape[1]
    columns = max(16, power_of_two(x.shape[0]))
    ring = _RINGS[columns]
    block_k = ring.line // x.element_size()
    tiles, steps = triton.cdiv(weight.shape[0], ROWS), triton.cdiv(k, block_k)
    if epilogue.activation is not None:  # eight rows of the gate, then eight of up: in a tile, each gate meets its up
        block, shape, strides = [ROWS // 16, 2, 8, block_k], [n // 8, 2, 8, k], [8 * k, n * k, k, 1]
    else:
        block, shape, strides = [ROWS, block_k], list(weight.shape), list(weight.stride())
    processors = num_processors(x.device)
    split = _split(tiles, steps, ring, processors) if epilogue.activation is None else 1
    x_block, x_shape = [columns, block_k], [min(columns, _rows_in_memory(x)), k]
    _ring_kernel[(min(tiles * split, processors),)](
        TensorDescriptor(x, x_shape, list(x.stride()), x_block, gl.NVMMASharedLayout.get_default_for(x_block, dtype)),
        TensorDescriptor(weight, shape, strides, block, gl.NVMMASharedLayout.get_default_for(block, dtype)),
        out, epilogue.weight_scale, epilogue.x_scale, epilogue.squares, epilogue.bias, epilogue.squares_out,
        workspace.partial, workspace.counters, x.shape[0], tiles, steps, 1 / k, epilogue.eps,
        N=n, ACTIVATION=epilogue.activation, RESIDUAL=epilogue.residual, SCALE=SQUARES_SCALE, STAGES=ring.stages,
        SPLIT=split, ROWS=ROWS, PIECE=PIECE, MAX_SHARED_TILES=MAX_SHARED_TILES,
        num_warps=4, launch_pdl=True,
    )  # fmt: skip


def _rows_in_memory(x: torch.Tensor) -> int:
    """Those of x and behind it, whatever they hold: a load takes longer where rows are outside of its descriptor."""
    elements = x.untyped_storage().nbytes() // x.element_size() - int(x.storage_offset())
    return 1 + (elements - x.shape[1]) // x.stride(0)


def _split(tiles: int, steps: int, ring: _Ring, processors: int) -> int:
    """How many programs share a tile: not more than there are processors, and each with a ring or more to do."""
    split = 1
    while split < LARGEST_SPLIT and tiles * split * 2 <= processors and steps // (split * 2) >= ring.stages:
        split *= 2
    return split


@gluon.constexpr_function
def _accumulator_layout(block_m, element_bits, num_warps):
    """Of [rows of the weights, BLOCK_M]: warps one below the other, each instruction as wide as the tile."""
    return gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[num_warps, 1], instr_shape=[16, block_m, 256 // element_bits]
    )


@gluon.constexpr_function
def _neighbours_layout(rows, num_warps):
    """Of [rows, columns]: a thread has 8 of the first dimension, which are neighbours in memory."""
    lanes = min(rows // 8, 32)
    return gl.BlockedLayout([8, 1], [lanes, 32 // lanes], [1, num_warps], [0, 1])


@gluon.jit
def _ask_for_weights(weight, tile, step, slot, weights, bars, x_bytes: gl.constexpr):
    ROWS: gl.constexpr = weights.shape[1]
    bar = bars.index(slot)
    mbarrier.expect(bar, weight.block_type.nbytes + x_bytes)
    BLOCK_K: gl.constexpr = weights.shape[2]
    if len(weight.block_type.shape) == 2:
        async_load(weight, [tile * ROWS, step * BLOCK_K], bar, weights.index(slot))
    else:
        place = weights.index(slot).reshape(weight.block_type.shape)
        async_load(weight, [tile * (ROWS // 16), 0, 0, step * BLOCK_K], bar, place)


@gluon.jit
def _advance(tile, step, first, last, programs):
    """What a program asks for next: the next step of its tile, or the first one of its next tile."""
    step += 1
    tile = gl.where(step == last, tile + programs, tile)
    return tile, gl.where(step == last, first, step)


@gluon.jit
def _norm(squares_ptr, m, M, inverse_k, eps, SCALE: gl.constexpr):
    squares = gl.load(squares_ptr + m, mask=m < M, other=0).to(gl.float32) / SCALE
    return gl.rsqrt(squares * inverse_k + eps)


@gluon.jit
def _cells(n0, m0, M, N: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr, layout: gl.constexpr):
    """Where in out the rows of the weights from n0 and of x from m0 on are, and whether they are there."""
    n = n0 + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    m = m0 + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, layout))
    return m[None, :] * N + n[:, None], (m < M)[None, :] & (n < N)[:, None]


@gluon.jit
def _store(stored, n0, m0, out_ptr, M, N: gl.constexpr, PIECE: gl.constexpr, num_warps: gl.constexpr):
    """Through shared memory, piece by piece, so that a thread has neighbours."""
    ROWS: gl.constexpr = stored.shape[0]
    COLUMNS: gl.constexpr = stored.shape[1]
    if ROWS * COLUMNS * stored.dtype.primitive_bitwidth > PIECE * 8:
        left, right = stored.reshape([ROWS, 2, COLUMNS // 2]).permute((0, 2, 1)).split()
        _store(left, n0, m0, out_ptr, M, N, PIECE, num_warps)
        _store(right, n0, m0 + COLUMNS // 2, out_ptr, M, N, PIECE, num_warps)
    else:
        layout: gl.constexpr = _neighbours_layout(ROWS, num_warps)
        at, inside = _cells(n0, m0, M, N, ROWS, COLUMNS, layout)
        gl.store(out_ptr + at, gl.convert_layout(stored, layout), mask=inside)


@gluon.jit
def _finish(
    sums, row0, m0, before, norm, out_ptr, weight_scale_ptr, x_scale_ptr, bias_ptr, squares_out_ptr,
    M, N: gl.constexpr, ACTIVATION: gl.constexpr, RESIDUAL: gl.constexpr, SCALE: gl.constexpr, PIECE: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    """The epilogue of [rows of the weights from row0 on, rows of x from m0 on]; `before`: of the residual sum, where
    it has been loaded.
    """
    ROWS: gl.constexpr = sums.shape[0]
    COLUMNS: gl.constexpr = sums.shape[1]
    if ACTIVATION is not None:
        halves = sums.reshape([ROWS // 16, 2, 8, COLUMNS]).permute((0, 2, 3, 1))
        value, up = halves.split()
        value = value.reshape([ROWS // 2, COLUMNS])
        up = up.reshape([ROWS // 2, COLUMNS])
        n0 = row0 // 2
    else:
        value = sums
        n0 = row0
    layout: gl.constexpr = value.type.layout
    n = n0 + gl.arange(0, value.shape[0], layout=gl.SliceLayout(1, layout))
    m = m0 + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, layout))
    if weight_scale_ptr is not None:
        value *= gl.load(weight_scale_ptr + n, mask=n < N, other=0.0)[:, None]
        if ACTIVATION is not None:
            up *= gl.load(weight_scale_ptr + N + n, mask=n < N, other=0.0)[:, None]
    if x_scale_ptr is not None:
        x_scale = gl.load(x_scale_ptr + m, mask=m < M, other=0.0)[None, :]
        value *= x_scale
        if ACTIVATION is not None:
            up *= x_scale
    if norm is not None:
        factor = gl.convert_layout(norm, gl.SliceLayout(0, layout))[None, :]
        value *= factor
        if ACTIVATION is not None:
            up *= factor
    if bias_ptr is not None:
        value += gl.load(bias_ptr + n, mask=n < N, other=0.0).to(gl.float32)[:, None]
    if ACTIVATION is not None:
        value = activated(value, up, ACTIVATION == "silu")
    at, inside = _cells(n0, m0, M, N, value.shape[0], COLUMNS, layout)
    if before is not None:
        value += before.to(gl.float32)
    elif RESIDUAL:
        value += gl.load(out_ptr + at, mask=inside, other=0.0).to(gl.float32)
    stored = value.to(out_ptr.dtype.element_ty)
    _store(stored, n0, m0, out_ptr, M, N, PIECE, num_warps)
    if squares_out_ptr is not None:
        kept = gl.where(inside, stored.to(gl.float32), 0.0)
        squares_out = (gl.sum(kept * kept, 0) * SCALE).to(gl.int64)
        gl.atomic_add(squares_out_ptr + m, squares_out, mask=m < M, sem="relaxed")


@gluon.jit
def _meet(counter_ptr, PROGRAMS: gl.constexpr):
    """Wait until `PROGRAMS` programs, a power of two, have come here as often as this one. Counters are never reset."""
    debug_barrier()
    arrived = gl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu")
    goal = arrived - (arrived & (PROGRAMS - 1)) + PROGRAMS
    count = arrived + 1
    while count - goal < 0:
        count = gl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu")
    debug_barrier()


@gluon.jit
def _gather(sums, partial_ptr, counter_ptr, SPLIT: gl.constexpr, layout: gl.constexpr):
    """Some columns of a tile, added up from what all programs that share it have."""
    ROWS: gl.constexpr = sums.shape[0]
    BLOCK_M: gl.constexpr = sums.shape[1]
    COLUMNS: gl.constexpr = BLOCK_M // SPLIT
    size: gl.constexpr = ROWS * BLOCK_M
    sums_layout: gl.constexpr = sums.type.layout
    pid = gl.program_id(0)
    at, _ = _cells(0, 0, BLOCK_M, ROWS, ROWS, BLOCK_M, sums_layout)
    gl.store(partial_ptr + pid * size + at, sums, cache_modifier=".cg")
    _meet(counter_ptr, SPLIT)
    at, _ = _cells(0, pid % SPLIT * COLUMNS, BLOCK_M, ROWS, ROWS, COLUMNS, layout)
    cells = partial_ptr + pid // SPLIT * SPLIT * size + at
    total = gl.load(cells, cache_modifier=".cg")
    for part in gl.static_range(1, SPLIT):
        total += gl.load(cells + part * size, cache_modifier=".cg")
    return total


@gluon.jit(do_not_specialize=["M", "tiles", "steps"])
def _ring_kernel(
    x, weight, out_ptr, weight_scale_ptr, x_scale_ptr, squares_ptr, bias_ptr, squares_out_ptr,
    partial_ptr, counters_ptr, M, tiles, steps, inverse_k, eps, N: gl.constexpr,
    ACTIVATION: gl.constexpr, RESIDUAL: gl.constexpr, SCALE: gl.constexpr, STAGES: gl.constexpr, SPLIT: gl.constexpr,
    ROWS: gl.constexpr, PIECE: gl.constexpr, MAX_SHARED_TILES: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    BLOCK_M: gl.constexpr = x.block_type.shape[0]
    BLOCK_K: gl.constexpr = x.block_type.shape[1]
    x_bytes: gl.constexpr = x.block_type.nbytes
    layout: gl.constexpr = _accumulator_layout(BLOCK_M, x.dtype.primitive_bitwidth, num_warps)
    inputs = gl.allocate_shared_memory(x.dtype, [STAGES, BLOCK_M, BLOCK_K], x.layout)
    weights_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, BLOCK_K], x.dtype)
    weights = gl.allocate_shared_memory(x.dtype, [STAGES, ROWS, BLOCK_K], weights_layout)
    bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(bars.index(slot), count=1)

    pid = gl.program_id(0)
    programs = gl.num_programs(0)
    tile = pid // SPLIT
    first = pid % SPLIT * steps // SPLIT
    last = (pid % SPLIT + 1) * steps // SPLIT
    # the head of the ring, which runs ahead of the products
    head_tile = tile
    head = first
    for slot in gl.static_range(STAGES - 1):
        if head_tile < tiles:
            _ask_for_weights(weight, head_tile, head, slot, weights, bars, x_bytes)
        head_tile, head = _advance(head_tile, head, first, last, programs)
    gdc_wait()
    gdc_launch_dependents()
    head_tile = tile
    head = first
    for slot in gl.static_range(STAGES - 1):
        if head_tile < tiles:
            async_load(x, [0, head * BLOCK_K], bars.index(slot), inputs.index(slot))
        head_tile, head = _advance(head_tile, head, first, last, programs)

    # what the epilogue needs is on its way while products are made
    COLUMNS: gl.constexpr = BLOCK_M // SPLIT
    end_layout: gl.constexpr = layout if SPLIT == 1 else _neighbours_layout(ROWS, num_warps)
    m0 = pid % SPLIT * COLUMNS
    m = m0 + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, end_layout))
    norm = None
    if squares_ptr is not None:
        norm = _norm(squares_ptr, m, M, inverse_k, eps, SCALE)
    slot = 0
    parity = 0
    while tile < tiles:
        before = None
        if RESIDUAL and ACTIVATION is None:
            at, inside = _cells(tile * ROWS, m0, M, N, ROWS, COLUMNS, end_layout)
            before = gl.load(out_ptr + at, mask=inside, other=0.0)
        sums = gl.zeros((ROWS, BLOCK_M), gl.float32, layout)
        for _ in range(first, last):
            mbarrier.wait(bars.index(slot), parity)
            sums = warpgroup_mma(weights.index(slot), inputs.index(slot).permute((1, 0)), sums, is_async=True)
            sums = warpgroup_mma_wait(1, deps=(sums,))
            # the product before this one has ended, and left its slot
            left = gl.where(slot == 0, STAGES - 1, slot - 1)
            if head_tile < tiles:
                _ask_for_weights(weight, head_tile, head, left, weights, bars, x_bytes)
                async_load(x, [0, head * BLOCK_K], bars.index(left), inputs.index(left))
            head_tile, head = _advance(head_tile, head, first, last, programs)
            slot += 1
            parity = gl.where(slot == STAGES, parity ^ 1, parity)
            slot = gl.where(slot == STAGES, 0, slot)
        sums = warpgroup_mma_wait(0, deps=(sums,))
        total = sums
        if SPLIT > 1:
            counter_ptr = counters_ptr + SPLIT * MAX_SHARED_TILES + tile
            total = _gather(sums, partial_ptr, counter_ptr, SPLIT, end_layout)
        _finish(
            total, tile * ROWS, m0, before, norm, out_ptr, weight_scale_ptr, x_scale_ptr, bias_ptr, squares_out_ptr,
            M, N, ACTIVATION, RESIDUAL, SCALE, PIECE, num_warps,
        )  # fmt: skip
        tile += programs
