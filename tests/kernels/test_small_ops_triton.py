"""The small kernels in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from headrace.kernels.gated_activation import Activation
from tests.kernels.compare_small_ops import (
    ROPE_CASES,
    RopeCase,
    compare_factors,
    compare_gate,
    compare_norms,
    compare_rope_cache,
)


@pytest.mark.parametrize("shape", [(1, 8), (5, 123), (2, 3, 64), (0, 16)])
@pytest.mark.parametrize("weight_dtype", [torch.float16, torch.float32])
def test_norms_equal_their_references(shape: tuple[int, ...], weight_dtype: torch.dtype) -> None:
    """Sizes that are no powers of two, no rows, and Gemma's wide weights."""
    compare_norms(shape, torch.float16, weight_dtype, "cpu")


@pytest.mark.parametrize("shape", [(1, 8), (5, 123), (0, 16)])
def test_factors_normalise_rows(shape: tuple[int, int]) -> None:
    """Sizes that are no powers of two, and no rows."""
    compare_factors(shape, torch.float16, "cpu")


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # on a GPU it is infinite without a warning
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("shape", [(1, 8), (3, 2 * 1030), (0, 8)])
def test_gates_equal_their_references(shape: tuple[int, int], activation: Activation) -> None:
    """Less and more than a block, and nothing."""
    compare_gate(shape, activation, torch.float32, "cpu")


@pytest.mark.parametrize("keep_keys", [False, True])
@pytest.mark.parametrize("has_factors", [False, True])
@pytest.mark.parametrize("case", ROPE_CASES, ids=str)
def test_rope_and_cache_write_equal_their_reference(case: RopeCase, keep_keys: bool, has_factors: bool) -> None:
    """Whole and partial rotation, with and without norms and factors, all page sizes."""
    compare_rope_cache(case, torch.float32, "cpu", keep_keys=keep_keys, has_factors=has_factors)


def test_a_float8_cache_holds_scaled_keys_and_values() -> None:
    """Values past the largest float8 saturate."""
    compare_rope_cache(ROPE_CASES[3], torch.float32, "cpu", cache_dtype=torch.float8_e4m3fn, whole_numbers=True)
