"""The small kernels on the chip."""

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
from tests.kernels.comparisons import compare_mask_logits

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
LONG = [RopeCase(32, 8, 128, 128, 16, 1500), RopeCase(9, 3, 64, 64, 16, 700, normed=True)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 8), (5, 123), (300, 4096), (0, 16), (7, 9, 128), (3, 16384)])
def test_norms_equal_their_references(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Weights as wide as x, and wider."""
    compare_norms(shape, dtype, dtype, "cuda")
    compare_norms(shape, dtype, torch.float32, "cuda")
    if len(shape) == 2:
        compare_factors(shape, dtype, "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("shape", [(1, 8), (300, 2 * 14336), (0, 8)])
def test_gates_equal_their_references(shape: tuple[int, int], activation: Activation, dtype: torch.dtype) -> None:
    """Less and more than a block, and nothing."""
    compare_gate(shape, activation, dtype, "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [97, 49152, 128256])
def test_masked_logits_equal_their_reference(vocabulary: int, dtype: torch.dtype) -> None:
    """Some rows of a batch, in any order."""
    compare_mask_logits("cuda", [7, 0, 3, 31, 8], 32, vocabulary, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ROPE_CASES + LONG, ids=str)
def test_rope_and_cache_write_equal_their_reference(case: RopeCase, dtype: torch.dtype) -> None:
    """With a cache of the same dtype, and one of float8."""
    compare_rope_cache(case, dtype, "cuda")
    compare_rope_cache(case, dtype, "cuda", has_factors=True)
    compare_rope_cache(case, dtype, "cuda", cache_dtype=torch.float8_e4m3fn)
