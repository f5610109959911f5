"""Weights as `packed_linear` keeps them: 16 evenly spaced values in each block of 32 inputs (GGUF's Q4_1)."""

from __future__ import annotations

import torch

BLOCK = 32
STEPS = 15


def round_to_4_bits(weight: torch.Tensor) -> torch.Tensor:
    """The nearest weights [out, in] that have 4 bits, float32. `in` is a multiple of 32."""
    blocks = weight.float().reshape(-1, BLOCK)
    lowest = blocks.amin(1, keepdim=True).half().float()
    step = ((blocks.amax(1, keepdim=True) - lowest) / STEPS).half().float()
    codes = ((blocks - lowest) / step.clamp_min(1e-8)).round_().clamp_(0, STEPS)
    return (lowest + step * codes).view(weight.shape)
