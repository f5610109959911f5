"""Chunks of prompts in the same forward pass as decode steps, which so read the weights once for both.

A chunk waits in one place for the next step to take it along; where no request is decoded, it is computed alone.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from headrace.colocate.row_budget import RowBudget
from headrace.engine.base import LayerAnnounced
from headrace.engine.decode_batch import RunningBatch
from headrace.engine.engine import Engine, PrefillChunk, PrefillOutput, StartedPrefill
from headrace.engine.graph_batch import GraphBatch


@dataclass(frozen=True)
class _Prompts:
    """Chunks, and where their outputs are awaited."""

    chunks: Sequence[PrefillChunk]
    on_layer: LayerAnnounced | None
    outputs: asyncio.Future[list[PrefillOutput]]

    def resolve(self, outputs: list[PrefillOutput]) -> None:
        """On the device's thread."""
        self.outputs.get_loop().call_soon_threadsafe(self._resolve, outputs)

    def reject(self, error: Exception) -> None:
        """On any thread."""
        self.outputs.get_loop().call_soon_threadsafe(self._reject, error)

    def _resolve(self, outputs: list[PrefillOutput]) -> None:
        if not self.outputs.done():
            self.outputs.set_result(outputs)

    def _reject(self, error: Exception) -> None:
        if not self.outputs.done():
            self.outputs.set_exception(error)


@dataclass(frozen=True)
class _Step:
    """A step in flight and the prompts in it, if any."""

    running: int
    prompts: _Prompts | None = None
    started: StartedPrefill | None = None


class SharedSteps:
    """See `Turns` and `Alongside`, for an engine with a graph decoder.

    At most three chunks are under way: two in steps in flight, one that waits for the next.
    """

    depth = 3

    def __init__(self, budget: RowBudget, engine: Engine, device_thread: ThreadPoolExecutor) -> None:
        self._budget = budget
        self._engine = engine
        self._device_thread = device_thread
        self._loop = asyncio.get_running_loop()
        self._taken = asyncio.Event()
        self._lock = threading.Lock()
        self._waiting: _Prompts | None = None
        self._running = 0
        self._steps: deque[_Step] = deque()
        """On the device's thread."""
        self._last_step: float | None = None

    async def turn(self, handing_over: bool) -> int:
        """See `Turns`."""
        while self._waiting is not None:
            self._taken.clear()
            await self._taken.wait()
        if self._running or handing_over:
            return self._budget.tokens(self._running)
        return self._budget.most

    def start(
        self, chunks: Sequence[PrefillChunk], on_layer: LayerAnnounced | None
    ) -> asyncio.Future[list[PrefillOutput]]:
        """See `Turns`."""
        prompts = _Prompts(chunks, on_layer, self._loop.create_future())
        with self._lock:
            assert self._waiting is None, "no turn was given"
            self._waiting = prompts
            nobody_takes_it = not self._running
        if nobody_takes_it:
            self._device_thread.submit(self._compute_alone)
        return prompts.outputs

    def start_step(self, batch: RunningBatch[Any]) -> bool:
        """See `Alongside`."""
        assert isinstance(batch, GraphBatch)
        prompts = self._take()
        if prompts is None:
            self._steps.append(_Step(len(batch)))
            return False
        try:
            started = batch.start_with_prompts(prompts.chunks, prompts.on_layer)
        except Exception as error:
            prompts.reject(error)
            raise
        self._steps.append(_Step(len(batch), prompts, started))
        return True

    def stepped(self, running: int, ended: bool) -> None:
        """See `Alongside`."""
        if ended:
            self._ended(self._steps.popleft())
        with self._lock:
            self._running = running
        if not running:
            self._last_step = None
            self._compute_alone()

    def abandoned(self) -> None:
        """See `Alongside`."""
        self._device_thread.submit(self._abandon)

    def _abandon(self) -> None:
        while self._steps:
            step = self._steps.popleft()
            if step.prompts is not None:
                step.prompts.reject(RuntimeError("the decode step that computed this prompt, too, failed"))
        self.stepped(0, False)

    def _ended(self, step: _Step) -> None:
        now, before = time.perf_counter(), self._last_step
        self._last_step = now
        if step.prompts is None or step.started is None:
            return
        step.prompts.resolve(step.started.outputs())
        if before is not None:
            rows = step.running + sum(chunk.length for chunk in step.prompts.chunks)
            self._budget.saw_pass(rows, now - before)

    def _take(self) -> _Prompts | None:
        with self._lock:
            prompts, self._waiting = self._waiting, None
        if prompts is not None:
            self._loop.call_soon_threadsafe(self._taken.set)
        return prompts

    def _compute_alone(self) -> None:
        prompts = self._take()
        if prompts is None:
            return
        try:
            prompts.resolve(self._engine.prefill(prompts.chunks, prompts.on_layer))
        except Exception as error:
            prompts.reject(error)
