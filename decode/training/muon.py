"""Muon: momentum that is made orthogonal before it moves a matrix (arXiv:2502.16982), without weight decay."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

MOMENTUM = 0.95
STEPS = 5
COEFFICIENTS = (3.4445, -4.775, 2.0315)
"""Of a quintic that takes singular values from 0 to 1 near 1 in so few steps."""
LIKE_ADAMW = 0.2
"""Root mean square of a step beside the learning rate, as AdamW's is."""


class Muon:
    """Moves matrices by the gradients that they have."""

    def __init__(self, weights: Iterable[nn.Parameter]) -> None:
        self._moving = [(weight, torch.zeros_like(weight)) for weight in weights]

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Move all once, at this learning rate."""
        for weight, momentum in self._moving:
            assert weight.grad is not None
            momentum.lerp_(weight.grad, 1 - MOMENTUM)
            update = orthogonal(weight.grad.lerp(momentum, MOMENTUM))
            weight.add_(update, alpha=-rate * LIKE_ADAMW * max(weight.shape) ** 0.5)


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """The same with singular values of about 1 (0.7 to 1.2), in 16 bits where these multiply fast."""
    first, second, third = COEFFICIENTS
    x: torch.Tensor = matrix.bfloat16() if matrix.is_cuda else matrix
    is_tall = x.shape[0] > x.shape[1]
    x = x.T if is_tall else x
    x = x / x.norm().clamp_min(1e-7)
    for _ in range(STEPS):
        square = x @ x.T
        x = torch.addmm(x, torch.addmm(square, square, square, beta=second, alpha=third), x, beta=first)
    return x.T if is_tall else x
