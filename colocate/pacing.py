"""How many prompt tokens may be computed between two decode steps.

Decode steps follow one another on their own; between two of them at most one chunk of prompts is begun. The controller
wants each gap between the ends of two steps to stay within a target:

    gap = base + tokens * seconds_a_token <= target

`base` is what a gap takes without a chunk; `seconds_a_token` is what the worst gap beside the last chunk took more than
that, divided by the chunk's tokens.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

TURN_SECONDS = 1.0
"""The longest that a prompt waits for a decode step to end."""
BASE_WEIGHT = 0.2
"""Of a new measurement in `base`."""
RISE, FALL = 2.0, 0.8
"""Bounds on how much one chunk changes `seconds_a_token`: one that took too long counts more than one that did not."""
SHORTEST_EXCESS = 1e-5
"""Seconds: what a chunk costs at least."""


@dataclass
class _Chunk:
    """Prompt tokens on the device, and the worst gap between decode steps meanwhile, in seconds."""

    tokens: int
    started: float
    ended: float | None = None
    worst_gap: float = 0.0


class Pacing:
    """Thread-safe, but for `turn`, which belongs on the event loop that it was made on."""

    def __init__(
        self,
        target_seconds: float,
        fewest: int,
        most: int,
        finish: Callable[[], None],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """A chunk has `fewest` tokens or more, for prompts have to go on, and at most `most`.

        `finish` waits for the device work of the thread that computes prompts.
        """
        self.target_seconds = target_seconds
        self._fewest = min(fewest, most)
        self._most = most
        self._finish = finish
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._stepped = asyncio.Event()
        """A step has ended since the last turn was given."""
        self._lock = threading.Lock()
        self._running = 0
        self._last_step: float | None = None
        """When the last step ended; None where another one does not follow it at once."""
        self._chunk: _Chunk | None = None
        self._base = 0.0
        self._seconds_a_token: float | None = None

    @property
    def tokens(self) -> int:
        """How many a chunk beside decode steps may have."""
        if self._seconds_a_token is None:
            return self._fewest
        room = (self.target_seconds - self._base) / self._seconds_a_token
        return int(min(max(room, self._fewest), self._most))

    async def turn(self, handing_over: bool) -> int:
        """Wait until a chunk may begin; returns how many tokens it may have.

        `handing_over`: requests are about to be decoded.
        """
        if self._running:
            try:
                await asyncio.wait_for(self._stepped.wait(), TURN_SECONDS)
            except TimeoutError:
                pass
        self._stepped.clear()
        return self.tokens if self._running or handing_over else self._most

    @contextmanager
    def computing(self, tokens: int) -> Iterator[None]:
        """Around a chunk, on the thread that computes it; ends when the device has."""
        chunk = _Chunk(tokens, self._clock())
        with self._lock:
            self._learn()
            self._chunk = chunk
        try:
            yield
        finally:
            self._finish()
            with self._lock:
                chunk.ended = self._clock()
                if self._seconds_a_token is None and tokens >= self._fewest:
                    self._seconds_a_token = max(chunk.ended - chunk.started, SHORTEST_EXCESS) / tokens

    def stepped(self, running: int, ended: bool) -> None:
        """The batch has `running` requests; a decode step has just `ended`, or not."""
        now = self._clock()
        with self._lock:
            self._running = running
            if ended and self._last_step is not None:
                self._saw_gap(self._last_step, now)
            if ended:
                self._last_step = now
            if not running:
                self._last_step = None
                self._chunk = None
        if ended or not running:
            self._loop.call_soon_threadsafe(self._stepped.set)

    def _saw_gap(self, start: float, end: float) -> None:
        chunk = self._chunk
        if chunk is None or (chunk.ended is not None and chunk.ended <= start):
            weight = BASE_WEIGHT if self._base else 1.0
            self._base += weight * (end - start - self._base)
            return
        chunk.worst_gap = max(chunk.worst_gap, end - start)
        if chunk.ended is not None:
            self._learn()

    def _learn(self) -> None:
        """The last chunk is over. A small one tells little: most of what it takes does not depend on its size."""
        chunk, self._chunk = self._chunk, None
        if chunk is None or not chunk.worst_gap or chunk.tokens < self.tokens / 2:
            return
        measured = max(chunk.worst_gap - self._base, SHORTEST_EXCESS) / chunk.tokens
        before = self._seconds_a_token or measured
        self._seconds_a_token = min(max(measured, FALL * before), RISE * before)
