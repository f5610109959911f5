"""Rotary position embedding in the half-split form of Hugging Face checkpoints (arXiv:2104.09864)."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class RopeTables:
    """cos and sin, float32 [positions, rotary_dim / 2], for the kernels that rotate among other things."""

    cos: torch.Tensor
    sin: torch.Tensor

    @classmethod
    def at(cls, positions: torch.Tensor, inverse_frequencies: torch.Tensor) -> RopeTables:
        """Tables whose rows are for `positions`."""
        angles = positions.float().unsqueeze(1) * inverse_frequencies
        return cls(angles.cos(), angles.sin())


def rope_tables(
    positions: torch.Tensor, inverse_frequencies: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cos and sin, [T, 1, rotary_dim], for positions [T]; sin carries the minus of the first half."""
    angles = positions.to(torch.float32).unsqueeze(-1) * inverse_frequencies
    cos, sin = angles.cos(), angles.sin()
    return (
        torch.cat((cos, cos), dim=-1).unsqueeze(1).to(dtype),
        torch.cat((-sin, sin), dim=-1).unsqueeze(1).to(dtype),
    )


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate x [T, heads, head_dim] with tables of `rope_tables`; dimensions past rotary_dim stay as they are."""
    return _reference(x, cos, sin)


def _reference(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    rotary_dim = cos.shape[-1]
    rotated = x[..., :rotary_dim]
    rotated = torch.addcmul(rotated * cos, rotated.roll(rotary_dim // 2, -1), sin)
    if rotary_dim == x.shape[-1]:
        return rotated
    return torch.cat((rotated, x[..., rotary_dim:]), dim=-1)
