"""The decode projections in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.comparisons import compare_decode_linear


@pytest.mark.parametrize("activation", [None, "silu", "gelu_tanh"])
@pytest.mark.parametrize("surrounded", [False, True])
@pytest.mark.parametrize(
    "shape", [(1, 52, 96), (1, 10, 5000), (1, 5, 9000), (3, 192, 320), (17, 70, 520), (64, 128, 200)]
)
def test_a_projection_equals_its_reference(
    shape: tuple[int, int, int], activation: str | None, surrounded: bool
) -> None:
    """One row and more, whole tiles and parts of them, more programs than work and less."""
    compare_decode_linear("cpu", torch.float32, shape, activation, surrounded)


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("rows", [1, 20])
def test_weights_of_8_bits_are_scaled_by_output(rows: int, activation: str | None) -> None:
    """Gate and up have scales of their own."""
    compare_decode_linear("cpu", torch.float32, (rows, 64, 192), activation, True, fp8=True)
