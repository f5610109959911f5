"""Rows of drafts in Triton's interpreter."""

from __future__ import annotations

import pytest

from tests.kernels.comparisons import compare_draft_rows


@pytest.mark.parametrize("lengths", [[0], [15], [3, 0, 15, 1, 1], [15] * 8, [2] * 40])
def test_rows_and_what_stands_equal_their_reference(lengths: list[int]) -> None:
    """Requests with and without drafts; some rows are nobody's."""
    rows = sum(lengths) + len(lengths)
    compare_draft_rows("cpu", lengths, rows + 5, rows)
