"""The prefill worker's steps: schedule, start, and have the jobs told at the end. One loop for the device."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from headrace.engine.base import Ready
from headrace.engine.engine import Engine, PrefillChunk, PrefillOutput
from headrace.prefill.in_place import Backlog
from headrace.prefill.job import Job, RequestRejected
from headrace.prefill.scheduler import Chunk, Key, PrefillScheduler
from headrace.prefill.step_meter import StepMeter
from headrace.prefill.turns import Turns

log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Step:
    """Chunks on the device."""

    parts: list[tuple[Job, Chunk]]
    budget: int
    """Tokens that it might have had."""
    started: float = field(default_factory=time.monotonic)
    """Seconds, monotonic."""
    retired: list[list[int]] = field(default_factory=list)
    """Pages of jobs that were given up meanwhile: others may have them when the step has ended."""

    @property
    def num_tokens(self) -> int:
        """Of all chunks."""
        return sum(chunk.length for _, chunk in self.parts)

    def writes_to(self, key: Key) -> bool:
        """Whether it computes a part of this job."""
        return any(job.key == key for job, _ in self.parts)


class Steps:
    """Those of one device, and the jobs whose prompts they compute."""

    def __init__(self, engine: Engine, page_size: int, turns: Turns) -> None:
        self.meter = StepMeter()
        self._engine = engine
        self._turns = turns
        self._scheduler = PrefillScheduler(page_size)
        self._jobs: dict[Key, Job] = {}
        self._running: deque[_Step] = deque()
        """On the device, the oldest first."""
        self._work = asyncio.Event()

    @property
    def jobs(self) -> Iterable[Job]:
        """Those that hold pages: to be computed, or to be handed over."""
        return self._jobs.values()

    @property
    def num_jobs(self) -> int:
        """How many these are."""
        return len(self._jobs)

    @property
    def num_waiting_tokens(self) -> int:
        """Prompt tokens that no step has computed or computes."""
        return self._scheduler.num_tokens

    def backlog(self) -> Backlog:
        """What is to be done before one more prompt is computed."""
        now = time.monotonic()
        return Backlog(self._scheduler.num_tokens, [(step.num_tokens, now - step.started) for step in self._running])

    def add(self, job: Job) -> None:
        """Have its prompt computed, which `job.computed` will tell."""
        self._jobs[job.key] = job
        self._scheduler.add(job.key, job.prompt.num_tokens, job.cached_tokens)
        self._work.set()

    def remove(self, key: Key, pages: list[int]) -> None:
        """Forget a job, if it is one, and free its pages, as soon as no step writes to them."""
        self._jobs.pop(key, None)
        self._scheduler.remove(key)
        last = next((step for step in reversed(self._running) if step.writes_to(key)), None)
        if last is not None:
            last.retired.append(pages)
        else:
            self._engine.pool.release(pages)

    async def run(self) -> None:
        """Compute what there is; for ever."""
        places = asyncio.Semaphore(self._turns.depth)
        async with asyncio.TaskGroup() as group:
            while True:
                await self._work.wait()
                await places.acquire()
                await self._turns.turn()
                budget = self._turns.tokens(self._scheduler.num_tokens, self._is_handing_over())
                chunks = self._scheduler.schedule(budget, self._turns.whole)
                if not chunks:
                    self._work.clear()
                    self._engine.cpu_share.rest()
                    places.release()
                    continue
                step = _Step([(self._jobs[chunk.key], chunk) for chunk in chunks], budget)
                self._running.append(step)
                ending = group.create_task(self._end(step, self._start(step)))
                ending.add_done_callback(lambda _: places.release())

    def _is_handing_over(self) -> bool:
        """Or is about to."""
        in_flight = any(chunk.is_last for step in self._running for _, chunk in step.parts)
        return in_flight or any(job.computed.done() for job in self._jobs.values())

    def _start(self, step: _Step) -> asyncio.Future[list[PrefillOutput]]:
        loop, parts = asyncio.get_running_loop(), step.parts

        def on_layer(layer: int, ready: Ready | None) -> None:
            loop.call_soon_threadsafe(self._layer_computed, layer, ready, parts)

        for job, _ in parts:
            job.prompt.is_begun = True
        announce = on_layer if any(job.wants_layers for job, _ in parts) else None
        computing = self._turns.start([self._engine_chunk(job, chunk) for job, chunk in parts], announce)
        computing.add_done_callback(lambda _: self._retire(step))
        return computing

    def _engine_chunk(self, job: Job, chunk: Chunk) -> PrefillChunk:
        """All of a chunk, but for a last token that the decode step beside it computes."""
        of_engine, join = job.chunk(chunk), self._turns.join
        if join is None or not chunk.is_last or chunk.length == 1:
            return of_engine
        if job.handoff is None or job.prompt.entry.sampling.prompt_logprobs is not None:
            return of_engine
        commit = job.handoff.commit_undrawn()
        if commit is None:
            return of_engine
        join(commit)
        return replace(of_engine, length=chunk.length - 1)

    def _layer_computed(self, layer: int, ready: Ready | None, parts: list[tuple[Job, Chunk]]) -> None:
        for job, chunk in parts:
            job.layer_computed(layer, chunk.start, chunk.start + chunk.length, ready)

    def _retire(self, step: _Step) -> None:
        self._running.remove(step)
        for pages in step.retired:
            self._engine.pool.release(pages)

    async def _end(self, step: _Step, computing: asyncio.Future[list[PrefillOutput]]) -> None:
        try:
            outputs = await asyncio.shield(computing)  # to end this worker does not end what the device writes
        except Exception as error:
            log.exception("a prefill step failed")
            self._fail_jobs([job for job, _ in step.parts], error)
        else:
            self._apply(step.parts, outputs)
            prompts = sum(chunk.is_last for _, chunk in step.parts)
            self.meter.ran(step.num_tokens, prompts, step.budget, step.started, time.monotonic())

    def _apply(self, parts: list[tuple[Job, Chunk]], outputs: list[PrefillOutput]) -> None:
        for (job, chunk), output in zip(parts, outputs, strict=True):
            job.prompt_logprobs.extend(output.prompt_logprobs)
            if not chunk.is_last or job.computed.done():
                continue
            if job.matcher is not None and job.matcher.error is not None:
                failed = RequestRejected("invalid_request", f"the grammar failed: {job.matcher.error}", False)
                job.computed.set_exception(failed)
            else:
                job.computed.set_result(output.token)

    def _fail_jobs(self, jobs: list[Job], error: Exception) -> None:
        for job in jobs:
            self._scheduler.remove(job.key)
            if not job.computed.done():
                job.computed.set_exception(RequestRejected("worker_error", f"the prefill step failed: {error}", True))
