"""What a decode step costs on this device, by its rows: one for each request and one for each drafted token."""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import numpy as np

MAX_ROWS = 256
"""Drafts fill a step up to so many rows: their logits take memory, and further rows never paid."""
LEVEL_STRIDE = 0.02
"""A step moves what all steps are taken to cost by what it differs, but at most so much: this follows what the machine
does besides, within some fifty steps. In logarithms of seconds, as all that follows."""
FIRST_STRIDE, STRIDE = 1.0, 0.01
"""It moves the points beside its rows, too, the first of its kind by more than later ones. Such small strides end near
the median, which other work on the machine does not disturb."""
EVIDENCE, FADING = 32.0, 0.998
"""A point counts what it was moved by as so many steps at most, and as less with each step elsewhere: what once was
slow is tried again."""
NEIGHBOUR = 0.1
"""What a step shows counts so much at the next point, and the square of it at the one behind, beside `DOUBT` for what
was measured at the start."""
DOUBT = 2.0
"""What a point is taken to cost without steps of its own, from the start's measurement and its neighbours, counts so
much beside the square of its own evidence."""
Kind = Literal["plain", "verifying", "ahead"]
"""Of a step: without drafts, with drafts that the host knows, with drafts that the device knows."""
MOVED = 0.01
"""A table of seconds by rows is made anew when a point has moved by so much of itself."""
REFRESH_STEPS = 16
"""After so many steps together they are learned from, and `plain` and the others made anew."""
PLAIN_AFTER, MOST_BETWEEN_PLAIN = 16, 256
"""After so many steps with drafts come some without, and then after twice as many each time, up to a bound."""


class PlainSteps:
    """Says when a step is to have no drafts, if only so that what such steps take is measured now and then, too."""

    def __init__(self, in_a_row: int) -> None:
        self._in_a_row = in_a_row
        self._between = self._until = PLAIN_AFTER
        self._left = 0

    @property
    def is_next(self) -> bool:
        """Whether the next step is one."""
        return self._until <= 0

    def begin(self) -> bool:
        """A step begins; returns whether it is one."""
        if self._until > 0:
            return False
        self._left = (self._left or self._in_a_row) - 1
        if self._left == 0:
            self._until = self._between = min(2 * self._between, MOST_BETWEEN_PLAIN)
        return True

    def drafted(self) -> None:
        """A step had drafts."""
        self._until -= 1


class StepCost:
    """What steps without and with drafts take, which do more than compute further rows. On a GPU those without run
    ahead, and so do those whose drafts a head has guessed there.

    Contexts that grow, other sampling parameters and a prefill worker that takes half of the cores change what a step
    costs, and what was measured at the start may have been disturbed. So a step is taken to cost what was measured,
    times a factor that all share and follows fast, times one of its kind and rows that follows slowly.
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
        plain, with_drafts = _Curve(measured, most), _Curve(verifying or measured, most)
        self._curves: dict[Kind, _Curve] = {
            "plain": plain,
            "verifying": with_drafts,
            "ahead": _Curve(ahead, most) if ahead else with_drafts,
        }
        self._level = 0.0
        self._observed: list[tuple[int, float, Kind]] = []
        self._refresh()

    def observe(self, rows: int, seconds: float, kind: Kind) -> None:
        """A step of so many rows took so long."""
        self._observed.append((rows, seconds, kind))
        if len(self._observed) >= REFRESH_STEPS:
            self._learn()

    def _learn(self) -> None:
        for rows, seconds, kind in self._observed:
            more = self._curves[kind].observe(rows, seconds * math.exp(-self._level))
            self._level += min(max(more, -LEVEL_STRIDE), LEVEL_STRIDE)
        for curve in {*self._curves.values()}:
            curve.fade(len(self._observed))
        self._observed = []
        self._refresh()

    def _refresh(self) -> None:
        level, curves = math.exp(self._level), self._curves
        self.plain = curves["plain"].seconds(level)
        """Of steps without drafts, by rows: 0 to the most that a step may have."""
        self.verifying = curves["verifying"].seconds(level)
        """Of steps with drafts that the host knows."""
        is_own = curves["ahead"] is not curves["verifying"]
        self.ahead = curves["ahead"].seconds(level) if is_own else self.verifying
        """Of steps with drafts that run ahead, without what a head takes for each guess."""


class _Curve:
    """Straight lines between numbers of rows that were measured at the start, and twice as many each time beyond."""

    def __init__(self, measured: Mapping[int, float], max_rows: int) -> None:
        if len(measured) == 1:  # a GPU's worker of one request: no further rows without drafts
            measured = {rows + more: seconds for rows, seconds in measured.items() for more in (0, 1)}
        points = sorted(measured)
        # More rows never take less time: where they seem to, something else took the time of the fewer.
        seconds = list(itertools.accumulate((measured[rows] for rows in reversed(points)), min))[::-1]
        # The last two alone may have been disturbed, and what seems to be free is tried.
        slope = max((seconds[-1] - seconds[at]) / (points[-1] - points[at]) for at in (0, -2))
        while points[-1] < max_rows:
            seconds.append(seconds[-1] + slope * points[-1])
            points.append(2 * points[-1])
        self._points, self._measured = points, seconds
        self._drifts = [0.0] * len(points)
        """By point: logarithm of what a step takes now over what it took at the start, but for the level."""
        self._evidence = [0.0] * len(points)
        """By point, in steps."""
        self._rows = np.arange(1, max_rows + 1)
        self._now = [0.0] * len(points)
        """By point: what `_seconds` was made of."""
        self._seconds: list[float] = []

    def observe(self, rows: int, seconds: float) -> float:
        """A step of so many rows took so long, but for the level; returns how much more that is than expected."""
        points, drifts, evidence = self._points, self._drifts, self._evidence
        right = min(max(bisect_left(points, rows), 1), len(points) - 1)
        left = right - 1
        inner = min(max((rows - points[left]) / (points[right] - points[left]), 0.0), 1.0)
        low, high = self._measured[left] * math.exp(drifts[left]), self._measured[right] * math.exp(drifts[right])
        more = math.log(max(seconds, 1e-9) / (low + (high - low) * inner))
        for at, share in ((left, 1.0 - inner), (right, inner)):
            evidence[at] = min(evidence[at] + share, EVIDENCE)
            most = max(FIRST_STRIDE / max(evidence[at], 1.0), STRIDE)
            drifts[at] += min(max(more, -most), most) * share
        return more

    def fade(self, steps: int) -> None:
        """So many steps have ended, of this kind or another."""
        self._evidence = [evidence * FADING**steps for evidence in self._evidence]

    def seconds(self, level: float) -> list[float]:
        """By rows, from 0 on."""
        own = [evidence * drift for evidence, drift in zip(self._evidence, self._drifts, strict=True)]
        of_others = zip(_spread(own), _spread(self._evidence), strict=True)
        others = [drift / (evidence + DOUBT) for drift, evidence in of_others]
        now = [
            measured * math.exp((evidence * weighted + DOUBT * other) / (evidence * evidence + DOUBT)) * level
            for measured, evidence, weighted, other in zip(self._measured, self._evidence, own, others, strict=True)
        ]
        if any(abs(new - old) > MOVED * new for new, old in zip(now, self._now, strict=True)):
            rising = _rising(now, [evidence + 0.1 for evidence in self._evidence])
            self._now, self._seconds = now, [0.0, *np.interp(self._rows, self._points, rising).tolist()]
        return self._seconds


def _spread(values: Sequence[float]) -> list[float]:
    """What each point's neighbours have, the nearer ones more of it."""

    def before(values: Iterable[float]) -> list[float]:
        return [*itertools.accumulate(values, lambda found, value: NEIGHBOUR * (found + value), initial=0.0)][:-1]

    return [a + b for a, b in zip(before(values), reversed(before(reversed(values))), strict=True)]


def _rising(values: Sequence[float], weights: Sequence[float]) -> list[float]:
    """Neighbours that fall replaced by their mean, so that values never do (isotonic regression)."""
    blocks: list[tuple[float, float, int]] = []
    for value, weight in zip(values, weights, strict=True):
        count = 1
        while blocks and blocks[-1][0] > value:
            before, own, more = blocks.pop()
            value = (before * own + value * weight) / (own + weight)
            weight, count = weight + own, count + more
        blocks.append((value, weight, count))
    return [value for value, _, count in blocks for _ in range(count)]
