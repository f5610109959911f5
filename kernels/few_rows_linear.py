"""Projections of 2 to 16 rows by weights that take less time to read than the kernels ahead take to end.

What counts then is the time from the input's arrival to the output's. Each program holds a few rows of the weights in
registers, as that of one row does; a warp multiplies its part of K on tensor cores, and the parts are added up.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from headrace.kernels.epilogue import SQUARES_SCALE, Epilogue
from headrace.kernels.gated_activation import activated
from headrace.kernels.launch import dependent_launch, power_of_two

MAX_ROWS = 16
"""Of the input: as many as an instruction of the tensor cores takes."""
MAX_K = 2048
"""More would not fit the registers."""
BLOCK_N = 16
"""Rows of the weights that a program has. Best of 8, 16 and 32 on an H100, see docs/log.md."""
LARGEST = 2**22
"""Numbers in a weight. Larger ones are better read by fewer, longer transfers."""


def suits_few_rows(rows: int, weight: torch.Tensor) -> bool:
    """Whether `few_rows_linear` takes so many rows of input for this weight, and is fast."""
    k = weight.shape[1]
    return 1 < rows <= MAX_ROWS and k <= MAX_K and k % 64 == 0 and weight.numel() < LARGEST


def few_rows_linear(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, epilogue: Epilogue) -> None:
    """See `decode_linear`."""
    (rows, k), n = x.shape, out.shape[1]
    warps = 8 if k > 1024 else 4
    first = power_of_two(k // warps + 1) // 2
    _few_rows_kernel[(triton.cdiv(n, BLOCK_N),)](
        x, weight, out, epilogue.squares, epilogue.bias, epilogue.squares_out, epilogue.keep, rows, n,
        0 if epilogue.keep is None else epilogue.keep.stride(0), epilogue.eps,
        ACTIVATION=epilogue.activation, RESIDUAL=epilogue.residual, OWN_SQUARES=epilogue.own_squares,
        SCALE=SQUARES_SCALE, K=k, BLOCK_M=MAX_ROWS, BLOCK_N=BLOCK_N, PARTS=warps, FIRST=first,
        REST=max(power_of_two(k // warps - first), 16), num_warps=warps, **dependent_launch(),
    )  # fmt: skip


@triton.jit
def _cells(row, is_row, stride, k0, PARTS: tl.constexpr, K: tl.constexpr, SIZE: tl.constexpr):
    """`SIZE` columns from `k0` on of each of the equal parts of K, [PARTS, rows, SIZE], and which are of a part."""
    k = k0 + tl.arange(0, SIZE)[None, None, :]
    at = row[None, :, None].to(tl.int64) * stride + tl.arange(0, PARTS)[:, None, None] * (K // PARTS) + k
    return at, is_row[None, :, None] & (k < K // PARTS)


@triton.jit
def _part_of(start_ptr, row, is_row, k0, PARTS: tl.constexpr, K: tl.constexpr, SIZE: tl.constexpr):
    at, there = _cells(row, is_row, K, k0, PARTS, K, SIZE)
    return tl.load(start_ptr + at, mask=there, other=0.0)


@triton.jit
def _few_rows_kernel(
    x_ptr, weight_ptr, out_ptr, squares_ptr, bias_ptr, squares_out_ptr, keep_ptr, M, N, keep_stride, eps,
    ACTIVATION: tl.constexpr, RESIDUAL: tl.constexpr, OWN_SQUARES: tl.constexpr, SCALE: tl.constexpr,
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr, FIRST: tl.constexpr,
    REST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    m = tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_row = m < M
    is_out = n < N
    # in two pieces, as parts of K are no powers of two: what is beyond would be multiplied, too
    gate_first = _part_of(weight_ptr, n, is_out, 0, PARTS, K, FIRST)
    gate_rest = _part_of(weight_ptr, n, is_out, FIRST, PARTS, K, REST)
    up_first = gate_first
    up_rest = gate_rest
    if ACTIVATION is not None:
        up_first = _part_of(weight_ptr, N + n, is_out, 0, PARTS, K, FIRST)
        up_rest = _part_of(weight_ptr, N + n, is_out, FIRST, PARTS, K, REST)
    bias = tl.zeros((BLOCK_N,), tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + n, mask=is_out, other=0.0).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    x_first = _part_of(x_ptr, m, is_row, 0, PARTS, K, FIRST)
    x_rest = _part_of(x_ptr, m, is_row, FIRST, PARTS, K, REST)
    if keep_ptr is not None:
        is_kept = m < tl.where(tl.program_id(0) == 0, M, 0)
        kept_first, is_first = _cells(m, is_kept, keep_stride, 0, PARTS, K, FIRST)
        kept_rest, is_rest = _cells(m, is_kept, keep_stride, FIRST, PARTS, K, REST)
        tl.store(keep_ptr + kept_first, x_first, mask=is_first)
        tl.store(keep_ptr + kept_rest, x_rest, mask=is_rest)
    at = out_ptr + m[:, None].to(tl.int64) * N + n[None, :]
    there = is_row[:, None] & is_out[None, :]
    before = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if RESIDUAL:
        before = tl.load(at, mask=there, other=0.0).to(tl.float32)
    norm = tl.full((BLOCK_M,), 1.0, tl.float32)
    if squares_ptr is not None:
        squares = tl.load(squares_ptr + m, mask=is_row, other=0).to(tl.float32) / SCALE
        norm = tl.rsqrt(squares / K + eps)
    if OWN_SQUARES:
        first = x_first.to(tl.float32)
        rest = x_rest.to(tl.float32)
        norm = tl.rsqrt(tl.sum(tl.sum(first * first, 2) + tl.sum(rest * rest, 2), 0) / K + eps)
    y = tl.dot(x_first, tl.permute(gate_first, (0, 2, 1))) + tl.dot(x_rest, tl.permute(gate_rest, (0, 2, 1)))
    y = tl.sum(y, 0) * norm[:, None] + bias[None, :]
    if ACTIVATION is not None:
        up = tl.dot(x_first, tl.permute(up_first, (0, 2, 1))) + tl.dot(x_rest, tl.permute(up_rest, (0, 2, 1)))
        y = activated(y, tl.sum(up, 0) * norm[:, None], ACTIVATION == "silu")
    stored = (y + before).to(out_ptr.dtype.element_ty)
    tl.store(at, stored, mask=there)
    if squares_out_ptr is not None:
        value = tl.where(there, stored.to(tl.float32), 0.0)
        sums = (tl.sum(value * value, 1) * SCALE).to(tl.int64)
        tl.atomic_add(squares_out_ptr + m, sums, mask=is_row, sem="relaxed")
