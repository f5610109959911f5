"""Projections of a decode step: few rows, so that reading the weights once, at the memory's speed, is all the work.

What surrounds a projection in a decoder happens while its result is in registers, see `Epilogue`. One row has a kernel
of its own, below: each program multiplies a few rows of the weights, held in registers, by the input. Its weights are
on their way before it waits for the input, so that the memory never rests between one projection and the next. More
rows take tensor cores: `ring_linear` on a Hopper GPU, `stream_linear` elsewhere. A Hopper GPU multiplies few weights
and up to 32 rows by `register_linear`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from headrace.kernels.epilogue import SQUARES_SCALE, Epilogue, Workspace
from headrace.kernels.gated_activation import activated
from headrace.kernels.launch import dependent_launch, is_hopper, power_of_two
from headrace.kernels.stream_linear import stream_linear

if is_hopper():
    from headrace.kernels.register_linear import fits_registers, register_linear
    from headrace.kernels.ring_linear import ring_linear


def max_rows(device: torch.device) -> int:
    """With more, a projection is bound by arithmetic, which cuBLAS does best."""
    return 128 if device.type == "cuda" and is_hopper() else 64


def decode_linear(
    x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, epilogue: Epilogue, workspace: Workspace
) -> None:
    """Write x [M, K] @ weight [N, K].T, changed by `epilogue`, to out [M, N]; M is at most `max_rows`, K even.

    Two 8-bit operands are multiplied as they are; an 8-bit weight alone becomes what x is.
    """
    if is_hopper() and fits_registers(x, weight, epilogue.activation is not None):
        register_linear(x, weight, out, epilogue)
        return
    if epilogue.keep is not None:
        epilogue.keep.copy_(x)
    if x.shape[0] == 1:
        _one_row(x, weight, out, epilogue)
    elif is_hopper() and x.dtype == weight.dtype != torch.float32 and x.shape[1] % 16 == out.shape[1] % 8 == 0:
        ring_linear(x, weight, out, epilogue, workspace)
    else:
        stream_linear(x, weight, out, epilogue, workspace)


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
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    if squares_ptr is not None:
        squares = tl.load(squares_ptr)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + n, mask=n < N, other=0.0)
    if RESIDUAL:
        before = tl.load(out_ptr + n, mask=n < N, other=0.0)
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
        scale = tl.rsqrt(squares.to(tl.float32) / SCALE / K + eps)
        y *= scale
        z *= scale
    if bias_ptr is not None:
        y += bias.to(tl.float32)
    if ACTIVATION is not None:
        y = activated(y, z, ACTIVATION == "silu")
    if RESIDUAL:
        y += before.to(tl.float32)
    stored = y.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + n, stored, mask=n < N)
    if squares_out_ptr is not None:
        value = tl.where(n < N, stored.to(tl.float32), 0.0)
        tl.atomic_add(squares_out_ptr, (tl.sum(value * value, 0) * SCALE).to(tl.int64), sem="relaxed")
