"""What a decode step costs on this device, by its rows: one for each request and one for each drafted token."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

MAX_ROWS = 256
"""Drafts fill a step up to so many rows: their logits take memory, and further rows never paid."""


class StepCost:
    """Straight lines between measured numbers of rows, and the last one's slope beyond."""

    def __init__(self, measured: Mapping[int, float], max_num_seqs: int) -> None:
        """`measured`: seconds by rows, of 1 row and of at least one other number."""
        assert len(measured) > 1, "one point makes no line"
        assert 1 in measured, "a step of one row was not measured"
        rows = sorted(measured)
        # More rows never take less time: where they seem to, something else took the time of the fewer.
        seconds = [measured[count] for count in rows]
        lower = list(itertools.accumulate(reversed(seconds), min))[::-1]
        self.seconds = [0.0]
        """By rows, 0 to the most that a step may have."""
        for count in range(1, max(MAX_ROWS, max_num_seqs) + 1):
            right = next((i for i, there in enumerate(rows) if there >= count), len(rows) - 1) or 1
            slope = (lower[right] - lower[right - 1]) / (rows[right] - rows[right - 1])
            self.seconds.append(lower[right - 1] + slope * (count - rows[right - 1]))
