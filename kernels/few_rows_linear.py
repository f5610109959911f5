"""Projections of 2 to 16 rows by weights that take less time to read than the kernels ahead take to end.

What counts then is the time from the input's arrival to the output's. Each program holds a few rows of the weights in
registers, as that of one row does; a warp multiplies its part of K on tensor cores, and the parts are added up.
"""

from __future__ import annotations

from dataclasses import dataclass

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


@dataclass(frozen=True)
class Cut:
    """Rows of the weights a program has, and parts of K, one a warp."""

    block_n: int
    warps: int


def cut_of(n: int, k: int, gated: bool) -> Cut:
    """By a sweep on an H100, see docs/log.md."""
    return Cut(16, 8 if k > 1024 else 4)


def suits_few_rows(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `few_rows_linear` takes these, and is fast."""
    rows, k = x.shape
    return (
        1 < rows <= MAX_ROWS
        and k <= MAX_K
        and k % 64 == 0
        and x.dtype == weight.dtype
        and x.element_size() > 1
        and weight.numel() < 2**22
    )


def few_rows_linear(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, epilogue: Epilogue) -> None:
    """See `decode_linear`."""
    (rows, k), n, gated = x.shape, out.shape[1], epilogue.activation is not None
    cut = cut_of(n, k, gated)
    _few_rows_kernel[(triton.cdiv(n, cut.block_n),)](
        x, weight, out, epilogue.squares, epilogue.bias, epilogue.squares_out, rows, n, epilogue.eps,
        ACTIVATION=epilogue.activation, RESIDUAL=epilogue.residual, SCALE=SQUARES_SCALE, K=k, BLOCK_M=MAX_ROWS,
        BLOCK_N=cut.block_n, PARTS=cut.warps, BLOCK_K=max(power_of_two(k // cut.warps), 16), num_warps=cut.warps,
        **dependent_launch(),
    )  # fmt: skip


@triton.jit
def _few_rows_kernel(
    x_ptr, weight_ptr, out_ptr, squares_ptr, bias_ptr, squares_out_ptr, M, N, eps,
    ACTIVATION: tl.constexpr, RESIDUAL: tl.constexpr, SCALE: tl.constexpr, K: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, PARTS: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    m = tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.arange(0, PARTS)[:, None, None]
    k = tl.arange(0, BLOCK_K)[None, None, :]
    inside = k < K // PARTS
    k += part * (K // PARTS)
    is_out = (n < N)[None, :, None] & inside
    rows = weight_ptr + n[None, :, None].to(tl.int64) * K + k
    gate_weight = tl.load(rows, mask=is_out, other=0.0, eviction_policy="evict_first")
    up_weight = gate_weight
    if ACTIVATION is not None:
        up_weight = tl.load(rows + N.to(tl.int64) * K, mask=is_out, other=0.0, eviction_policy="evict_first")
    bias = tl.zeros((BLOCK_N,), tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    x = tl.load(x_ptr + m[None, :, None] * K + k, mask=(m < M)[None, :, None] & inside, other=0.0)
    at = out_ptr + m[:, None].to(tl.int64) * N + n[None, :]
    there = (m < M)[:, None] & (n < N)[None, :]
    before = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if RESIDUAL:
        before = tl.load(at, mask=there, other=0.0).to(tl.float32)
    norm = tl.full((BLOCK_M,), 1.0, tl.float32)
    if squares_ptr is not None:
        squares = tl.load(squares_ptr + m, mask=m < M, other=0).to(tl.float32) / SCALE
        norm = tl.rsqrt(squares / K + eps)
    y = tl.sum(tl.dot(x, tl.permute(gate_weight, (0, 2, 1))), 0) * norm[:, None] + bias[None, :]
    if ACTIVATION is not None:
        up = tl.sum(tl.dot(x, tl.permute(up_weight, (0, 2, 1))), 0) * norm[:, None]
        y = activated(y, up, ACTIVATION == "silu")
    stored = (y + before).to(out_ptr.dtype.element_ty)
    tl.store(at, stored, mask=there)
    if squares_out_ptr is not None:
        value = tl.where(there, stored.to(tl.float32), 0.0)
        sums = (tl.sum(value * value, 1) * SCALE).to(tl.int64)
        tl.atomic_add(squares_out_ptr + m, sums, mask=m < M, sem="relaxed")
