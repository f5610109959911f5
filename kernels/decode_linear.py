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

MOST_EARLY_STEPS = 4
"""Along K, whose 8-bit weights one row has in registers before the wait for its input; half as many of 16 bits."""
VECTOR = 8
"""Neighbours along K that a thread has of one row: 16 bytes of 16-bit inputs."""


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
    elif is_hopper() and x.dtype == weight.dtype != torch.float32 and _fits_ring(x, out):
        ring_linear(x, weight, out, epilogue, workspace)
    else:
        stream_linear(x, weight, out, epilogue, workspace)


def _fits_ring(x: torch.Tensor, out: torch.Tensor) -> bool:
    """Tensor maps have lines of 16 bytes."""
    return x.shape[1] * x.element_size() % 16 == 0 and out.shape[1] % 8 == 0


def _one_row(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, epilogue: Epilogue) -> None:
    gated = epilogue.activation is not None
    n, k = out.shape[1], x.shape[1]
    block_k = min(power_of_two(k), 4096 if gated and k <= 4096 else 2048)
    steps = triton.cdiv(k, block_k)
    block_n = 4 if not gated else max(1, 2 // (weight.element_size() if block_k >= 2048 else 1))
    early = min(max(1, steps // 2), max(1, MOST_EARLY_STEPS // weight.element_size()))
    _one_row_kernel[(triton.cdiv(n, block_n),)](
        x, weight, out, epilogue.weight_scale, epilogue.squares, epilogue.bias, epilogue.squares_out,
        n, k, epilogue.eps,
        ACTIVATION=epilogue.activation, RESIDUAL=epilogue.residual, SCALE=SQUARES_SCALE,
        BLOCK_N=block_n, BLOCK_K=block_k, STEPS=steps, EARLY=early, VECTOR=VECTOR,
        num_warps=8 if block_k >= 2048 else 4, **dependent_launch(),
    )  # fmt: skip


@triton.jit
def _one_row_kernel(
    x_ptr, weight_ptr, out_ptr, weight_scale_ptr, squares_ptr, bias_ptr, squares_out_ptr, N, K, eps,
    ACTIVATION: tl.constexpr, RESIDUAL: tl.constexpr, SCALE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STEPS: tl.constexpr, EARLY: tl.constexpr, VECTOR: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    # a thread has the same neighbours of x as of the weights, also of those of 8 bits: nothing is exchanged
    k = tl.max_contiguous(tl.arange(0, BLOCK_K), VECTOR)
    rows = weight_ptr + n[:, None].to(tl.int64) * K + k[None, :]
    rows_up = rows + N.to(tl.int64) * K
    gates = ()
    ups = ()
    for step in tl.static_range(EARLY):
        gates += (_load_weights(rows, n, k, step, N, K, BLOCK_K),)  # type: ignore[assignment]
        if ACTIVATION is not None:
            ups += (_load_weights(rows_up, n, k, step, N, K, BLOCK_K),)  # type: ignore[assignment]
    if weight_scale_ptr is not None:
        weight_scale = tl.load(weight_scale_ptr + n, mask=n < N, other=0.0)
        if ACTIVATION is not None:
            up_scale = tl.load(weight_scale_ptr + N + n, mask=n < N, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    if squares_ptr is not None:
        norm = tl.rsqrt(tl.load(squares_ptr).to(tl.float32) / SCALE / K + eps)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + n, mask=n < N, other=0.0)
    if RESIDUAL:
        before = tl.load(out_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    y = tl.zeros((BLOCK_N, BLOCK_K // VECTOR), tl.float32)
    z = y
    for step in tl.static_range(STEPS):
        x = tl.load(x_ptr + step * BLOCK_K + k, mask=step * BLOCK_K + k < K, other=0.0).to(tl.float32)
        if squares_ptr is not None:
            x *= norm
        gate = gates[step] if step < EARLY else _load_weights(rows, n, k, step, N, K, BLOCK_K)
        y += _products(gate, x, VECTOR)
        if ACTIVATION is not None:
            up = ups[step] if step < EARLY else _load_weights(rows_up, n, k, step, N, K, BLOCK_K)
            z += _products(up, x, VECTOR)
    y = tl.sum(y, 1)
    z = tl.sum(z, 1)
    if weight_scale_ptr is not None:
        y *= weight_scale
        if ACTIVATION is not None:
            z *= up_scale
    if bias_ptr is not None:
        y += bias.to(tl.float32)
    if ACTIVATION is not None:
        y = activated(y, z, ACTIVATION == "silu")
    if RESIDUAL:
        y += before
    stored = y.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + n, stored, mask=n < N)
    if squares_out_ptr is not None:
        value = tl.where(n < N, stored.to(tl.float32), 0.0)
        tl.atomic_add(squares_out_ptr, (tl.sum(value * value, 0) * SCALE).to(tl.int64), sem="relaxed")


@triton.jit
def _load_weights(rows, n, k, step, N, K, BLOCK_K: tl.constexpr):
    inside = (n < N)[:, None] & (step * BLOCK_K + k < K)[None, :]
    return tl.load(rows + step * BLOCK_K, mask=inside, other=0.0, eviction_policy="evict_first")


@triton.jit
def _products(weights, x, VECTOR: tl.constexpr):
    """[rows, K / VECTOR]: what one thread has is added up before anything is kept, so that few registers are needed."""
    products = weights.to(tl.float32) * x[None, :]
    return tl.sum(tl.reshape(products, (products.shape[0], products.shape[1] // VECTOR, VECTOR)), 2)
