"""Small projections of up to 32 rows on a Hopper GPU, in Gluon: all weights lie in registers before the input is there.

Nothing but latency counts here: a small model's layer is read in two microseconds and takes six times as long, for its
kernels wait for one another. Each program loads its rows of the weights, straight as the operand that the tensor cores
take, lets the next kernel be launched, which does the same, and waits for the kernel ahead. What is left to do then:
the input's rows, some products a warp, one exchange between the warps, each of which has its own part of K.
"""

from __future__ import annotations

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from headrace.kernels.epilogue import SQUARES_SCALE, Epilogue
from headrace.kernels.gated_activation import activated
from headrace.kernels.launch import power_of_two

ROWS = 16
"""Of the weights, in a tile: as many as one instruction of the tensor cores takes."""
# By sweeps on an H100, see docs/log.md: beyond these, `ring_linear` is as fast or faster.
MAX_ROWS, MAX_GATED_ROWS, MAX_K = 32, 8, 2048
MAX_BYTES = 2**24
"""Of the weights."""
MAX_TRAFFIC = 2**26
"""Bytes of the weights times rows of x: all programs read all of x out of the L2 cache."""
MAX_REGISTERS = 168
"""Of a thread. Not told, the compiler takes few, and has some loads wait for others."""
BLOCK_K = 32
"""Of a warp's part of K: a thread loads 16 bytes of it."""


def fits_registers(x: torch.Tensor, weight: torch.Tensor, gated: bool) -> bool:
    """Whether this is the kernel for such a projection on a Hopper GPU."""
    (rows, k), size = x.shape, weight.nbytes
    few = rows <= (MAX_GATED_ROWS if gated else MAX_ROWS) and k <= MAX_K
    small = size <= MAX_BYTES and size * rows <= MAX_TRAFFIC
    return few and small and k % 8 == 0 and x.dtype == weight.dtype and x.itemsize == 2


def register_linear(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, epilogue: Epilogue) -> None:
    """See `decode_linear`, where it `fits_registers`."""
    (rows, k), n, keep = x.shape, out.shape[1], epilogue.keep
    _register_kernel[(triton.cdiv(weight.shape[0], ROWS),)](
        x, weight, out, epilogue.squares, epilogue.bias, epilogue.squares_out, keep, rows, n, k, 1 / k, epilogue.eps,
        0 if keep is None else keep.stride(0),
        ACTIVATION=epilogue.activation, RESIDUAL=epilogue.residual, SCALE=SQUARES_SCALE, ROWS=ROWS, BLOCK_K=BLOCK_K,
        **tiling(rows, k), maxnreg=MAX_REGISTERS, launch_pdl=True,
    )  # fmt: skip


def tiling(rows: int, k: int) -> dict[str, int]:
    """The kernel's constants for x of such a shape."""
    warps = 4 if k <= 640 and rows <= 16 else 8
    steps = triton.cdiv(k, warps * BLOCK_K)
    return {"BLOCK_M": max(8, power_of_two(rows)), "STEPS": steps, "num_warps": warps}


@gluon.constexpr_function
def _operands_layout(num_warps):
    """Of [warps, ROWS, BLOCK_M] sums: each warp has its own."""
    return gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[num_warps, 1, 1], instr_shape=[1, 16, 8])


@gluon.constexpr_function
def _sums_layout(num_warps, gated):
    """Of what is left to add up, all warps' sums of a cell in one thread: [warps, ROWS, BLOCK_M], or where each gate
    meets its up, [warps, ROWS / 2, BLOCK_M, 2].
    """
    if gated:
        return gl.BlockedLayout([num_warps, 1, 1, 2], [1, 8, 4, 1], [1, 1, num_warps, 1], [3, 0, 1, 2])
    return gl.BlockedLayout([num_warps, 2, 1], [1, 8, 4], [1, 1, num_warps], [0, 1, 2])


@gluon.constexpr_function
def _out_layout(sums_layout):
    """Of [output columns, BLOCK_M] of these sums."""
    return (
        gl.SliceLayout(0, sums_layout) if sums_layout.rank == 3 else gl.SliceLayout(2, gl.SliceLayout(0, sums_layout))
    )


@gluon.jit
def _load_steps(at, there, k, K, WIDTH: gl.constexpr, STEPS: gl.constexpr):
    """A program's part of an operand, step by step along K; all loads are on their way together."""
    parts = gl.tuple(())
    for step in gl.static_range(STEPS):
        parts += (gl.load(at + step * WIDTH, mask=there & (k < K - step * WIDTH), other=0.0),)
    return parts


@gluon.jit(do_not_specialize=["M", "N"])
def _register_kernel(
    x_ptr, weight_ptr, out_ptr, squares_ptr, bias_ptr, squares_out_ptr, keep_ptr, M, N, K, inverse_k, eps, keep_stride,
    ACTIVATION: gl.constexpr, RESIDUAL: gl.constexpr, SCALE: gl.constexpr, BLOCK_M: gl.constexpr, ROWS: gl.constexpr,
    BLOCK_K: gl.constexpr, STEPS: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    layout: gl.constexpr = _operands_layout(num_warps)
    weights_layout: gl.constexpr = gl.DotOperandLayout(0, layout, 8)
    inputs_layout: gl.constexpr = gl.DotOperandLayout(1, layout, 8)
    WIDTH: gl.constexpr = num_warps * BLOCK_K
    tile = gl.program_id(0)

    warp = gl.arange(0, num_warps, layout=gl.SliceLayout(1, gl.SliceLayout(2, weights_layout)))[:, None, None]
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(0, gl.SliceLayout(2, weights_layout)))[None, :, None]
    k = (
        warp * BLOCK_K
        + gl.arange(0, BLOCK_K, layout=gl.SliceLayout(0, gl.SliceLayout(1, weights_layout)))[None, None, :]
    )
    if ACTIVATION is not None:  # eight rows of the gate, then eight of up
        n = tile * (ROWS // 2) + row % (ROWS // 2)
        there = n < N
        n += row // (ROWS // 2) * N
    else:
        n = tile * ROWS + row
        there = n < N
    at = weight_ptr + n.to(gl.int64) * K + k
    weights = _load_steps(at, there, k, K, WIDTH, STEPS)
    gdc_launch_dependents()
    gdc_wait()

    # what the epilogue needs comes while products are made
    sums_layout: gl.constexpr = _sums_layout(num_warps, ACTIVATION is not None)
    out_layout: gl.constexpr = _out_layout(sums_layout)
    COLUMNS: gl.constexpr = ROWS if ACTIVATION is None else ROWS // 2
    n = tile * COLUMNS + gl.arange(0, COLUMNS, layout=gl.SliceLayout(1, out_layout))
    out_m = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, out_layout))
    out_at = out_ptr + out_m[None, :] * N + n[:, None]
    inside = (out_m < M)[None, :] & (n < N)[:, None]
    if squares_ptr is not None:
        squares = gl.load(squares_ptr + out_m, mask=out_m < M, other=0)
    if bias_ptr is not None:
        bias = gl.load(bias_ptr + n, mask=n < N, other=0.0)
    if RESIDUAL:
        before = gl.load(out_at, mask=inside, other=0.0)

    warp = gl.arange(0, num_warps, layout=gl.SliceLayout(1, gl.SliceLayout(2, inputs_layout)))[:, None, None]
    k = (
        warp * BLOCK_K
        + gl.arange(0, BLOCK_K, layout=gl.SliceLayout(0, gl.SliceLayout(2, inputs_layout)))[None, :, None]
    )
    m = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, gl.SliceLayout(1, inputs_layout)))[None, None, :]
    at = x_ptr + m * K + k
    inputs = _load_steps(at, m < M, k, K, WIDTH, STEPS)

    # two sums: a product waits for the one whose sum it adds to
    sums = gl.zeros([num_warps, ROWS, BLOCK_M], gl.float32, layout)
    others = gl.zeros([num_warps, ROWS, BLOCK_M], gl.float32, layout)
    for step in gl.static_range(STEPS):
        if step % 2 == 0:
            sums = mma_v2(weights[step], inputs[step], sums)
        else:
            others = mma_v2(weights[step], inputs[step], others)
    sums += others
    if ACTIVATION is not None:
        sums = sums.reshape([num_warps, 2, ROWS // 2, BLOCK_M]).permute((0, 2, 3, 1))
        value, up = gl.sum(gl.convert_layout(sums, sums_layout), 0).split()
    else:
        value = gl.sum(gl.convert_layout(sums, sums_layout), 0)
    if squares_ptr is not None:
        norm = gl.rsqrt(squares.to(gl.float32) / SCALE * inverse_k + eps)[None, :]
        value *= norm
        if ACTIVATION is not None:
            up *= norm
    if bias_ptr is not None:
        value += bias.to(gl.float32)[:, None]
    if ACTIVATION is not None:
        value = activated(value, up, ACTIVATION == "silu")
    if RESIDUAL:
        value += before.to(gl.float32)
    stored = value.to(out_ptr.dtype.element_ty)
    gl.store(out_at, stored, mask=inside)
    if squares_out_ptr is not None:
        kept = gl.where(inside, stored.to(gl.float32), 0.0)
        sums_out = (gl.sum(kept * kept, 0) * SCALE).to(gl.int64)
        gl.atomic_add(squares_out_ptr + out_m, sums_out, mask=out_m < M, sem="relaxed")
    if keep_ptr is not None:
        if tile == 0:
            kept_at = keep_ptr + m * keep_stride + k
            for step in gl.static_range(STEPS):
                gl.store(kept_at + step * WIDTH, inputs[step], mask=(m < M) & (k < K - step * WIDTH))
