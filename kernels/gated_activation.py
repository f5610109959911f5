"""act(gate) * up: SwiGLU and GeGLU (arXiv:2002.05202)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F

from headrace.kernels.launcher import Launcher
from headrace.kernels.optional_triton import tl, triton

Activation = Literal["silu", "gelu_tanh"]

BLOCK = 1024


def gated_activation(
    gate_up: torch.Tensor, activation: Activation, factors: torch.Tensor | None = None
) -> torch.Tensor:
    """gate_up [T, 2 * I] holds the gate's half first; `factors`, float32 [T], multiply its rows. Returns [T, I]."""
    return (_launch if gate_up.is_cuda else _reference)(gate_up, activation, factors)


def _reference(gate_up: torch.Tensor, activation: Activation, factors: torch.Tensor | None) -> torch.Tensor:
    if factors is not None:
        return _reference(gate_up.float() * factors.unsqueeze(1), activation, None).to(gate_up.dtype)
    gate, up = gate_up.chunk(2, dim=-1)
    return (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")).mul_(up)


def _launch(gate_up: torch.Tensor, activation: Activation, factors: torch.Tensor | None) -> torch.Tensor:
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, size)
    if rows > 0:
        constants = (gate_up.stride(0), size, BLOCK, activation == "silu")
        _launch_gated_activation((rows, -(-size // BLOCK), 1), (gate_up, factors, out), constants, num_warps=4)
    return out


@triton.jit
def activated(gate, up, IS_SILU: tl.constexpr):
    """act(gate) * up, in registers."""
    if IS_SILU:
        return gate / (1 + tl.exp(-gate)) * up
    inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)  # sqrt(2 / pi)
    return gate / (1 + tl.exp(-2.0 * inner)) * up  # tanh(z) = 2 sigmoid(2 z) - 1


@triton.jit
def _gated_activation_kernel(
    gate_up_ptr, factors_ptr, out_ptr,
    STRIDE: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, IS_SILU: tl.constexpr,
):  # fmt: skip
    """A block of one row, in float32."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = column < SIZE
    # all loads below are of what the kernel ahead has made
    gate = tl.load(gate_up_ptr + row * STRIDE + column, mask=there, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * STRIDE + SIZE + column, mask=there, other=0.0).to(tl.float32)
    if factors_ptr is not None:
        factor = tl.load(factors_ptr + row)
        gate, up = gate * factor, up * factor
    tl.store(out_ptr + row * SIZE + column, activated(gate, up, IS_SILU).to(out_ptr.dtype.element_ty), mask=there)


_launch_gated_activation = Launcher(_gated_activation_kernel)
