"""y = x / sqrt(mean(x^2) + eps) * weight, in float32 (arXiv:1910.07467)."""

from __future__ import annotations

import torch


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Normalise the last dimension; x [..., D], weight [D] (or any shape that broadcasts).

    A float32 weight beside a narrower x makes the product in float32, as Gemma does.
    """
    return _reference(x, weight, eps)


def add_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Add x [T, D] to the residual stream in place and return the normalised sum."""
    return _reference(residual.add_(x), weight, eps)


def _reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True).add_(eps))
    return (wide * scale).to(weight.dtype).mul_(weight).to(x.dtype)
