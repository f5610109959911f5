"""What surrounds a projection of a decode step, and the memory that its kernels share."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from headrace.kernels.gated_activation import Activation

SQUARES_SCALE = 2.0**20
"""Sums of squares are added up by atomics as integers of this fraction of one: in any order, the sum is the same."""


@dataclass(frozen=True)
class Epilogue:
    """What happens to the product of x [M, K] and weight [N, K] before it is stored."""

    squares: torch.Tensor | None = None
    """[M] int64: x is a residual stream with these sums of squares (times `SQUARES_SCALE`); its RMS norm, without a
    weight, is what is multiplied."""
    eps: float = 0.0
    weight_scale: torch.Tensor | None = None
    """float32, one for each row of the weight: what a row of an 8-bit weight is multiplied by."""
    x_scale: torch.Tensor | None = None
    """float32 [M]: the same for an 8-bit x."""
    bias: torch.Tensor | None = None
    """[N]."""
    activation: Activation | None = None
    """The weight is [2 * N, K], gate over up, and the result activation(gate) * up."""
    residual: bool = False
    """The result is added to `out`."""
    squares_out: torch.Tensor | None = None
    """[M] int64: the new sums of squares of `out` are added here."""
    keep: torch.Tensor | None = None
    """[M, K], whose rows may lie apart: x is copied here."""


LARGEST_SPLIT = 8
MAX_SHARED_TILES = 256
"""Tiles of one projection that several programs share, at most one program each on a processor."""


class Workspace:
    """Memory that the kernels of one stream share."""

    def __init__(self, device: torch.device) -> None:
        self.partial = torch.empty(16 * 2**20, dtype=torch.float32, device=device)
        self.arrivals = torch.zeros(2**16, dtype=torch.int32, device=device)
        self.counters = torch.zeros((LARGEST_SPLIT + 1) * MAX_SHARED_TILES, dtype=torch.int32, device=device)
        """Never reset, by number of sharing programs and tile."""
