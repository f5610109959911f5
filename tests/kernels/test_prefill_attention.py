"""The prefill kernel in Triton's interpreter, and its plan."""

from __future__ import annotations

import pytest
import torch

from headrace.kernels.prefill_attention import Tiling, plan_tiles
from tests.kernels.compare_prefill import CASES, Case, compare_packed, compare_paged

TILINGS = [Tiling(16, 16, 4, 1), Tiling(32, 16, 4, 1, descriptors=True)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_paged_attention_equals_attention_written_out(case: Case) -> None:
    """All head, group and page sizes, with and without prefixes."""
    compare_paged(case, TILINGS[0], torch.float32, "cpu")


@pytest.mark.parametrize("tiling", TILINGS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_packed_attention_equals_attention_written_out(case: Case, tiling: Tiling) -> None:
    """Pointers and descriptors."""
    compare_packed(case, tiling, torch.float32, "cpu")


def test_a_float8_cache_is_scaled() -> None:
    """K's scale goes into the softmax, V's into the sum."""
    compare_paged(CASES[2], TILINGS[0], torch.float32, "cpu", cache_dtype=torch.float8_e4m3fn)


def test_tiles_with_long_contexts_come_first_and_cover_each_query_once() -> None:
    """Groups that do not divide the tile leave rows idle, never tokens out."""
    table = torch.zeros(4, 1, dtype=torch.int64)
    plan = plan_tiles(table, [40, 0, 1, 33], [40, 9, 100, 33], 3, Tiling(32, 16, 4, 1))
    contexts = [first + {0: 0, 2: 99, 3: 0}[request] for request, first in plan.tiles.tolist()]
    assert contexts == sorted(contexts, reverse=True)
    assert sorted(plan.tiles.tolist()) == [[0, q] for q in range(0, 40, 10)] + [[2, 0]] + [
        [3, q] for q in range(0, 33, 10)
    ]
    assert plan.query_starts.tolist() == [0, 40, 40, 41, 74]
    assert plan.has_prefix
