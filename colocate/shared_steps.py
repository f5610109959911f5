"""Chunks of prompts in the same forward pass as decode steps, which so read the weights once for both.

A step is started just before the one ahead of it ends, so that what comes meanwhile is in it: the decode worker waits
in `before_step`, which then gives the prefill worker its turn. The chunk waits in one place for the step to take it
along; where no request is decoded, it is computed alone.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

from headrace.colocate.row_budget import RowBudget
from headrace.engine.base import LayerAnnounced
from headrace.engine.decode_batch import RunningBatch
from headrace.engine.engine import Engine, PrefillChunk, PrefillOutput, StartedPrefill
from headrace.engine.graph_batch import GraphBatch
from headrace.kvtransfer.messages import Commit

EARLIEST, LATEST = 0.008, 0.0005
"""Seconds before the end of a step at which the next one is scheduled: what the host takes to start it, and how far
timers and what is expected of steps are off. How early that must be is found out, up to where prompts that come too
late for a step wait longer for the next one than it is worth."""
EARLIER, LATER = 0.0003, 0.000003
"""After a step with prompts that was started too late, and after one that was not: some 1 % are. Steps without prompts
are so much shorter than the target that it does not matter when they are late."""


@dataclass(frozen=True)
class _Prompts:
    """Chunks, and where their outputs are awaited."""

    chunks: Sequence[PrefillChunk]
    on_layer: LayerAnnounced | None
    outputs: asyncio.Future[list[PrefillOutput]]

    @property
    def tokens(self) -> int:
        """In all chunks."""
        return sum(chunk.length for chunk in self.chunks)

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

    rows: int
    prompts: _Prompts | None = None
    started: StartedPrefill | None = None


class SharedSteps:
    """See `Turns` and `Alongside`, for an engine with a graph decoder.

    At most three chunks are under way: two in steps in flight, one that waits for the next.
    """

    depth = 3
    whole = 0

    def __init__(
        self,
        budget: RowBudget,
        engine: Engine,
        device_thread: Executor,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._budget = budget
        self._clock = clock
        self._engine = engine
        self._device_thread = device_thread
        self._loop = asyncio.get_running_loop()
        self.decode: Callable[[Commit], None] | None = None
        """Takes requests into the next step."""
        self._turn: asyncio.Future[None] | None = None
        """The prefill worker waits for it."""
        self._requests = 0
        """In the next step."""
        self._lock = threading.Lock()
        self._waiting: _Prompts | None = None
        self._running = 0
        self._steps: deque[_Step] = deque()
        """On the device's thread."""
        self._last_step: float | None = None
        self._ahead = 0.002
        """Seconds before the expected end of a step."""
        self._was_late = False
        """The step collected last had ended before: the next one began later than that ended."""
        self._batch: GraphBatch[Any] | None = None
        self._due = 0.0
        """When the next step is to be started, by the clock."""

    @property
    def join(self) -> Callable[[Commit], None] | None:
        """See `Turns`. A draft head's K and V of the last token would be missing."""
        return self.decode if self._running and self._engine.head is None else None

    async def turn(self) -> None:
        """See `Turns`."""
        if self._running or self._waiting is not None:
            self._turn = self._loop.create_future()
            await self._turn

    def tokens(self, waiting: int, handing_over: bool) -> int:
        """See `Turns`."""
        if self._running or handing_over:
            return self._budget.tokens(self._requests, waiting)
        return self._budget.most

    def _give_turn(self) -> None:
        if self._turn is not None and not self._turn.done():
            self._turn.set_result(None)

    async def before_step(self, requests: int) -> None:
        """See `Alongside`."""
        early = self._due - self._clock()
        if early > 0:  # the loop's own timer goes by whole milliseconds
            await self._loop.run_in_executor(self._device_thread, time.sleep, early)
        self._requests = requests
        if self._waiting is None:
            self._give_turn()
            await asyncio.sleep(0)  # who waits for the turn goes on first, up to where the chunk is started

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
        self._batch = batch
        prompts = self._take()
        if prompts is None:
            self._steps.append(_Step(len(batch)))
            return False
        try:
            started = batch.start_with_prompts(prompts.chunks, prompts.on_layer)
        except Exception as error:
            prompts.reject(error)
            raise
        self._steps.append(_Step(len(batch) + prompts.tokens, prompts, started))
        return True

    def stepped(self, running: int, ended: bool) -> None:
        """See `Alongside`."""
        now = self._clock()
        if ended:
            self._ended(self._steps.popleft(), now)
        ahead = self._steps[0] if self._steps else None
        takes = self._budget.expected(ahead.rows, ahead.prompts is not None) if ahead is not None else 0.0
        self._due = now + takes - self._ahead if ended else now
        with self._lock:
            self._running = running
        if not running:
            self._last_step = None
            self._compute_alone()
            self._loop.call_soon_threadsafe(self._give_turn)

    def abandoned(self) -> None:
        """See `Alongside`."""
        self._device_thread.submit(self._abandon)

    def _abandon(self) -> None:
        while self._steps:
            step = self._steps.popleft()
            if step.prompts is not None:
                step.prompts.reject(RuntimeError("the decode step that computed this prompt, too, failed"))
        self.stepped(0, False)

    def _ended(self, step: _Step, now: float) -> None:
        before, self._last_step = self._last_step, now
        late, was_late = self._batch is not None and self._batch.collected_late, self._was_late
        self._was_late = late
        if self._steps and self._steps[0].prompts is not None:
            self._ahead = min(self._ahead + EARLIER, EARLIEST) if late else max(self._ahead - LATER, LATEST)
        if step.prompts is not None and step.started is not None:
            step.prompts.resolve(step.started.outputs())
        if before is not None:
            self._budget.scattered(now - before)
            if not late and not was_late:
                self._budget.saw(step.rows, step.prompts is not None, now - before)

    def _take(self) -> _Prompts | None:
        with self._lock:
            prompts, self._waiting = self._waiting, None
        return prompts

    def _compute_alone(self) -> None:
        prompts = self._take()
        if prompts is None:
            return
        self._loop.call_soon_threadsafe(self._give_turn)
        try:
            prompts.resolve(self._engine.start_shared(prompts.chunks, prompts.on_layer, 0).outputs())
        except Exception as error:
            prompts.reject(error)
