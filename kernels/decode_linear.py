"""Projections of a decode step: few rows, so that reading the weights once, at the memory's speed, is all the work.

What surrounds a projection in a decoder happens while its result is in registers, see `DecodeLinear`. There are two
kernels:

- One row: each program multiplies a few rows of the weights, held in registers, by the input. Its weights are on their
  way before it waits for the input, so that the memory never rests between one projection and the next.
- More rows: a persistent kernel for tensor cores. The weights are cut into tiles of `BLOCK_N` output columns and these
  into steps of `BLOCK_K`; all steps of all tiles are dealt out evenly to the programs (stream-K, arXiv:2301.03598), so
  that no processor waits for another. Where several programs share a tile, the last to arrive adds their parts up,
  always in the same order, so that results don't depend on timing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from headrace.kernels.dealing import owner, share_of
from headrace.kernels.gated_activation import Activation, gated_activation
from headrace.kernels.launch import INTERPRETED, dependent_launch, num_processors, power_of_two

MAX_ROWS = 64
"""With more, a projection is bound by arithmetic, which cuBLAS does best."""
PREFETCHED_LINES = 4
"""By each program: more would be evicted before they are used, see docs/log.md."""
UNCUT_STEPS = 6
SQUARES_SCALE = 2.0**20
"""Sums of squares are added up by atomics as integers of this fraction of one: in any order, the sum is the same."""


@dataclass(frozen=True)
class Epilogue:
    """What happens to the product of x [M, K] and weight [N, K] before it is stored."""

    squares: torch.Tensor | None = None
    """[M] int64: x is a residual stream with these sums of squares (times `SQUARES_SCALE`); its RMS norm, without a
    weight, is what is multiplied."""
    eps: float = 0.0
    weight_scale: torch.Tensor | None = None
    """float32, one for each row of the weight: what a row of an 8-bit weight is multiplied by."""
    x_scale: torch.Tensor | None = None
    """float32 [M]: the same for an 8-bit x."""
    bias: torch.Tensor | None = None
    """[N]."""
    activation: Activation | None = None
    """The weight is [2 * N, K], gate over up, and the result activation(gate) * up."""
    residual: bool = False
    """The result is added to `out`."""
    squares_out: torch.Tensor | None = None
    """[M] int64: the new sums of squares of `out` are added here."""


@dataclass(frozen=True)
class Upcoming:
    """The projection that comes next: while the parts of this one are added up, its weights start on their way."""

    weight: torch.Tensor
    gated: bool = False


class Workspace:
    """Memory that the kernels of one stream share."""

    def __init__(self, device: torch.device) -> None:
        self.partial = torch.empty(16 * 2**20, dtype=torch.float32, device=device)
        self.arrivals = torch.zeros(2**16, dtype=torch.int32, device=device)


def decode_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    epilogue: Epilogue,
    workspace: Workspace,
    upcoming: Upcoming | None = None,
) -> None:
    """Write x [M, K] @ weight [N, K].T, changed by `epilogue`, to out [M, N]; M is at most `MAX_ROWS`, K even.

    Two 8-bit operands are multiplied as they are; an 8-bit weight alone becomes what x is.
    """
    if x.shape[0] == 1:
        _one_row(x, weight, out, epilogue)
    else:
        _stream(x, weight, out, epilogue, workspace, upcoming)


def decode_linear_reference(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, epilogue: Epilogue) -> None:
    """The same in plain torch."""
    y = x.double() @ weight.double().T
    if epilogue.weight_scale is not None:
        y *= epilogue.weight_scale
    if epilogue.x_scale is not None:
        y *= epilogue.x_scale.unsqueeze(1)
    if epilogue.squares is not None:
        mean = epilogue.squares.double() / SQUARES_SCALE / x.shape[1]
        y *= torch.rsqrt(mean + epilogue.eps).unsqueeze(1)
    if epilogue.bias is not None:
        y += epilogue.bias
    if epilogue.activation is not None:
        y = gated_activation(y, epilogue.activation)
    out.copy_(y + out if epilogue.residual else y)
    if epilogue.squares_out is not None:
        epilogue.squares_out.add_((out.double().square().sum(1) * SQUARES_SCALE).long())


def _one_row(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, epilogue: Epilogue) -> None:
    gated = epilogue.activation is not None
    n, k = out.shape[1], x.shape[1]
    block_k = min(power_of_two(k), 4096 if gated and k <= 4096 else 2048)
    block_n = 2 if gated else 8 if k > 8192 else 4
    warps = 8 if block_k >= 2048 and block_n * block_k < 2**14 else 4
    _one_row_kernel[(triton.cdiv(n, block_n),)](
        x, weight, out, epilogue.weight_scale, epilogue.squares, epilogue.bias, epilogue.squares_out,
        n, k, epilogue.eps,
        ACTIVATION=epilogue.activation, RESIDUAL=epilogue.residual, SCALE=SQUARES_SCALE,
        BLOCK_N=block_n, BLOCK_K=block_k, STEPS=triton.cdiv(k, block_k), num_warps=warps,
        **dependent_launch(),
    )  # fmt: skip


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


def _stream(
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    epilogue: Epilogue,
    workspace: Workspace,
    upcoming: Upcoming | None,
) -> None:
    tiling = _tiling(x.shape[0], epilogue.activation is not None)
    n, k = out.shape[1], x.shape[1]
    processors = num_processors(x.device)
    programs = _programs(triton.cdiv(n, tiling.block_n), triton.cdiv(k, tiling.block_k), processors)
    lines = 0 if INTERPRETED or upcoming is None else PREFETCHED_LINES
    upcoming = upcoming or Upcoming(weight)
    next_n, next_k = upcoming.weight.shape[0] // (2 if upcoming.gated else 1), upcoming.weight.shape[1]
    next_tiling = _tiling(x.shape[0], upcoming.gated)
    next_programs = _programs(
        triton.cdiv(next_n, next_tiling.block_n), triton.cdiv(next_k, next_tiling.block_k), processors
    )
    _stream_kernel[(programs,)](
        TensorDescriptor.from_tensor(x, [tiling.block_m, tiling.block_k]),
        TensorDescriptor.from_tensor(weight, [tiling.block_n, tiling.block_k]),
        out, epilogue.weight_scale, epilogue.x_scale, epilogue.squares, epilogue.bias, epilogue.squares_out,
        workspace.partial, workspace.arrivals,
        x.shape[0], n, k, epilogue.eps, upcoming.weight, next_n, next_k, next_programs,
        NEXT_BLOCK_N=next_tiling.block_n, NEXT_BLOCK_K=next_tiling.block_k, NEXT_GATED=upcoming.gated, LINES=lines,
        LINE=128 // upcoming.weight.element_size(),
        ACTIVATION=epilogue.activation, RESIDUAL=epilogue.residual, SCALE=SQUARES_SCALE,
        BLOCK_M=tiling.block_m, BLOCK_N=tiling.block_n, BLOCK_K=tiling.block_k, STAGES=tiling.stages,
        num_warps=tiling.warps, **dependent_launch(),
    )  # fmt: skip


def _programs(tiles: int, steps: int, processors: int) -> int:
    """One program a processor; a few less where each then gets the same whole part of a tile.

    Tiles of a few steps are not cut at all: adding parts up would take longer than the steps.
    """
    if steps <= UNCUT_STEPS and tiles <= processors:
        return tiles
    for split in range(1, 9):
        if processors * 0.84 <= tiles * split <= processors:
            return tiles * split
    return processors


@triton.jit
def _activated(gate, up, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        return gate / (1 + tl.exp(-gate)) * up
    # tanh(z) = 1 - 2 / (exp(2 z) + 1)
    z = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
    return 0.5 * gate * (2 - 2 / (tl.exp(2 * z) + 1)) * up


@triton.jit
def _one_row_kernel(
    x_ptr, weight_ptr, out_ptr, weight_scale_ptr, squares_ptr, bias_ptr, squares_out_ptr, N, K, eps,
    ACTIVATION: tl.constexpr, RESIDUAL: tl.constexpr, SCALE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STEPS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    rows = weight_ptr + n[:, None].to(tl.int64) * K + k[None, :]
    rows_up = rows + N.to(tl.int64) * K
    inside = (n < N)[:, None] & (k < K)[None, :]
    gate = tl.load(rows, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
    up = gate
    if ACTIVATION is not None:
        up = tl.load(rows_up, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    x = tl.load(x_ptr + k, mask=k < K, other=0.0).to(tl.float32)[None, :]
    gate *= x
    if ACTIVATION is not None:
        up *= x
    for step in tl.static_range(1, STEPS):
        here = step * BLOCK_K + k
        inside = (n < N)[:, None] & (here < K)[None, :]
        x = tl.load(x_ptr + here, mask=here < K, other=0.0).to(tl.float32)[None, :]
        gate += tl.load(rows + step * BLOCK_K, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32) * x
        if ACTIVATION is not None:
            more = tl.load(rows_up + step * BLOCK_K, mask=inside, other=0.0, eviction_policy="evict_first")
            up += more.to(tl.float32) * x
    y = tl.sum(gate, 1)
    z = y
    if ACTIVATION is not None:
        z = tl.sum(up, 1)
    if weight_scale_ptr is not None:
        y *= tl.load(weight_scale_ptr + n, mask=n < N, other=0.0)
        if ACTIVATION is not None:
            z *= tl.load(weight_scale_ptr + N + n, mask=n < N, other=0.0)
    if squares_ptr is not None:
        scale = tl.rsqrt(tl.load(squares_ptr).to(tl.float32) / SCALE / K + eps)
        y *= scale
        z *= scale
    if bias_ptr is not None:
        y += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    if ACTIVATION is not None:
        y = _activated(y, z, ACTIVATION)
    if RESIDUAL:
        y += tl.load(out_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    stored = y.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + n, stored, mask=n < N)
    if squares_out_ptr is not None:
        value = tl.where(n < N, stored.to(tl.float32), 0.0)
        tl.atomic_add(squares_out_ptr, (tl.sum(value * value, 0) * SCALE).to(tl.int64), sem="relaxed")


@triton.jit
def _prefetch(lines):
    """Bring one 128-byte line at each address into the L2 cache; prefetches past an allocation's end do nothing."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [lines], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit(do_not_specialize=["M", "next_programs"])
def _stream_kernel(
    x, weight, out_ptr, weight_scale_ptr, x_scale_ptr, squares_ptr, bias_ptr, squares_out_ptr,
    partial_ptr, arrivals_ptr, M, N, K, eps,
    next_ptr, next_n, next_k, next_programs, NEXT_BLOCK_N: tl.constexpr, NEXT_BLOCK_K: tl.constexpr,
    NEXT_GATED: tl.constexpr, LINES: tl.constexpr, LINE: tl.constexpr,
    ACTIVATION: tl.constexpr, RESIDUAL: tl.constexpr, SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    steps = tl.cdiv(K, BLOCK_K)
    total = tl.cdiv(N, BLOCK_N) * steps
    unit, end, programs = share_of(pid, total)
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
        if LINES > 0:
            if unit >= end:
                next_steps = tl.cdiv(next_k, NEXT_BLOCK_K)
                next_unit = pid * (tl.cdiv(next_n, NEXT_BLOCK_N) * next_steps) // next_programs
                next_rows = (next_unit // next_steps) * NEXT_BLOCK_N + tl.arange(0, NEXT_BLOCK_N)
                start = next_rows[:, None].to(tl.int64) * next_k + next_unit % next_steps * NEXT_BLOCK_K
                lines = next_ptr + start + (tl.arange(0, LINES) * LINE)[None, :]
                _prefetch(lines)
                if NEXT_GATED:
                    _prefetch(lines + next_n.to(tl.int64) * next_k)
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
                gate = _activated(gate, up, ACTIVATION)
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
