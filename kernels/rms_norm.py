"""y = x / sqrt(mean(x^2) + eps) * weight, in float32 (arXiv:1910.07467)."""

from __future__ import annotations

import torch

from headrace.kernels.launch import dependent_launch, power_of_two
from headrace.kernels.launcher import Launcher
from headrace.kernels.optional_triton import tl, triton


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Normalise the last dimension; x [..., D], weight [D] (or on a CPU any shape that broadcasts).

    A float32 weight beside a narrower x makes the product in float32, as Gemma does.
    """
    return _launch(x, None, weight, eps) if x.is_cuda else _reference(x, weight, eps)


def add_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Add x [T, D] to the residual stream in place and return the normalised sum."""
    return _launch(x, residual, weight, eps) if x.is_cuda else _reference(residual.add_(x), weight, eps)


def rms_factors(x: torch.Tensor, eps: float) -> torch.Tensor:
    """What the rows of x [T, D] are to be multiplied by to be normalised: float32 [T]."""
    return _launch_factors(x, eps) if x.is_cuda else torch.rsqrt(x.float().square().mean(-1).add_(eps))


def _reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True).add_(eps))
    return (wide * scale).to(weight.dtype).mul_(weight).to(x.dtype)


def _launch(x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float) -> torch.Tensor:
    size = x.shape[-1]
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel() == 0:
        return out
    rows = x if x.dim() == 2 else x.reshape(-1, size)
    padded, options = power_of_two(size), dependent_launch()
    _launch_rms_norm(
        (rows.shape[0], 1, 1),
        (rows, residual, weight, out, eps),
        (rows.stride(0), 0 if residual is None else residual.stride(-2), size, padded, options.pop("PDL")),
        num_warps=min(max(padded // 512, 1), 16),
        **options,
    )
    return out


def _launch_factors(x: torch.Tensor, eps: float) -> torch.Tensor:
    factors = torch.empty(len(x), dtype=torch.float32, device=x.device)
    if len(x):
        size = power_of_two(x.shape[1])
        constants = (x.stride(0), x.shape[1], size)
        _launch_rms_factors((len(x), 1, 1), (x, factors, eps), constants, num_warps=min(max(size // 512, 1), 16))
    return factors


@triton.jit
def _rms_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, out_ptr, eps,
    X_STRIDE: tl.constexpr, RESIDUAL_STRIDE: tl.constexpr, SIZE: tl.constexpr, SIZE_PADDED: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One row; every product is rounded where the reference rounds it."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, SIZE_PADDED)
    there = column < SIZE
    weight = tl.load(weight_ptr + column, mask=there, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    x = tl.load(x_ptr + row * X_STRIDE + column, mask=there, other=0.0)
    if residual_ptr is not None:
        at = residual_ptr + row * RESIDUAL_STRIDE + column
        total = x.to(tl.float32) + tl.load(at, mask=there, other=0.0).to(tl.float32)
        x = total.to(residual_ptr.dtype.element_ty)
        tl.store(at, x, mask=there)
    wide = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / SIZE + eps)
    normed = (wide * scale).to(weight.dtype).to(tl.float32) * weight.to(tl.float32)
    tl.store(out_ptr + row * SIZE + column, normed.to(weight.dtype).to(out_ptr.dtype.element_ty), mask=there)


@triton.jit
def _rms_factors_kernel(
    x_ptr, factors_ptr, eps, STRIDE: tl.constexpr, SIZE: tl.constexpr, SIZE_PADDED: tl.constexpr
):  # fmt: skip
    """One row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, SIZE_PADDED)
    x = tl.load(x_ptr + row * STRIDE + column, mask=column < SIZE, other=0.0).to(tl.float32)
    tl.store(factors_ptr + row, tl.rsqrt(tl.sum(x * x, 0) / SIZE + eps))


_launch_rms_norm = Launcher(_rms_norm_kernel)
_launch_rms_factors = Launcher(_rms_factors_kernel)
