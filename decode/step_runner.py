"""Runs steps of the batch on the device's thread, and gives what they make to who tells of it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial

from headrace.decode.output import Output
from headrace.decode.scheduler import DecodeScheduler, Plan
from headrace.decode.sequence import Key
from headrace.decode.speculator import Speculator
from headrace.decode.step import Alongside, plan_step, run_step
from headrace.decode.step_gauge import StepGauge
from headrace.engine.decode_batch import RunningBatch, new_batch
from headrace.engine.device_thread import DeviceThread
from headrace.engine.engine import Engine
from headrace.engine.step_tokens import StepTokens
from headrace.telemetry.events import StepRan
from headrace.telemetry.telemetry import Telemetry

log = logging.getLogger(__name__)


class StepRunner:
    """All its methods but one are the event loop's."""

    def __init__(
        self,
        engine: Engine,
        device_thread: DeviceThread,
        scheduler: DecodeScheduler,
        output: Output,
        speculator: Speculator | None,
        alongside: Alongside | None,
        telemetry: Telemetry,
        max_num_seqs: int,
    ) -> None:
        self._engine = engine
        self._device_thread = device_thread
        self._batch: RunningBatch[Key] | None = None
        """Made and used on the device's thread alone, see `_run`."""
        self._scheduler = scheduler
        self._output = output
        self._speculator = speculator
        self._alongside = alongside
        self._telemetry = telemetry
        self._max_num_seqs = max_num_seqs
        self.gauge = StepGauge()

    async def run_one(self, publish: Callable[[], None]) -> None:
        """Schedule a step, start it and take the tokens of the oldest one that is due.

        `publish` sends what was taken before: it is called when the device has the new step, or before what else comes
        first. What is taken now is the caller's to send if no other step follows.
        """
        loop = asyncio.get_running_loop()
        started = loop.time()
        if self._alongside is not None:
            publish()
            requests = self._scheduler.num_running + self._scheduler.num_ready
            await self._alongside.before_step(min(requests, self._max_num_seqs))
        plan = self._schedule()
        running = self._scheduler.num_running
        step = self._device_thread.run(self._run, plan, partial(loop.call_soon_threadsafe, publish))
        try:
            tokens = await step
        except Exception:
            log.exception("a decode step failed, giving its requests up")
            self._give_up_running()
        else:
            self.gauge.ended(loop.time(), self._scheduler.num_running)
            if tokens is not None:
                self._output.take_step(tokens)
            if tokens:
                self._telemetry.emit(StepRan(running, len(tokens), loop.time() - started))
            if self._speculator is not None and plan is not None and not plan.is_shared:
                if tokens is not None:
                    self._speculator.ran(plan.drafts, loop.time() - started)
                elif running:
                    self._speculator.refilled(loop.time() - started)

    def _schedule(self) -> Plan | None:
        plan = plan_step(self._scheduler, self._speculator)
        if plan is not None:
            for sequence in plan.preempted:
                self._output.fail(sequence, "preempted", "the KV cache was full; the request is computed again")
        return plan

    def _give_up_running(self) -> None:
        for sequence in self._scheduler.sequences():
            self._output.fail(sequence, "worker_error", "a decode step failed")
        self._scheduler.abandon_steps()
        self._scheduler.schedule()
        self._batch = None
        if self._alongside is not None:
            self._alongside.abandoned()

    def _run(self, plan: Plan | None, started: Callable[[], object]) -> StepTokens[Key] | None:
        """`run_step` on the device's own thread.

        No other thread may run a parallel operation of torch: libgomp would see more threads than cores and, for ever
        after, let those that wait sleep at once, and a step would take half as long again.
        """
        if self._batch is None:
            self._batch = new_batch(self._engine)
        tokens = run_step(self._batch, plan, self._alongside, started)
        if self._speculator is not None and tokens is not None:
            self._speculator.look(self._batch)
        return tokens
