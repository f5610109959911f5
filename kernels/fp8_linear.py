"""Projections with 8-bit weights: float8 e4m3 (OCP 8-bit floating point, 1.0) with a scale for each output.

The input is rounded to 8 bits, too, with a scale for each row (dynamic quantization), so that tensor cores multiply
both as they are. A decode step with a single row keeps its 16 bits, see `decode_linear`.
"""

from __future__ import annotations

import torch

from headrace.kernels.launch import dependent_launch, power_of_two
from headrace.kernels.optional_triton import tl, triton

LARGEST = 448.0
SMALLEST_SCALE = 1e-12


class Fp8Linear:
    """See `Projection`; on a GPU that multiplies float8 (compute capability 8.9 or more)."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self._weight, self._scale = quantize_rows(weight)
        self._bias = bias

    @property
    def weight(self) -> torch.Tensor:
        """float8_e4m3fn [out, in]."""
        return self._weight

    @property
    def weight_scale(self) -> torch.Tensor:
        """See `Projection`."""
        return self._scale

    @property
    def bias(self) -> torch.Tensor | None:
        """[out]."""
        return self._bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """See `Projection`."""
        rows, scale = quantize_rows(x)
        y: torch.Tensor = torch._scaled_mm(
            rows, self._weight.T, scale.unsqueeze(1), self._scale.unsqueeze(0), out_dtype=x.dtype, use_fast_accum=True
        )
        return y if self._bias is None else y.add_(self._bias)


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x [R, D] as float8_e4m3fn and the float32 scales [R] that restore it."""
    if not x.is_cuda:
        return _reference(x)
    quantized = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    _quantize_kernel[(x.shape[0],)](
        x, quantized, scale, x.shape[1], LARGEST=LARGEST, SMALLEST=SMALLEST_SCALE,
        SIZE=power_of_two(x.shape[1]), num_warps=8, **dependent_launch(),
    )  # fmt: skip
    return quantized, scale


def _reference(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = (x.float().abs().amax(-1) / LARGEST).clamp(min=SMALLEST_SCALE)
    return (x.float() / scale.unsqueeze(-1)).to(torch.float8_e4m3fn), scale


@triton.jit
def _quantize_kernel(
    x_ptr,
    quantized_ptr,
    scale_ptr,
    size,
    LARGEST: tl.constexpr,
    SMALLEST: tl.constexpr,
    SIZE: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        # the projection behind it reads nothing but weights before its own wait, and fills its ring with them meanwhile
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, SIZE)
    x = tl.load(x_ptr + row * size + d, mask=d < size, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(x), 0) / LARGEST, SMALLEST)
    tl.store(quantized_ptr + row * size + d, (x * (1 / scale)).to(tl.float8e4nv), mask=d < size)
    tl.store(scale_ptr + row, scale)
