"""Gate and up of 192 to 256 rows on a Hopper GPU, with their activation, in Gluon.

Such a product is bound by arithmetic: 128 rows of the weights by all rows of x are a tile, of which a program on each
processor has one after the other. One warp loads, also while a tile ends; two groups of four multiply. Beside cuBLAS
this saves the activation's trip through memory.
"""

from __future__ import annotations

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from headrace.kernels.gated_activation import Activation, activated
from headrace.kernels.hopper import async_load
from headrace.kernels.launch import num_processors

HALF = 64
"""Rows of the weights that a group of warps multiplies: eight of the gate, then eight of up, and so on."""
BLOCK_K = 64
RING_BYTES = 226 * 1024
LEAST_ROWS = 192
LEAST_BUSY = 0.83
"""The part of all processors' turns that must have tiles; with fewer, cuBLAS's smaller ones are faster."""
MAX_REGISTERS = 168
"""Of a thread at the start, so that twelve warps fit; then those that load give theirs to those that multiply."""
_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


def stages(rows: int) -> int:
    """Steps along K that fit a processor's shared memory."""
    return RING_BYTES // ((rows + 2 * HALF) * BLOCK_K * 2)


def fits_gated(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `gated_linear` takes these, and is faster than a product and an activation."""
    (n2, k), processors = weight.shape, num_processors(x.device)
    tiles = triton.cdiv(n2, 2 * HALF)
    busy = tiles / (triton.cdiv(tiles, processors) * processors)
    fits = LEAST_ROWS <= len(x) <= 256 and x.dtype == weight.dtype and x.dtype in _DTYPES and n2 % 16 == k % 8 == 0
    return fits and busy >= LEAST_BUSY


def gated_linear(x: torch.Tensor, weight: torch.Tensor, activation: Activation) -> torch.Tensor:
    """activation(gate) * up [M, N] of x [M, K] and weight [2 * N, K], gate over up; M at most 256, 16 bits each."""
    (m, k), n, dtype = x.shape, weight.shape[0] // 2, _DTYPES[x.dtype]
    out = x.new_empty(m, n)
    rows, part = (256, 256) if m > 192 else (192, 64)
    tiles, block = triton.cdiv(n, HALF), [HALF // 16, 2, 8, BLOCK_K]
    _gated_kernel[(min(tiles, num_processors(x.device)),)](
        TensorDescriptor.from_tensor(x, [part, BLOCK_K], gl.NVMMASharedLayout.get_default_for([part, BLOCK_K], dtype)),
        TensorDescriptor(
            weight, [n // 8, 2, 8, k], [8 * k, n * k, k, 1], block, gl.NVMMASharedLayout.get_default_for(block, dtype)
        ),
        out, m, tiles, triton.cdiv(k, BLOCK_K), N=n, IS_SILU=activation == "silu", ROWS=rows, STAGES=stages(rows),
        num_warps=4, maxnreg=MAX_REGISTERS, launch_pdl=True,
    )  # fmt: skip
    return out


@gluon.constexpr_function
def _neighbours_layout(rows, num_warps):
    """Of [outputs, rows of x]: a thread has 8 neighbours in memory."""
    return gl.BlockedLayout([8, 1], [rows // 8, 256 // rows], [1, num_warps], [0, 1])


@gluon.jit
def _wait(OUTSTANDING: gl.constexpr, sums):
    if len(sums) == 1:
        return (warpgroup_mma_wait(OUTSTANDING, deps=sums),)
    else:  # noqa: RET505 - without it, Triton compiles both
        return warpgroup_mma_wait(OUTSTANDING, deps=sums)


@gluon.jit
def _finish(sums, out_ptr, n0, m0, M, N: gl.constexpr, IS_SILU: gl.constexpr, num_warps: gl.constexpr):
    """Of [HALF, rows of x from m0 on], 64 columns at a time, so that registers suffice."""
    HALF: gl.constexpr = sums.shape[0]
    COLUMNS: gl.constexpr = sums.shape[1]
    if COLUMNS > 64:
        low, high = sums.reshape([HALF, 2, COLUMNS // 2]).permute((0, 2, 1)).split()
        _finish(low, out_ptr, n0, m0, M, N, IS_SILU, num_warps)
        _finish(high, out_ptr, n0, m0 + COLUMNS // 2, M, N, IS_SILU, num_warps)
    else:
        gate, up = sums.reshape([HALF // 16, 2, 8, COLUMNS]).permute((0, 2, 3, 1)).split()
        stored = activated(gate, up, IS_SILU).reshape([HALF // 2, COLUMNS]).to(out_ptr.dtype.element_ty)
        layout: gl.constexpr = _neighbours_layout(HALF // 2, num_warps)
        n = n0 + gl.arange(0, HALF // 2, layout=gl.SliceLayout(1, layout))
        m = m0 + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, layout))
        inside = (m < M)[None, :] & (n < N)[:, None]
        gl.store(out_ptr + m[None, :] * N + n[:, None], gl.convert_layout(stored, layout), mask=inside)


@gluon.jit
def _compute(
    half: gl.constexpr, inputs, weights, full, free, out_ptr, M, tiles, steps,
    N: gl.constexpr, IS_SILU: gl.constexpr, ROWS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Half of each tile's outputs."""
    HALF: gl.constexpr = weights.shape[1]
    PART: gl.constexpr = inputs.shape[1]
    PARTS: gl.constexpr = ROWS // PART
    num_warps: gl.constexpr = 4
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, PART, 16])
    gl.assume(steps > 0)  # of a loop that may be empty, ptxas has the products wait for each other
    gdc_wait()
    slot = 0
    parity = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        sums = ()
        for _ in gl.static_range(PARTS):
            sums += (gl.zeros((HALF, PART), gl.float32, layout),)  # type: ignore[assignment]
        for step in range(steps):
            mbarrier.wait(full.index(slot), parity)
            started = ()
            for part in gl.static_range(PARTS):
                x = inputs.index(slot * PARTS + part).permute((1, 0))
                product = warpgroup_mma(weights.index(2 * slot + half), x, sums[part], is_async=True)
                started += (product,)  # type: ignore[assignment]
            sums = _wait(PARTS, started)
            # the products before these have ended, and left their slot
            mbarrier.arrive(free.index(gl.where(slot == 0, STAGES - 1, slot - 1)), count=1, pred=step > 0)
            slot += 1
            parity = gl.where(slot == STAGES, parity ^ 1, parity)
            slot = gl.where(slot == STAGES, 0, slot)
        sums = _wait(0, sums)
        mbarrier.arrive(free.index(gl.where(slot == 0, STAGES - 1, slot - 1)), count=1)
        for part in gl.static_range(PARTS):
            n0 = tile * HALF + half * (HALF // 2)
            _finish(sums[part], out_ptr, n0, part * PART, M, N, IS_SILU, num_warps)


@gluon.jit
def _ask_for_weights(weight, weights, bar, slot, tile, step, BYTES: gl.constexpr):
    HALF: gl.constexpr = weights.shape[1]
    mbarrier.expect(bar, BYTES)
    for half in gl.static_range(2):
        place = weights.index(2 * slot + half).reshape(weight.block_type.shape)
        async_load(weight, [(2 * tile + half) * (HALF // 16), 0, 0, step * weights.shape[2]], bar, place)


@gluon.jit
def _ask_for_input(x, inputs, bar, slot, step, PARTS: gl.constexpr):
    for part in gl.static_range(PARTS):
        async_load(x, [part * inputs.shape[1], step * inputs.shape[2]], bar, inputs.index(slot * PARTS + part))


@gluon.jit
def _load(x, weight, inputs, weights, full, free, tiles, steps, ROWS: gl.constexpr, STAGES: gl.constexpr):
    """Everything that the others multiply: the first weights before the wait for the input."""
    PARTS: gl.constexpr = ROWS // inputs.shape[1]
    BYTES: gl.constexpr = PARTS * x.block_type.nbytes + 2 * weight.block_type.nbytes
    for slot in gl.static_range(STAGES):
        if slot < steps:
            _ask_for_weights(weight, weights, full.index(slot), slot, gl.program_id(0), slot, BYTES)
    gdc_wait()
    gdc_launch_dependents()
    for slot in gl.static_range(STAGES):
        if slot < steps:
            _ask_for_input(x, inputs, full.index(slot), slot, slot, PARTS)
    begin = gl.minimum(steps, STAGES)
    slot = begin % STAGES
    parity = gl.where(steps < STAGES, 1, 0)
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        for step in range(begin, steps):
            mbarrier.wait(free.index(slot), parity)
            _ask_for_weights(weight, weights, full.index(slot), slot, tile, step, BYTES)
            _ask_for_input(x, inputs, full.index(slot), slot, step, PARTS)
            slot += 1
            parity = gl.where(slot == STAGES, parity ^ 1, parity)
            slot = gl.where(slot == STAGES, 0, slot)
        begin = 0


@gluon.jit(do_not_specialize=["M", "tiles", "steps"])
def _gated_kernel(
    x, weight, out_ptr, M, tiles, steps,
    N: gl.constexpr, IS_SILU: gl.constexpr, ROWS: gl.constexpr, STAGES: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    PART: gl.constexpr = x.block_type.shape[0]
    BLOCK_K: gl.constexpr = x.block_type.shape[1]
    HALF: gl.constexpr = 16 * weight.block_type.shape[0]
    weights_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([HALF, BLOCK_K], x.dtype)
    inputs = gl.allocate_shared_memory(x.dtype, [STAGES * (ROWS // PART), PART, BLOCK_K], x.layout)
    weights = gl.allocate_shared_memory(x.dtype, [2 * STAGES, HALF, BLOCK_K], weights_layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(free.index(slot), count=2)
    gl.warp_specialize(
        [
            (
                _compute,
                (gl.constexpr(0), inputs, weights, full, free, out_ptr, M, tiles, steps, N, IS_SILU, ROWS, STAGES),
            ),
            (
                _compute,
                (gl.constexpr(1), inputs, weights, full, free, out_ptr, M, tiles, steps, N, IS_SILU, ROWS, STAGES),
            ),
            (_load, (x, weight, inputs, weights, full, free, tiles, steps, ROWS, STAGES)),
        ],
        [num_warps, 1],
        [240, 24],
    )
