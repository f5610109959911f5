"""Projections of a few rows by a persistent kernel for tensor cores, on any GPU and in Triton's interpreter.

The weights are cut into tiles of `BLOCK_N` output columns and these into steps of `BLOCK_K`; all steps of all tiles are
dealt out evenly to the programs (stream-K, arXiv:2301.03598), so that no processor waits for another. Where several
programs share a tile, the last to arrive adds their parts up, always in the same order, so that results don't depend on
timing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from headrace.kernels.dealing import owner, share_of
from headrace.kernels.epilogue import SQUARES_SCALE, Epilogue, Workspace
from headrace.kernels.gated_activation import activated
from headrace.kernels.launch import dependent_launch, num_processors, power_of_two

UNCUT_STEPS = 6
"""Tiles of so few steps are not cut: adding parts up would take longer."""


@dataclass(frozen=True)
class _Tiling:
    block_m: int
    block_n: int
    block_k: int
    stages: int
    warps: int


# By sweeps on an H100, see docs/log.md: the most bytes on their way that shared memory holds.
_TILINGS = {16: (64, 256, 4, 4), 32: (64, 256, 4, 4), 64: (64, 128, 5, 4)}
_GATED_TILINGS = {16: (64, 128, 4, 4), 32: (128, 128, 2, 8), 64: (128, 128, 2, 8)}


def _tiling(rows: int, gated: bool) -> _Tiling:
    block_m = max(16, power_of_two(rows))
    return _Tiling(block_m, *(_GATED_TILINGS if gated else _TILINGS)[block_m])


def stream_linear(
    x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, epilogue: Epilogue, workspace: Workspace
) -> None:
    """See `decode_linear`; x has at most 64 rows."""
    tiling = _tiling(x.shape[0], epilogue.activation is not None)
    n, k = out.shape[1], x.shape[1]
    programs = _programs(triton.cdiv(n, tiling.block_n), triton.cdiv(k, tiling.block_k), num_processors(x.device))
    _stream_kernel[(programs,)](
        TensorDescriptor.from_tensor(x, [tiling.block_m, tiling.block_k]),
        TensorDescriptor.from_tensor(weight, [tiling.block_n, tiling.block_k]),
        out, epilogue.weight_scale, epilogue.x_scale, epilogue.squares, epilogue.bias, epilogue.squares_out,
        workspace.partial, workspace.arrivals, x.shape[0], n, k, epilogue.eps,
        ACTIVATION=epilogue.activation, RESIDUAL=epilogue.residual, SCALE=SQUARES_SCALE,
        BLOCK_M=tiling.block_m, BLOCK_N=tiling.block_n, BLOCK_K=tiling.block_k, STAGES=tiling.stages,
        num_warps=tiling.warps, **dependent_launch(),
    )  # fmt: skip


def _programs(tiles: int, steps: int, processors: int) -> int:
    """One program a processor; a few less where each then gets the same whole part of a tile."""
    if steps <= UNCUT_STEPS and tiles <= processors:
        return tiles
    for split in range(1, 9):
        if processors * 0.84 <= tiles * split <= processors:
            return tiles * split
    return processors


@triton.jit(do_not_specialize=["M"])
def _stream_kernel(
    x, weight, out_ptr, weight_scale_ptr, x_scale_ptr, squares_ptr, bias_ptr, squares_out_ptr,
    partial_ptr, arrivals_ptr, M, N, K, eps,
    ACTIVATION: tl.constexpr, RESIDUAL: tl.constexpr, SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    steps = tl.cdiv(K, BLOCK_K)
    total = tl.cdiv(N, BLOCK_N) * steps
    unit, end, programs = share_of(pid, tl.num_programs(0), total)
    m = tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_N)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    while unit < end:
        tile = unit // steps
        first = unit - tile * steps
        last = tl.minimum(steps, first + end - unit)
        unit += last - first
        n0 = tile * BLOCK_N
        # the weights are the tensor cores' wide operand, for there are more output columns than rows
        gate = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        up = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for step in tl.range(first, last, num_stages=STAGES):
            x_tile = x.load([0, step * BLOCK_K]).T
            gate = tl.dot(weight.load([n0, step * BLOCK_K]).to(x_tile.dtype), x_tile, gate)
            if ACTIVATION is not None:
                up = tl.dot(weight.load([N + n0, step * BLOCK_K]).to(x_tile.dtype), x_tile, up)
        complete = True
        if last - first < steps:
            first_owner = owner(tile * steps, programs, total)
            parts = owner(tile * steps + steps - 1, programs, total) - first_owner + 1
            size: tl.constexpr = BLOCK_N * BLOCK_M
            width: tl.constexpr = size if ACTIVATION is None else size * 2
            cells = columns[:, None] * BLOCK_M + m[None, :]
            # a program may have the end of one tile and the start of another: two places
            mine = partial_ptr + (pid * 2 + tl.where(first == 0, 1, 0)) * width + cells
            tl.store(mine, gate, cache_modifier=".cg")
            if ACTIVATION is not None:
                tl.store(mine + size, up, cache_modifier=".cg")
            tl.debug_barrier()
            arrived = tl.atomic_add(arrivals_ptr + tile, 1, sem="acq_rel", scope="gpu")
            complete = arrived == parts - 1
            if complete:
                tl.store(arrivals_ptr + tile, 0)
                gate = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
                up = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
                for part in range(parts):
                    theirs = partial_ptr + ((first_owner + part) * 2 + tl.where(part == 0, 1, 0)) * width + cells
                    gate += tl.load(theirs, cache_modifier=".cg")
                    if ACTIVATION is not None:
                        up += tl.load(theirs + size, cache_modifier=".cg")
        if complete:
            n = n0 + columns
            if weight_scale_ptr is not None:
                gate *= tl.load(weight_scale_ptr + n, mask=n < N, other=0.0)[:, None]
                if ACTIVATION is not None:
                    up *= tl.load(weight_scale_ptr + N + n, mask=n < N, other=0.0)[:, None]
            if x_scale_ptr is not None:
                scale = tl.load(x_scale_ptr + m, mask=m < M, other=0.0)[None, :]
                gate *= scale
                up *= scale
            if squares_ptr is not None:
                squares = tl.load(squares_ptr + m, mask=m < M, other=0).to(tl.float32) / SCALE
                scale = tl.rsqrt(squares / K + eps)[None, :]
                gate *= scale
                up *= scale
            if bias_ptr is not None:
                gate += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
            if ACTIVATION is not None:
                gate = activated(gate, up, ACTIVATION == "silu")
            at = out_ptr + m[None, :].to(tl.int64) * N + n[:, None]
            inside = (m < M)[None, :] & (n < N)[:, None]
            if RESIDUAL:
                gate += tl.load(at, mask=inside, other=0.0).to(tl.float32)
            stored = gate.to(out_ptr.dtype.element_ty)
            tl.store(at, stored, mask=inside)
            if squares_out_ptr is not None:
                value = tl.where(inside, stored.to(tl.float32), 0.0)
                sums = (tl.sum(value * value, 0) * SCALE).to(tl.int64)
                tl.atomic_add(squares_out_ptr + m, sums, mask=m < M, sem="relaxed")
