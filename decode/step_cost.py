"""What a decode step costs on this device, by its rows: one for each request and one for each drafted token."""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left
from collections.abc import Mapping
from typing import Literal

import numpy as np

MAX_ROWS = 256
"""Drafts fill a step up to so many rows: their logits take memory, and further rows never paid."""
FIRST_STRIDE, STRIDE = 0.3, 0.01
"""A step that took more or less time than expected moves the estimates for the points beside its rows towards what it
took, by so much at most, the first of its kind more than later ones: so they end near the median, which other work on
the machine does not disturb. Points beside which no step has been yet go along. In logarithms of seconds."""
FADING = 0.001
"""A step moves all estimates by so much of what sets them apart from the average: what once was slow is tried again."""
AVERAGING = 0.05
"""Weight of a step in that average."""
Kind = Literal["plain", "verifying", "ahead"]
"""Of a step: without drafts, with drafts that the host knows, with drafts that the device knows."""
REFRESH_ROWS = 128
"""After steps of so many rows together they are learned from, and `plain` and the others made anew: so that this takes
as little time a request of one as of many."""


class StepCost:
    """What steps without and with drafts take, which do more than compute further rows. On a GPU those without run
    ahead, and so do those whose drafts a head has guessed there.

    Contexts that grow, other sampling parameters and a prefill worker that takes half of the cores change what a step
    costs, so the measured points follow what steps take.
    """

    def __init__(
        self,
        measured: Mapping[int, float],
        max_num_seqs: int,
        verifying: Mapping[int, float] | None = None,
        ahead: Mapping[int, float] | None = None,
    ) -> None:
        """`measured`: seconds by rows, of 1 row among them; `verifying`: those of steps with drafts, where they are
        others; `ahead`: of those with drafts that run ahead.
        """
        assert min(measured) == 1, "a step of one row was not measured"
        most = max(MAX_ROWS, max_num_seqs)
        self._curves: dict[Kind, _Curve] = {
            "plain": _Curve(measured, most),
            "verifying": _Curve(verifying or measured, most),
            "ahead": _Curve(ahead or verifying or measured, most),
        }
        self._mean_drift = 0.0
        self._observed: list[tuple[int, float, Kind]] = []
        self._rows_observed = 0
        self._refresh()

    def observe(self, rows: int, seconds: float, kind: Kind) -> None:
        """A step of so many rows took so long."""
        self._observed.append((rows, seconds, kind))
        self._rows_observed += rows
        if self._rows_observed >= REFRESH_ROWS:
            self._learn()

    def _learn(self) -> None:
        for rows, seconds, kind in self._observed:
            self._mean_drift += AVERAGING * (self._curves[kind].observe(rows, seconds) - self._mean_drift)
        fading = FADING * len(self._observed)
        for curve in self._curves.values():
            curve.drifts[:] = [drift + fading * (self._mean_drift - drift) for drift in curve.drifts]
        self._observed, self._rows_observed = [], 0
        self._refresh()

    def _refresh(self) -> None:
        self.plain = self._curves["plain"].seconds()
        """Of steps without drafts, by rows: 0 to the most that a step may have."""
        self.verifying = self._curves["verifying"].seconds()
        """Of steps with drafts that the host knows."""
        self.ahead = self._curves["ahead"].seconds()
        """Of steps with drafts that run ahead, without what a head takes for each guess."""


class _Curve:
    """Straight lines between numbers of rows that were measured at the start, and the last one's slope beyond."""

    def __init__(self, measured: Mapping[int, float], max_rows: int) -> None:
        if len(measured) == 1:  # a GPU's worker of one request: no further rows without drafts
            measured = {rows + more: seconds for rows, seconds in measured.items() for more in (0, 1)}
        self._points = sorted(measured)
        seconds = [measured[rows] for rows in self._points]
        # More rows never take less time: where they seem to, something else took the time of the fewer.
        self._measured = list(itertools.accumulate(reversed(seconds), min))[::-1]
        self.drifts = [0.0] * len(self._points)
        """By point: logarithm of what a step takes now over what it took at the start."""
        self._seen = [0] * len(self._points)
        self._rows = np.arange(1, max_rows + 1)
        self._beyond = np.maximum(self._rows - self._points[-1], 0)

    def observe(self, rows: int, seconds: float) -> float:
        """A step of so many rows took so long; returns the drift there after this."""
        points, drifts, seen = self._points, self.drifts, self._seen
        right = min(bisect_left(points, rows), len(points) - 1) or 1
        left = right - 1
        share = (rows - points[left]) / (points[right] - points[left])
        low = self._measured[left] * math.exp(drifts[left])
        high = self._measured[right] * math.exp(drifts[right])
        expected = low + (high - low) * share if high > low and share > 0.0 else low
        inner = 0.0 if share < 0.0 else share if share < 1.0 else 1.0
        nearest = left if share < 0.5 else right
        seen[nearest] += 1
        most = max(FIRST_STRIDE / seen[nearest], STRIDE)
        stride = min(max(math.log(max(seconds, 1e-9) / expected), -most), most)
        drifts[left] += stride * min(2.0 - 2.0 * inner, 1.0)
        drifts[right] += stride * min(2.0 * inner, 1.0)
        if 0 in seen:
            for point, steps in enumerate(seen):
                if steps == 0 and point not in (left, right):
                    drifts[point] += stride
        return drifts[left] * (1.0 - inner) + drifts[right] * inner

    def seconds(self) -> list[float]:
        """By rows, from 0 on."""
        now = (seconds * math.exp(drift) for seconds, drift in zip(self._measured, self.drifts, strict=True))
        points, costs = self._points, list(itertools.accumulate(now, max))
        slope = (costs[-1] - costs[-2]) / (points[-1] - points[-2])
        lines = np.interp(self._rows, points, costs) + slope * self._beyond
        return [0.0, *lines.tolist()]
