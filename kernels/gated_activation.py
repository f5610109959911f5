"""act(gate) * up: SwiGLU and GeGLU (arXiv:2002.05202)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F

Activation = Literal["silu", "gelu_tanh"]


def gated_activation(gate_up: torch.Tensor, activation: Activation) -> torch.Tensor:
    """gate_up [T, 2 * I] holds the gate's half first; returns [T, I]."""
    return _reference(gate_up, activation)


def _reference(gate_up: torch.Tensor, activation: Activation) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    activated = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")
    return activated.mul_(up)
