"""Changes of a batch's rows in Triton's interpreter."""

from __future__ import annotations

import pytest

from tests.kernels.comparisons import compare_row_changes


@pytest.mark.parametrize("moved", [0, 1, 5])
@pytest.mark.parametrize("cells", [0, 1, 700])
def test_changed_rows_and_pages_equal_their_reference(moved: int, cells: int) -> None:
    """Rows that take over the state of others, in circles too, rows that join, and nothing at all."""
    compare_row_changes("cpu", moved, cells)
