"""How many rows a forward pass with prompts and decode steps may have.

A GPU's products take whole waves of tiles, so time rises in steps: some sizes are measured at the start, and the
largest is taken whose pass keeps the gap between two tokens of a stream within the target. What such a gap takes more
than the pass (attention over long contexts, the host) is followed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence

from headrace.engine.engine import Engine, PrefillChunk
from headrace.messages.request import SamplingParams

SIZES = (128, 256, 384, 512, 640, 768, 896, 1024, 1280, 1536, 2048, 3072, 4096)
REPEATS = 3
EXTRA_WEIGHT = 0.1
"""Of a new measurement."""


class RowBudget:
    """Not thread-safe."""

    def __init__(self, target_seconds: float, fewest: int, most: int, seconds: Mapping[int, float]) -> None:
        """A pass has `fewest` rows or more, for prompts have to go on; `most` is for prompts alone.

        `seconds` a pass, by rows.
        """
        self.most = most
        self._target_seconds = target_seconds
        self._fewest = min(fewest, most)
        self._seconds = dict(sorted((rows, took) for rows, took in seconds.items() if rows <= most))
        self._extra = 0.0

    def tokens(self, running: int) -> int:
        """Of prompts, in a pass with so many running requests."""
        fitting = [rows for rows, took in self._seconds.items() if took + self._extra <= self._target_seconds]
        return max(max(fitting, default=0), self._fewest) - min(running, self._fewest // 2)

    def saw_pass(self, rows: int, gap: float) -> None:
        """A pass of so many rows, and the time from the end of the one before to its end."""
        took = next((took for size, took in self._seconds.items() if size >= rows), None)
        if took is not None:
            self._extra += EXTRA_WEIGHT * (max(gap - took, 0.0) - self._extra)


def measurable(engine: Engine, most: int) -> list[int]:
    """The sizes that `time_passes` can measure with this engine."""
    longest = min(most, engine.max_model_len, engine.pool.num_pages * engine.layout.page_size)
    return [size for size in SIZES if size <= longest]


def time_passes(engine: Engine, sizes: Sequence[int], pages: Sequence[int]) -> dict[int, float]:
    """Seconds of a forward pass by rows, on the device's thread; `pages` hold the largest."""
    sampling = SamplingParams(max_tokens=1, temperature=0)
    seconds = {}
    for size in sizes:
        times = []
        for _ in range(REPEATS):
            started = time.perf_counter()
            engine.prefill([PrefillChunk([0] * size, 0, size, pages, sampling)])
            times.append(time.perf_counter() - started)
        seconds[size] = min(statistics.median(times), times[-1])
    return seconds
