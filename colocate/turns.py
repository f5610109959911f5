"""Decode steps and chunks of prompts in turn: between two steps at most one chunk is begun.

For devices on which a step and a chunk are two forward passes (a CPU); elsewhere see `shared_steps`.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

from headrace.colocate.chunk_size import ChunkSize
from headrace.engine.base import LayerAnnounced
from headrace.engine.decode_batch import RunningBatch
from headrace.engine.engine import Engine, PrefillChunk, PrefillOutput

TURN_SECONDS = 1.0
"""The longest that a prompt waits for a decode step to end."""


@dataclass
class _Chunk:
    """Prompt tokens on the device, and the worst gap between decode steps meanwhile, in seconds."""

    tokens: int
    ended: float | None = None
    worst_gap: float = 0.0


class TakingTurns:
    """See `Turns` and `Alongside`."""

    depth = 1
    whole = 0
    join = None

    def __init__(
        self,
        size: ChunkSize,
        engine: Engine,
        device_thread: Executor,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._size = size
        self._engine = engine
        self._device_thread = device_thread
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._stepped = asyncio.Event()
        """A step has ended since the last turn was given."""
        self._lock = threading.Lock()
        self._running = 0
        self._last_step: float | None = None
        """When the last step ended; None where another one does not follow it at once."""
        self._chunk: _Chunk | None = None

    async def turn(self) -> None:
        """See `Turns`."""
        if self._running:
            try:
                await asyncio.wait_for(self._stepped.wait(), TURN_SECONDS)
            except TimeoutError:
                pass
        self._stepped.clear()

    def tokens(self, waiting: int, handing_over: bool) -> int:
        """See `Turns`."""
        with self._lock:
            return self._size.tokens if self._running or handing_over else self._size.most

    def start(
        self, chunks: Sequence[PrefillChunk], on_layer: LayerAnnounced | None
    ) -> asyncio.Future[list[PrefillOutput]]:
        """See `Turns`."""
        return self._loop.run_in_executor(self._device_thread, self._compute, chunks, on_layer)

    def _compute(self, chunks: Sequence[PrefillChunk], on_layer: LayerAnnounced | None) -> list[PrefillOutput]:
        started = self._clock()
        chunk = _Chunk(sum(chunk.length for chunk in chunks))
        with self._lock:
            self._learn()
            self._chunk = chunk
        try:
            return self._engine.prefill(chunks, on_layer)
        finally:
            with self._lock:
                chunk.ended = self._clock()
                self._size.saw_chunk_alone(chunk.tokens, chunk.ended - started)

    async def before_step(self, requests: int) -> None:
        """See `Alongside`."""

    def start_step(self, batch: RunningBatch[Any]) -> bool:
        """See `Alongside`."""
        return False

    def stepped(self, running: int, ended: bool) -> None:
        """See `Alongside`."""
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

    def abandoned(self) -> None:
        """See `Alongside`."""
        self.stepped(0, False)

    def _saw_gap(self, start: float, end: float) -> None:
        chunk = self._chunk
        if chunk is None or (chunk.ended is not None and chunk.ended <= start):
            self._size.saw_step(end - start)
            return
        chunk.worst_gap = max(chunk.worst_gap, end - start)
        if chunk.ended is not None:
            self._learn()

    def _learn(self) -> None:
        """The last chunk is over."""
        chunk, self._chunk = self._chunk, None
        if chunk is not None and chunk.worst_gap:
            self._size.saw_chunk(chunk.tokens, chunk.worst_gap)
