"""How many prompt tokens may be computed between two decode steps, or with one.

The controller wants each gap between the ends of two steps to stay within a target:

    gap = base + tokens * seconds_a_token <= target

`base` is what a gap takes without a chunk; `seconds_a_token` is what the gap beside the last chunk took more than that,
divided by the chunk's tokens.
"""

from __future__ import annotations

BASE_WEIGHT = 0.2
"""Of a new measurement in `base`."""
RISE, FALL = 2.0, 0.8
"""Bounds on how much one chunk changes `seconds_a_token`: one that took too long counts more than one that did not."""
SHORTEST_EXCESS = 1e-5
"""Seconds: what a chunk costs at least."""


class ChunkSize:
    """Not thread-safe."""

    def __init__(self, target_seconds: float, fewest: int, most: int) -> None:
        """A chunk has `fewest` tokens or more, for prompts have to go on, and at most `most`."""
        self.fewest = min(fewest, most)
        self.most = most
        self._target_seconds = target_seconds
        self._base = 0.0
        self._seconds_a_token: float | None = None

    @property
    def tokens(self) -> int:
        """How many a chunk beside decode steps may have."""
        if self._seconds_a_token is None:
            return self.fewest
        room = (self._target_seconds - self._base) / self._seconds_a_token
        return int(min(max(room, self.fewest), self.most))

    def saw_step(self, gap: float) -> None:
        """A gap of so many seconds without a chunk."""
        self._base += (BASE_WEIGHT if self._base else 1.0) * (gap - self._base)

    def saw_chunk(self, tokens: int, gap: float) -> None:
        """The worst gap beside a chunk. A small one tells little: most of what it takes does not depend on its size."""
        if tokens < self.tokens / 2:
            return
        measured = max(gap - self._base, SHORTEST_EXCESS) / tokens
        before = self._seconds_a_token or measured
        self._seconds_a_token = min(max(measured, FALL * before), RISE * before)

    def saw_chunk_alone(self, tokens: int, seconds: float) -> None:
        """A first guess, from a chunk that no step ran beside."""
        if self._seconds_a_token is None and tokens >= self.fewest:
            self._seconds_a_token = max(seconds, SHORTEST_EXCESS) / tokens
