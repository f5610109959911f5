"""The prefill worker: one task a request, one loop for the device."""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections import deque
from collections.abc import Awaitable
from dataclasses import dataclass, field, replace

from headrace.data_lines import DataLines
from headrace.engine.base import Ready
from headrace.engine.engine import Engine, PrefillChunk, PrefillOutput
from headrace.engine.page_pool import page_hashes
from headrace.farewell import Farewell
from headrace.grammar import GrammarError, Matcher
from headrace.kvtransfer.departures import LineDepartures
from headrace.kvtransfer.handoff import Handoff, HandoffFailed
from headrace.kvtransfer.messages import Layout, Offer, ToSender, WireDtype
from headrace.kvtransfer.nixl import NixlEndpoint
from headrace.kvtransfer.placement import Placement
from headrace.kvtransfer.sender import RENEW_SECONDS, Sender
from headrace.kvtransfer.transports import exports_of
from headrace.mesh import PeerGone
from headrace.messages.control import MAX_HELD_PAGES, Cancel, Flushed, GivenBack, Holds, PassedOn
from headrace.messages.request import QueueEntry, SamplingParams
from headrace.messages.stream import PrefillReport, RequestFailed
from headrace.node import Node
from headrace.prefill.in_place import Backlog, InPlaceChoice
from headrace.prefill.intake import Intake
from headrace.prefill.job import Job, RequestRejected
from headrace.prefill.scheduler import Chunk, PrefillScheduler
from headrace.prefill.steering import Steering
from headrace.prefill.step_rate import StepRate
from headrace.prefill.turns import Turns
from headrace.prefill.watch import Watch, watching
from headrace.queue import Delivery
from headrace.redis_client import RedisError
from headrace.registry import Member
from headrace.scaling.gauges import PrefillGauge
from headrace.tasks import end_task
from headrace.wire import Decoder, Message

log = logging.getLogger(__name__)

STOP_TAKING_SECONDS = 2.0
HOLDS_SECONDS = 0.1
"""Between two `Holds`: what is computed meanwhile goes with the next one."""
MAX_PASSED = 1024
"""Entries passed on and not looked at; what is beyond comes when others claim it."""


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

    def writes_to(self, key: tuple[str, int]) -> bool:
        """Whether it computes a part of this job."""
        return any(job.key == key for job, _ in self.parts)


class PrefillWorker:
    """Everything between the queue and the first token."""

    def __init__(
        self,
        node: Node,
        engine: Engine,
        layout: Layout,
        turns: Turns,
        max_jobs: int,
        lease_seconds: float,
        lines: DataLines,
        wire_dtype: WireDtype,
        beside: str | None = None,
        nixl: NixlEndpoint | None = None,
    ) -> None:
        """`beside` is the decode worker of the same process, if there is one."""
        self._node = node
        self._engine = engine
        self._layout = layout
        self._lease_seconds = lease_seconds
        self._intake = Intake(node.queue, node.registry, lease_seconds)
        self._scheduler = PrefillScheduler(layout.page_size)
        self._turns = turns
        call_soon = asyncio.get_running_loop().call_soon_threadsafe
        departures = LineDepartures([engine.cache], layout.dtype, lines, call_soon)
        self._sender = Sender(node.mesh.send, departures, engine.cache.staging_blocks)
        self._exports = exports_of(engine.cache, nixl)
        self._wire_dtype: WireDtype = wire_dtype
        self._placement = Placement(node.registry, beside)
        self._steering = Steering(node.registry, layout.page_size)
        self._in_place = InPlaceChoice(self._placement, self._sender, layout.page_size)
        self._room = asyncio.Semaphore(max_jobs)
        self._room_for_passed = asyncio.Semaphore(max_jobs)
        """What others pass on has places of its own: the loop that takes from the queue holds one while it waits."""
        self._passed: asyncio.Queue[Delivery] = asyncio.Queue(MAX_PASSED)
        self._tasks: dict[tuple[str, int], asyncio.Task[None]] = {}
        self._deliveries: dict[tuple[str, int], Delivery] = {}
        """What each of them serves."""
        self._begun: set[tuple[str, int]] = set()
        """Those of which something has been computed."""
        self._jobs: dict[tuple[str, int], Job] = {}
        self._page_turn = asyncio.Lock()
        self._pages_freed = asyncio.Event()
        engine.pool.on_freed.append(self._pages_freed.set)
        self._steps: deque[_Step] = deque()
        """On the device, the oldest first."""
        self._work = asyncio.Event()
        self._untold: list[bytes] = []
        """Pages computed that the tier has not been told of."""
        self._next_holds: asyncio.TimerHandle | None = None
        self._recomputed = 0
        self._gauge = PrefillGauge()
        self._step_rate = StepRate()
        self._step_ended = 0.0
        self._stopping = False
        self._farewell = Farewell(node)
        self._decode: Decoder[ToSender | Cancel | Flushed | GivenBack | Holds | PassedOn] = Decoder(
            ToSender | Cancel | Flushed | GivenBack | Holds | PassedOn
        )
        node.registry.on_leave.append(self._member_left)

    async def run(self, stopped: Awaitable[None], drain_timeout: float) -> None:
        """Serve until `stopped` is done, then give back what has not begun, and finish the rest.

        What is left after `drain_timeout` seconds is given back, too.
        """
        self._publish_stats()
        async with asyncio.TaskGroup() as group:
            taking = group.create_task(self._take_loop(group))
            loops = [self._mailbox_loop(), self._step_loop(), self._keep_alive_loop(), self._passed_loop(group)]
            running = [group.create_task(loop) for loop in loops]
            await stopped
            self._stopping = True
            self._node.registry.drain()
            await self._give_back_waiting()
            await asyncio.wait([taking], timeout=STOP_TAKING_SECONDS)
            await end_task(taking)
            await self._give_back_waiting()  # what came meanwhile
            if self._tasks:
                await asyncio.wait(list(self._tasks.values()), timeout=drain_timeout)
            await self._give_entries_back(list(self._tasks), is_untouched=False)
            if self._next_holds is not None:
                self._next_holds.cancel()
            await self._farewell.say()
            await asyncio.gather(*[end_task(task) for task in running])

    async def _give_back_waiting(self) -> None:
        waiting = [key for key in self._tasks if key not in self._begun]
        await self._give_entries_back(waiting, is_untouched=True)

    async def _give_entries_back(self, keys: list[tuple[str, int]], is_untouched: bool) -> None:
        if not keys:
            return
        tasks = {self._tasks[key]: self._deliveries[key] for key in keys}
        await asyncio.gather(*[end_task(task) for task in tasks])
        await self._to_others([delivery for task, delivery in tasks.items() if task.cancelled()], is_untouched)

    async def _to_others(self, deliveries: list[Delivery], is_untouched: bool) -> None:
        await self._intake.give_back(deliveries, is_untouched)
        self._tell_tier(GivenBack())
        log.info("gave %d entries back to the queue", len(deliveries))

    def _tell_tier(self, message: Message) -> None:
        for worker in self._node.registry.tier("prefill"):
            self._post(worker.id, message)

    async def _take_loop(self, group: asyncio.TaskGroup) -> None:
        """Pull entries, only as many as there is room for."""
        while not self._stopping:
            await self._room.acquire()
            delivery = await self._intake.next()
            if delivery is None or await self._passes_on(delivery):
                self._room.release()
            else:
                self._begin(group, delivery, self._room)

    async def _passed_loop(self, group: asyncio.TaskGroup) -> None:
        """Serve what others of the tier have passed on; what there is no room for goes to whoever claims it."""
        while True:
            delivery = await self._passed.get()
            if self._stopping or self._room_for_passed.locked():
                await self._to_others([delivery], is_untouched=True)
            elif await self._intake.accept(delivery):
                await self._room_for_passed.acquire()
                self._begin(group, delivery, self._room_for_passed)

    async def _passes_on(self, delivery: Delivery) -> bool:
        """Pass an entry on to a worker that had better compute it, if there is one. Nothing is passed on twice."""
        entry = delivery.entry
        if not delivery.is_new or not self._node.registry.tier("prefill"):
            return False
        hashes = page_hashes(entry.token_ids, self._layout.page_size)[: self._num_reusable(entry)]
        held, tokens = self._engine.pool.num_matching(hashes), len(entry.token_ids)
        worker = self._steering.better(hashes, tokens, held, self._scheduler.num_tokens)
        if worker is None or not await self._intake.pass_on(delivery, worker):
            return False
        self._post(worker.id, PassedOn(entry_id=delivery.entry_id, entry=entry, attempt=delivery.attempt))
        self._steering.passed_on(worker, hashes, tokens)
        return True

    def _begin(self, group: asyncio.TaskGroup, delivery: Delivery, room: asyncio.Semaphore) -> None:
        key = delivery.entry.request_id, delivery.attempt
        task = group.create_task(self._serve(delivery), name=f"serve {key}")
        self._tasks[key] = task
        self._deliveries[key] = delivery
        task.add_done_callback(functools.partial(self._served, key, delivery, room))

    def _served(self, key: tuple[str, int], delivery: Delivery, room: asyncio.Semaphore, _: asyncio.Task[None]) -> None:
        self._intake.let_go(delivery)
        del self._tasks[key], self._deliveries[key]
        self._begun.discard(key)
        room.release()
        self._publish_stats()

    async def _serve(self, delivery: Delivery) -> None:
        """Take one request from its entry to the decode worker's acknowledgement."""
        if await self._is_waited_for(delivery.entry.gateway):
            self._post(delivery.entry.gateway, await self._prefill_or_fail(delivery))
        await self._intake.acknowledge(delivery)

    async def _is_waited_for(self, gateway: str) -> bool:
        if gateway not in self._node.registry.members:
            try:
                await self._node.registry.refresh()
            except RedisError:
                return True
        return gateway in self._node.registry.members

    def _post(self, gateway: str, message: Message) -> None:
        try:
            self._node.mesh.post(gateway, message)
        except PeerGone as error:
            log.warning("nobody to tell: %s", error)

    async def _prefill_or_fail(self, delivery: Delivery) -> PrefillReport | RequestFailed:
        entry = delivery.entry
        try:
            with watching(self._node.telemetry, delivery) as watch:
                async with asyncio.timeout(max(entry.deadline - time.time(), 0)):
                    return await self._prefill(delivery, watch)
        except TimeoutError:
            rejected = RequestRejected(
                "deadline", "the request's deadline passed before its prompt was computed", False
            )
        except RequestRejected as error:
            rejected = error
        log.warning("%s attempt %d: %s: %s", entry.request_id, delivery.attempt, rejected.code, rejected)
        return RequestFailed(
            request_id=entry.request_id,
            attempt=delivery.attempt,
            code=rejected.code,
            message=str(rejected),
            retryable=rejected.retryable,
        )

    async def _prefill(self, delivery: Delivery, watch: Watch) -> PrefillReport:
        entry, taken_at = delivery.entry, time.time()
        self._check(delivery)
        hashes = page_hashes(entry.token_ids, self._layout.page_size)
        matcher = await self._compile_grammar(entry.sampling)
        if (report := await self._prefill_in_place(delivery, hashes, taken_at)) is not None:
            return report
        pages, cached_tokens = await self._get_pages(delivery, hashes)
        try:
            watch.job = job = self._make_job(delivery, pages, hashes, cached_tokens)
            job.matcher = matcher
            self._jobs[job.key] = job
            first_token_at = await self._compute_and_hand_over(job)
        finally:
            self._jobs.pop((entry.request_id, delivery.attempt), None)
            self._scheduler.remove((entry.request_id, delivery.attempt))
            self._give_back((entry.request_id, delivery.attempt), pages)
        return PrefillReport(
            request_id=entry.request_id,
            attempt=delivery.attempt,
            decode_worker=job.handoff.receiver if job.handoff else None,
            queue_ms=max(taken_at - entry.enqueued_at, 0.0) * 1000,
            prefill_ms=max(first_token_at - taken_at, 0.0) * 1000,
            handoff_ms=max(time.time() - first_token_at, 0.0) * 1000,
            cached_tokens=cached_tokens,
            prompt_logprobs=job.prompt_logprobs if entry.sampling.prompt_logprobs is not None else None,
        )

    async def _prefill_in_place(self, delivery: Delivery, hashes: list[bytes], taken_at: float) -> PrefillReport | None:
        """Have a decode worker compute the prompt, where that is faster and it does; None where it does not."""
        entry, wants = delivery.entry, delivery.entry.sampling
        if delivery.attempt or not wants.max_tokens or wants.prompt_logprobs is not None:
            return None
        reusable, tokens, now = hashes[: self._num_reusable(entry)], len(entry.token_ids), time.monotonic()
        running = [(sum(chunk.length for _, chunk in step.parts), now - step.started) for step in self._steps]
        backlog = Backlog(self._scheduler.num_tokens, running)
        chosen = self._in_place.choose(reusable, tokens, self._engine.pool.num_matching(reusable), backlog)
        if chosen is None:
            return None
        handoff = Handoff(self._offer(delivery, in_place=True), [], self._engine.cache)
        self._begun.add((entry.request_id, delivery.attempt))
        try:
            if not await self._in_place.have_computed(handoff, hashes, *chosen):
                return None
        except HandoffFailed as error:
            raise RequestRejected("worker_error", f"the prompt was not computed in place: {error}", True) from error
        return PrefillReport(
            request_id=entry.request_id,
            attempt=delivery.attempt,
            decode_worker=handoff.receiver,
            queue_ms=max(taken_at - entry.enqueued_at, 0.0) * 1000,
            prefill_ms=max(time.time() - taken_at, 0.0) * 1000,
            handoff_ms=0.0,
            cached_tokens=handoff.held_pages * self._layout.page_size,
            in_place=True,
        )

    async def _compile_grammar(self, sampling: SamplingParams) -> Matcher | None:
        if sampling.grammar is None:
            return None
        try:
            await asyncio.to_thread(self._engine.grammars.compile, sampling.grammar)
        except GrammarError as error:
            raise RequestRejected("invalid_request", f"the grammar can't be used: {error}", False) from error
        return self._engine.grammars.matcher(sampling)

    def pages_of(self, request_id: str, attempt: int) -> list[int] | None:
        """See `Beside`."""
        return self._sender.pages_of(request_id, attempt)

    def _give_back(self, key: tuple[str, int], pages: list[int]) -> None:
        last = next((step for step in reversed(self._steps) if step.writes_to(key)), None)
        if last is not None:
            last.retired.append(pages)
        else:
            self._engine.pool.release(pages)

    def _check(self, delivery: Delivery) -> None:
        """Raise `RequestRejected` for what no worker, or not this one, can compute."""
        if delivery.exhausted:
            raise RequestRejected("worker_error", "every worker that tried this request died of it or was lost", False)
        if delivery.entry.deadline <= time.time():
            raise RequestRejected("deadline", "the request's deadline passed before its prompt was begun", False)
        if delivery.attempt > 0:
            self._recomputed += 1
        limit, length = self._engine.max_model_len, len(delivery.entry.token_ids)
        if length > limit:
            message = f"{length} prompt tokens are more than this worker's --max-model-len {limit}"
            raise RequestRejected("invalid_request", message, False)
        vocabulary = self._engine.model_config.vocab_size
        if max(delivery.entry.token_ids) >= vocabulary:
            raise RequestRejected("invalid_request", f"token ids must be below {vocabulary}", False)

    async def _get_pages(self, delivery: Delivery, hashes: list[bytes]) -> tuple[list[int], int]:
        """Pages for the prompt, those found in the prefix cache first, and how many tokens the latter hold."""
        entry, pool, page_size = delivery.entry, self._engine.pool, self._layout.page_size
        reusable = self._num_reusable(entry)
        async with self._page_turn:
            while True:
                held = pool.match_prefix(hashes[:reusable])
                missing = pool.pages_for(len(entry.token_ids)) - len(held)
                if missing <= pool.num_spare:
                    return held + pool.allocate(missing), len(held) * page_size
                pool.put_back(held)
                self._pages_freed.clear()
                await self._pages_freed.wait()

    def _num_reusable(self, entry: QueueEntry) -> int:
        """Pages of a prompt that may come from the prefix cache."""
        # The last token is always computed: its logits give the first output token.
        return (len(entry.token_ids) - 1) // self._layout.page_size if entry.sampling.prompt_logprobs is None else 0

    def _make_job(self, delivery: Delivery, pages: list[int], hashes: list[bytes], cached_tokens: int) -> Job:
        entry = delivery.entry
        handoff = None
        if entry.sampling.max_tokens > 0:
            handoff = Handoff(self._offer(delivery), pages, self._engine.cache)
        computed = asyncio.get_running_loop().create_future()
        job = Job(entry, delivery.attempt, pages, hashes, cached_tokens, handoff, computed)
        if cached_tokens:
            for layer in range(self._layout.num_layers):
                job.layer_computed(layer, 0, cached_tokens, self._layout.page_size)
        return job

    def _offer(self, delivery: Delivery, in_place: bool = False) -> Offer:
        entry = delivery.entry
        return Offer(
            request_id=entry.request_id,
            attempt=delivery.attempt,
            gateway=entry.gateway,
            layout=self._layout,
            token_ids=entry.token_ids,
            generated=entry.generated,
            sampling=entry.sampling,
            deadline=entry.deadline,
            host=self._exports.host,
            cuda_ipc=self._exports.cuda_ipc,
            shm=self._exports.shm,
            nixl=self._exports.nixl,
            wire_dtype=self._wire_dtype,
            traceparent=entry.traceparent,
            may_wait=not in_place,
            in_place=in_place,
        )

    async def _compute_and_hand_over(self, job: Job) -> float:
        """Returns the time at which the first token was known."""
        self._scheduler.add(job.key, len(job.entry.token_ids), job.cached_tokens)
        self._work.set()
        try:
            async with asyncio.TaskGroup() as group:
                if job.handoff is not None:
                    choose = functools.partial(self._placement.choose, page_hashes=job.page_hashes)
                    group.create_task(self._sender.deliver(job.handoff, choose))
                token = await job.computed
                job.first_token_at = first_token_at = time.time()
                hashes = job.page_hashes
                if job.handoff is not None and token is not None:
                    job.handoff.finish(token.token_id, token.logprobs)
                elif job.handoff is not None:  # the decode step that has the last token may be yet to come
                    hashes = hashes[: (len(job.entry.token_ids) - 1) // self._layout.page_size]
                for page, page_hash in zip(job.pages, hashes, strict=False):
                    self._engine.pool.publish(page, page_hash)
                self._tell_of(hashes[job.cached_tokens // self._layout.page_size :])
        except ExceptionGroup as failures:
            error = failures.exceptions[0]
            if isinstance(error, HandoffFailed):
                raise RequestRejected("worker_error", f"the KV could not be handed over: {error}", True) from error
            raise error from None
        return first_token_at

    def _tell_of(self, computed: list[bytes]) -> None:
        """Have the tier know of pages: at once, or `HOLDS_SECONDS` after it was told last."""
        self._untold = (self._untold + computed)[-MAX_HELD_PAGES:]
        if self._next_holds is None:
            self._tell_of_all()

    def _tell_of_all(self) -> None:
        self._next_holds = None
        if self._untold:
            self._tell_tier(Holds(waiting=self._scheduler.num_tokens, page_hashes=self._untold))
            self._untold = []
            self._next_holds = asyncio.get_running_loop().call_later(HOLDS_SECONDS, self._tell_of_all)

    async def _step_loop(self) -> None:
        """Schedule, start, and have the jobs told at the end of the step; for ever."""
        places = asyncio.Semaphore(self._turns.depth)
        async with asyncio.TaskGroup() as group:
            while True:
                await self._work.wait()
                await places.acquire()
                await self._turns.turn()
                budget = self._turns.tokens(self._scheduler.num_tokens, self._is_handing_over())
                chunks = self._scheduler.schedule(budget)
                if not chunks:
                    self._work.clear()
                    self._engine.cpu_share.rest()
                    places.release()
                    continue
                step = _Step([(self._jobs[chunk.key], chunk) for chunk in chunks], budget)
                self._steps.append(step)
                self._begun |= {chunk.key for chunk in chunks}
                ending = group.create_task(self._end(step, self._start(step)))
                ending.add_done_callback(lambda _: places.release())

    def _start(self, step: _Step) -> asyncio.Future[list[PrefillOutput]]:
        loop, parts = asyncio.get_running_loop(), step.parts

        def on_layer(layer: int, ready: Ready | None) -> None:
            loop.call_soon_threadsafe(self._layer_computed, layer, ready, parts)

        announce = on_layer if any(job.wants_layers for job, _ in parts) else None
        computing = self._turns.start([self._engine_chunk(job, chunk) for job, chunk in parts], announce)
        computing.add_done_callback(lambda _: self._retire(step))
        return computing

    def _engine_chunk(self, job: Job, chunk: Chunk) -> PrefillChunk:
        """All of a chunk, but for a last token that the decode step beside it computes."""
        of_engine, join = job.chunk(chunk), self._turns.join
        if join is None or not chunk.is_last or chunk.length == 1:
            return of_engine
        if job.handoff is None or job.entry.sampling.prompt_logprobs is not None:
            return of_engine
        commit = job.handoff.commit_undrawn()
        if commit is None:
            return of_engine
        join(commit)
        return replace(of_engine, length=chunk.length - 1)

    def _retire(self, step: _Step) -> None:
        self._steps.remove(step)
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
            self._measure(step)

    def _measure(self, step: _Step) -> None:
        """Steps in flight overlap: each counts from the end of the one before."""
        now = time.monotonic()
        chunks = [chunk for _, chunk in step.parts]
        tokens, seconds = sum(chunk.length for chunk in chunks), now - max(step.started, self._step_ended)
        self._gauge.ran(tokens, sum(chunk.is_last for chunk in chunks), seconds)
        self._step_rate.observe(tokens, step.budget, seconds)
        self._in_place.cost.observe(tokens, seconds)
        self._step_ended = now

    def _is_handing_over(self) -> bool:
        """Or is about to."""
        in_flight = any(chunk.is_last for step in self._steps for _, chunk in step.parts)
        return in_flight or any(job.computed.done() for job in self._jobs.values())

    def _layer_computed(self, layer: int, ready: Ready | None, step: list[tuple[Job, Chunk]]) -> None:
        for job, chunk in step:
            job.layer_computed(layer, chunk.start, chunk.start + chunk.length, self._layout.page_size, ready)

    def _apply(self, step: list[tuple[Job, Chunk]], outputs: list[PrefillOutput]) -> None:
        for (job, chunk), output in zip(step, outputs, strict=True):
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

    async def _mailbox_loop(self) -> None:
        while True:
            inbound, message = await self._node.mesh.receive_as(self._decode)
            match message, inbound.sender.tier:
                case Cancel(), "gateway":
                    self._cancel(message)
                case Flushed(), "gateway":
                    self._farewell.answered(inbound.sender.id)
                case ((Cancel() | Flushed()), _):
                    self._node.mesh.refuse(inbound.sender, "only a gateway may cancel, and say what it has taken")
                case GivenBack(), "prefill":
                    self._intake.hurry()
                case Holds(), "prefill":
                    self._steering.heard(inbound.sender, message.page_hashes, message.waiting)
                case PassedOn(), "prefill":
                    self._take_passed(message)
                case ((GivenBack() | Holds() | PassedOn()), _):
                    self._node.mesh.refuse(inbound.sender, "only prefill workers share the queue")
                case _:
                    self._sender.handle(inbound.sender.id, message)

    def _take_passed(self, message: PassedOn) -> None:
        try:
            self._passed.put_nowait(Delivery(message.entry_id, message.entry, message.attempt))
        except asyncio.QueueFull:
            log.warning("%s was passed on to this worker, which has no room left", message.entry.request_id)

    def _cancel(self, message: Cancel) -> None:
        self._intake.cancel(message.request_id, message.attempt)
        for (request_id, attempt), task in self._tasks.items():
            if request_id == message.request_id and attempt <= message.attempt:
                task.cancel()

    async def _keep_alive_loop(self) -> None:
        """Renew what is held: the queue's entries (or others would claim them) and the handoffs' leases."""
        next_renewal = 0.0
        while True:
            await asyncio.sleep(self._lease_seconds / 4)
            await self._intake.renew()
            if time.monotonic() >= next_renewal:
                next_renewal = time.monotonic() + RENEW_SECONDS
                await self._sender.renew()
            self._publish_stats()

    def _member_left(self, member: Member) -> None:
        if member.tier == "decode":
            self._sender.receiver_left(member.id)
        elif member.tier == "gateway":
            self._farewell.answered(member.id)
            for job in self._jobs.values():
                if job.entry.gateway == member.id:
                    self._tasks[job.key].cancel()

    def _publish_stats(self) -> None:
        pool = self._engine.pool
        self._node.registry.update_stats(
            {
                "kv_pages_in_use": pool.num_in_use,
                "kv_pages_total": pool.num_pages,
                "requests_waiting": len(self._tasks) - len(self._jobs),
                "requests_running": len(self._jobs),
                "prompt_tokens_waiting": self._scheduler.num_tokens,
                "handoff_recomputed_total": self._recomputed,
                "messages_refused_total": self._node.mesh.refused,
            }
            | self._step_rate.figures()
            | self._steering.figures()
            | self._sender.stats.figures()
            | self._node.telemetry.stats()
            | self._gauge.stats()
        )
