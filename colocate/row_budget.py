"""How many rows a forward pass with prompts and decode steps may have.

Captured passes take what their size takes, however few rows are filled. All sizes are measured at the start, and the
largest is taken that keeps the gap between two tokens of a stream within the target; of those with which what waits
needs as many passes, the smallest. What they take more in the end is followed: attention over long contexts and the
host are the same for all sizes, while a chip that grows hot slows down the large ones. Gaps scatter around what is
expected, on some hosts by more than on others: so passes are kept as far below the target as it takes for one gap in
some hundred to be over it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence

from headrace.engine.engine import Engine, PrefillChunk
from headrace.messages.request import SamplingParams

REPEATS = 3
STRIDE = 0.1
"""Of what a measurement differs from what was expected: half of it is taken to be the size's own."""
FORGOTTEN = 0.005
"""Of that, with each measurement of whatever size, so that all sizes come into question again."""
FARTHEST = 0.002
"""Seconds that a measurement is taken to differ at most: one that took long for some other reason counts little."""
OVER = 0.005
"""Share of the gaps that may be over the target."""
MARGINS = (0.0005, 0.003)
"""Seconds below the target, at least and at most."""
MARGIN, WIDER = 0.0011, 0.0002
"""At first, and more of it with a gap over the target; with each other gap less of it, such that `OVER` balances."""


class RowBudget:
    """Not thread-safe."""

    def __init__(self, target_seconds: float, fewest: int, most: int, seconds: Mapping[int, float]) -> None:
        """Hardly a gap is to be over the target. Half of `fewest` are prompts' in any case, for they have to go on;
        `most` is for prompts alone.

        `seconds` a pass, by captured sizes.
        """
        self.most = most
        self._margin = MARGIN
        self._target_seconds = target_seconds
        self._fewest = min(fewest, most)
        self._seconds = dict(sorted((rows, took) for rows, took in seconds.items() if rows <= most))
        self._extra = 0.0
        self._own_extra = dict.fromkeys(self._seconds, 0.0)
        self._step_seconds = 0.0

    def tokens(self, running: int, waiting: int) -> int:
        """Of prompts, in a pass with so many running requests; `waiting` are to be computed in all."""
        most_seconds = self._target_seconds - self._margin
        fitting = [size for size in self._seconds if self.expected(size, shared=True) <= most_seconds]
        room = max(max(fitting, default=0) - running, self._fewest // 2)
        passes = max(-(-waiting // room), 1)
        size = next((size for size in fitting if size >= -(-waiting // passes) + running), 0)
        return min(size - running, room) if size else room

    def expected(self, rows: int, shared: bool) -> float:
        """Seconds that such a step is expected to take, with prompts or without; 0 where that is not known."""
        if not shared:
            return self._step_seconds
        size = next((size for size in self._seconds if size >= rows), None)
        return 0.0 if size is None else self._seconds[size] + self._extra + self._own_extra[size]

    def scattered(self, gap: float) -> None:
        """Seconds between the ends of any two steps. What is far too long is not for want of a margin."""
        over = gap - self._target_seconds
        if over <= FARTHEST:
            margin = self._margin + WIDER * ((over > 0) - OVER)
            self._margin = min(max(margin, MARGINS[0]), MARGINS[1])

    def saw(self, rows: int, shared: bool, gap: float) -> None:
        """Seconds from the end of the step before to the end of this one, which began in time."""
        expected = self.expected(rows, shared)
        differs = STRIDE * min(max(gap - expected, -FARTHEST), FARTHEST)
        if not shared:
            self._step_seconds = self._step_seconds + differs if self._step_seconds else gap
        elif expected:
            self._extra = max(self._extra + differs / 2, 0.0)
            self._own_extra = {size: (1 - FORGOTTEN) * extra for size, extra in self._own_extra.items()}
            size = next(size for size in self._seconds if size >= rows)
            self._own_extra[size] = max(self._own_extra[size] + differs / 2, 0.0)


def measurable(engine: Engine, sizes: Sequence[int], most: int) -> list[int]:
    """Those that `time_passes` can measure with this engine."""
    longest = min(most, engine.max_model_len, engine.pool.num_pages * engine.layout.page_size)
    return [size for size in sizes if size <= longest]


def time_passes(engine: Engine, sizes: Sequence[int], pages: Sequence[int]) -> dict[int, float]:
    """Seconds of a forward pass by rows, on the device's thread; `pages` hold the largest. Captures what was not.

    The largest goes first, whose memory the others then share.
    """
    sampling = SamplingParams(max_tokens=1, temperature=0)
    seconds = {}
    for size in sorted(sizes, reverse=True):
        times = []
        for _ in range(REPEATS):
            started = time.perf_counter()
            engine.start_shared([PrefillChunk([0] * size, 0, size, pages, sampling)], None, 0).outputs()
            times.append(time.perf_counter() - started)
        seconds[size] = min(statistics.median(times), times[-1])
    return seconds
