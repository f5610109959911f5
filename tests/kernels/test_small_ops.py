"""Norm, rotation, gate, projection and cache write against formulas written out."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from headrace.kernels.cache_write import write_cache
from headrace.kernels.gated_activation import gated_activation
from headrace.kernels.linear import Linear
from headrace.kernels.rms_norm import add_rms_norm, rms_norm
from headrace.kernels.rope import apply_rope, rope_tables

SHAPES = [(1, 8), (5, 123), (7, 64)]


@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm_divides_by_the_root_mean_square(shape: tuple[int, int]) -> None:
    """The formula: x / rms(x) * w."""
    x, weight = torch.randn(shape), torch.randn(shape[1])
    expected = x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight
    torch.testing.assert_close(rms_norm(x, weight, 1e-6), expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_add_rms_norm_updates_the_residual_in_place(shape: tuple[int, int]) -> None:
    """The sum goes into the residual, its norm is returned."""
    x, residual, weight = torch.randn(shape), torch.randn(shape), torch.randn(shape[1])
    total = x + residual
    normed = add_rms_norm(x, residual, weight, 1e-6)
    torch.testing.assert_close(residual, total)
    torch.testing.assert_close(normed, rms_norm(total, weight, 1e-6))


@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(8, 8), (10, 6)])
def test_rope_turns_pairs_by_position_times_frequency(head_dim: int, rotary_dim: int) -> None:
    """Dimensions i and i + half are a complex number that is multiplied by exp(i * position * frequency)."""
    positions, frequencies = torch.tensor([0, 3, 17]), torch.rand(rotary_dim // 2)
    x = torch.randn(3, 2, head_dim)
    cos, sin = rope_tables(positions, frequencies, torch.float32)
    half = rotary_dim // 2
    turn = torch.polar(torch.ones(3, half), positions.unsqueeze(1) * frequencies).unsqueeze(1)
    turned = torch.complex(x[..., :half], x[..., half:rotary_dim]) * turn
    expected = torch.cat((turned.real, turned.imag, x[..., rotary_dim:]), -1)
    torch.testing.assert_close(apply_rope(x, cos, sin), expected)


@pytest.mark.parametrize("shape", [(1, 8), (5, 46)])
def test_the_gate_is_the_first_half(shape: tuple[int, int]) -> None:
    """act(gate) * up for both activations."""
    gate_up = torch.randn(shape)
    gate, up = gate_up.chunk(2, -1)
    torch.testing.assert_close(gated_activation(gate_up, "silu"), gate * torch.sigmoid(gate) * up)
    expected = functional.gelu(gate, approximate="tanh") * up
    torch.testing.assert_close(gated_activation(gate_up, "gelu_tanh"), expected)


@pytest.mark.parametrize("rows", [1, 3, 65])
@pytest.mark.parametrize("biased", [False, True])
def test_linear_multiplies_by_the_transposed_weight(rows: int, biased: bool) -> None:
    """Whatever layout the weight is kept in."""
    x, weight = torch.randn(rows, 33), torch.randn(17, 33)
    bias = torch.randn(17) if biased else None
    torch.testing.assert_close(Linear(weight, bias)(x), functional.linear(x, weight, bias), atol=1e-5, rtol=1e-5)


def test_write_cache_puts_each_token_into_its_slot_and_nothing_elsewhere() -> None:
    """Three tokens into two pages; all other slots stay zero."""
    pages = torch.zeros(4, 2, 3, 5, 6)
    keys, values = torch.randn(3, 3, 6), torch.randn(3, 3, 6)
    slots = [(2, 4), (0, 0), (0, 1)]
    slot_pages, slot_offsets = torch.tensor([p for p, _ in slots]), torch.tensor([o for _, o in slots])
    write_cache(keys, values, pages, slot_pages, slot_offsets)
    for token, (page, offset) in enumerate(slots):
        torch.testing.assert_close(pages[page, 0, :, offset], keys[token])
        torch.testing.assert_close(pages[page, 1, :, offset], values[token])
        pages[page, :, :, offset] = 0
    assert not pages.any()
