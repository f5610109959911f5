"""The prefill kernel on the chip, with the tilings that it uses there."""

from __future__ import annotations

import pytest
import torch

from headrace.kernels.prefill_attention import FEW_TOKENS, choose_tiling
from tests.kernels.compare_prefill import CASES, Case, compare_packed, compare_paged

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

LONG = [
    Case(128, 4, 16, ((700, 700), (1, 1), (130, 130), (2049, 2049))),
    Case(128, 4, 16, ((700, 700), (1, 1), (2, 3000), (130, 400), (513, 513))),
    Case(64, 3, 32, ((700, 700), (129, 900), (0, 50), (257, 257))),
    Case(256, 8, 64, ((300, 300), (64, 640))),
    Case(80, 1, 16, ((300, 300), (64, 640))),
]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(autouse=True)
def _reproducible() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("tokens", [1, FEW_TOKENS])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES + LONG, ids=str)
def test_paged_attention_equals_attention_written_out(case: Case, dtype: torch.dtype, tokens: int) -> None:
    """Contexts of less and more than a block, prefixes, several tiles a request."""
    compare_paged(case, choose_tiling(case.head_dim, dtype, has_prefix=True, tokens=tokens), dtype, "cuda")


@pytest.mark.parametrize("tokens", [1, FEW_TOKENS])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES + LONG, ids=str)
def test_packed_attention_equals_attention_written_out(case: Case, dtype: torch.dtype, tokens: int) -> None:
    """The same lengths without prefixes."""
    compare_packed(case, choose_tiling(case.head_dim, dtype, has_prefix=False, tokens=tokens), dtype, "cuda")


@pytest.mark.parametrize("case", LONG, ids=str)
def test_a_float8_cache_is_scaled(case: Case) -> None:
    """K's scale goes into the softmax, V's into the sum."""
    tiling = choose_tiling(case.head_dim, torch.bfloat16, has_prefix=True, tokens=FEW_TOKENS)
    compare_paged(case, tiling, torch.bfloat16, "cuda", cache_dtype=torch.float8_e4m3fn)
