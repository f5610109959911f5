"""What a decode step costs on this device, by its rows: one for each request and one for each drafted token."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

MAX_ROWS = 256
"""Drafts fill a step up to so many rows: their logits take memory, and further rows never paid."""
STRIDE = 0.01
"""A step that took more or less time than expected moves the estimate for its rows by so much: it follows the median,
which other work on the machine does not disturb."""
FADING = 0.002
"""And all estimates by so much of what sets them apart from the average, so that what once was slow is tried again."""
REFRESH_STEPS = 8
"""`seconds` is made anew after so many steps."""


class StepCost:
    """Straight lines between numbers of rows that were measured at the start, and the last one's slope beyond.

    Contexts that grow, other sampling parameters and a prefill worker that takes half of the cores change what a step
    costs, so the points follow what steps take.
    """

    def __init__(self, measured: Mapping[int, float], max_num_seqs: int) -> None:
        """`measured`: seconds by rows, of 1 row and of at least one other number."""
        assert len(measured) > 1, "one point makes no line"
        assert min(measured) == 1, "a step of one row was not measured"
        self._points = np.array(sorted(measured), np.int64)
        seconds = np.array([measured[rows] for rows in self._points.tolist()])
        # More rows never take less time: where they seem to, something else took the time of the fewer.
        self._measured = np.minimum.accumulate(seconds[::-1])[::-1]
        self._drift = np.zeros(len(self._points))
        """Logarithm of what a step takes now over what it took at the start, by point."""
        self._mean_drift = 0.0
        self._rows = np.arange(1, max(MAX_ROWS, max_num_seqs) + 1)
        self._observed = 0
        self._refresh()

    def observe(self, rows: int, seconds: float) -> None:
        """A step of so many rows took so long."""
        stride = STRIDE if seconds > self.seconds[rows] else -STRIDE
        right = min(int(np.searchsorted(self._points, rows)), len(self._points) - 1)
        left = max(right - 1, 0)
        share = (rows - self._points[left]) / max(self._points[right] - self._points[left], 1)
        self._drift += FADING * (self._mean_drift - self._drift)
        self._drift[right] += stride * min(share, 1.0)
        self._drift[left] += stride * max(1.0 - share, 0.0)
        self._mean_drift += stride
        self._observed += 1
        if self._observed % REFRESH_STEPS == 0:
            self._refresh()

    def _refresh(self) -> None:
        points, costs = self._points, np.maximum.accumulate(self._measured * np.exp(self._drift))
        slope = (costs[-1] - costs[-2]) / (points[-1] - points[-2])
        lines = np.interp(self._rows, points, costs) + slope * np.maximum(self._rows - points[-1], 0)
        self.seconds: list[float] = [0.0, *lines.tolist()]
        """By rows, 0 to the most that a step may have."""
