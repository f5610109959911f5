"""The gateway's line to the workers: puts entries into the queue, hands out what comes back, and cancels."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from typing import Any

from headrace.gateway.audit import Audit
from headrace.gateway.choice import Choice
from headrace.gateway.errors import Unavailable
from headrace.gateway.metrics import GatewayMetrics
from headrace.mesh import PeerGone
from headrace.messages.control import Cancel, Flushed
from headrace.messages.stream import Flush, Moved, PrefillReport, RequestFailed, ToGateway, TokenEvent
from headrace.node import Node
from headrace.redis_client import RedisError
from headrace.registry import Member
from headrace.tasks import run_beside
from headrace.wire import Decoder

log = logging.getLogger(__name__)

REQUEUE_DELAYS = (0.0, 0.1, 0.2, 0.4, 0.8)
"""Seconds to wait before each requeue: a worker that is overloaded or leaving needs a moment."""
REDIS_RETRY_SECONDS = 0.5
CLOSE_SECONDS = 2.0
MAX_STRAYS = 4096


class MeshClient:
    """All choices that run, by their id in the mesh. It is their `Courier`."""

    def __init__(self, node: Node, metrics: GatewayMetrics) -> None:
        self.node = node
        self.on_prefilled: Callable[[Choice], None] = lambda choice: None
        """Told of each choice's first token."""
        self._metrics = metrics
        self._choices: dict[str, Choice] = {}
        self._decode: Decoder[ToGateway] = Decoder(ToGateway)
        self._tasks: set[asyncio.Task[None]] = set()
        self._strays: OrderedDict[tuple[str, str, int], None] = OrderedDict()
        self._audit = Audit(node, self._choices, self)  # before the next line: its callbacks come first
        node.registry.on_leave.append(self._on_leave)

    async def receive(self) -> None:
        """Hand out messages until cancelled."""
        await run_beside(self._receive(), [self._audit.run()])

    async def _receive(self) -> None:
        while True:
            inbound, message = await self.node.mesh.receive_as(self._decode)
            if inbound.sender.tier == "gateway":
                self.node.mesh.refuse(inbound.sender, "gateways make no tokens")
            else:
                await self._dispatch(message, inbound.sender)

    async def submit(self, choice: Choice) -> None:
        """Queue a new choice. Raises `Unavailable` where Redis is away."""
        self._choices[choice.request_id] = choice
        putting = self._spawn(self._put(choice))
        await asyncio.shield(putting)  # a client that leaves now must not leave an entry of unknown id behind

    def enqueue(self, choice: Choice) -> None:
        """Queue a choice that was accepted before: where Redis is away it waits, until its deadline."""
        self._choices[choice.request_id] = choice
        self._spawn(self._requeue(choice, 0.0))

    def release(self, choice: Choice) -> None:
        """Forget a choice; where it still runs, have the workers free all they hold for it."""
        self._choices.pop(choice.request_id, None)
        if choice.state != "finished":
            choice.abandon()
            self.drop(choice)

    def requeue(self, choice: Choice) -> None:
        self._metrics.requeues.inc()
        self._spawn(self._requeue(choice, REQUEUE_DELAYS[choice.requeues - 1]))

    def cancel(self, choice: Choice, attempt: int) -> None:
        self._spawn(self._broadcast(Cancel(request_id=choice.request_id, attempt=attempt)))

    def drop(self, choice: Choice) -> None:
        self.cancel(choice, choice.last_attempt)
        if choice.entry_id is not None:
            self._spawn(self._remove(choice.entry_id))
            choice.entry_id = None

    @property
    def running(self) -> int:
        """Choices that have not been released."""
        return len(self._choices)

    async def close(self) -> None:
        """Wait a moment for cancellations to be sent."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=CLOSE_SECONDS)
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _dispatch(self, message: ToGateway, sender: Member) -> None:
        if isinstance(message, PrefillReport):
            await self._on_report(message, sender)
        elif isinstance(message, RequestFailed):
            if (choice := self._choices.get(message.request_id)) is not None:
                log.warning("%s gave up %s: %s (%s)", sender.id, message.request_id, message.message, message.code)
                choice.on_failure(message, self)
        elif isinstance(message, Moved):
            await self._on_moved(message)
        elif isinstance(message, Flush):
            self._flush(sender)
        else:
            for event in message.events:
                self._on_tokens(event, sender)

    def _on_tokens(self, event: TokenEvent, sender: Member) -> None:
        choice = self._choices.get(event.request_id)
        if choice is None or event.attempt < choice.attempt:
            self._stray(event, sender)
            return
        if choice.sampling.logprobs is not None and len(event.logprobs or ()) != len(event.token_ids):
            self.node.mesh.refuse(sender, "tokens without the log probabilities asked for")
            return
        before = choice.last_token_at
        fresh = choice.on_tokens(event, sender, self)
        if fresh and choice.last_token_at is not None:
            self._metrics.observe_tokens(fresh, choice.created, before, choice.last_token_at, choice.traceparent)
            if before is None:
                self.on_prefilled(choice)

    async def _on_report(self, report: PrefillReport, sender: Member) -> None:
        worker = await self._member(report.decode_worker) if report.decode_worker is not None else None
        choice = self._choices.get(report.request_id)
        if choice is not None:
            choice.on_report(report, sender, worker, self)

    async def _on_moved(self, moved: Moved) -> None:
        worker = await self._member(moved.decode_worker)
        choice = self._choices.get(moved.request_id)
        if choice is not None:
            choice.on_moved(moved, worker, self)

    async def _member(self, worker_id: str) -> Member | None:
        registry = self.node.registry
        if worker_id not in registry.members:  # it may have joined since the last look
            try:
                await registry.refresh()
            except RedisError as error:
                log.debug("can't look for %s: %s", worker_id, error)
        return registry.members.get(worker_id)

    def _flush(self, sender: Member) -> None:
        try:
            self.node.mesh.post(sender.id, Flushed())
        except PeerGone as error:
            log.debug("%s need not wait: %s", sender.id, error)

    def _on_leave(self, member: Member) -> None:
        for choice in list(self._choices.values()):
            choice.on_leave(member, self)

    def _stray(self, event: TokenEvent, sender: Member) -> None:
        """Tokens that nobody waits for: their sender missed the cancellation, so tell it once more."""
        key = (sender.id, event.request_id, event.attempt)
        if event.finish_reason is not None or key in self._strays:
            return
        self._strays[key] = None
        if len(self._strays) > MAX_STRAYS:
            self._strays.popitem(last=False)
        self._spawn(self._send(sender.id, Cancel(request_id=event.request_id, attempt=event.attempt)))

    async def _put(self, choice: Choice) -> None:
        entry = choice.entry(self.node.id)
        try:
            entry_id = await self.node.queue.put(entry)
        except RedisError as error:
            choice.fail(Unavailable(f"The request queue can't be reached: {error}.", code="queue_unavailable"))
            return
        if choice.ended or choice.entry_attempt != entry.attempt:
            await self._remove(entry_id)
        else:
            choice.entry_id = entry_id

    async def _requeue(self, choice: Choice, delay: float) -> None:
        await asyncio.sleep(delay)
        entry = choice.entry(self.node.id)
        while not choice.ended and choice.entry_attempt == entry.attempt and time.time() < choice.deadline:
            try:
                entry_id = await self.node.queue.put(entry)
            except RedisError:
                await asyncio.sleep(REDIS_RETRY_SECONDS)
                continue
            if choice.ended or choice.entry_attempt != entry.attempt:
                await self._remove(entry_id)
            else:
                choice.entry_id = entry_id
            return

    async def _remove(self, entry_id: str) -> None:
        try:
            await self.node.queue.remove(entry_id)
        except RedisError as error:
            log.warning("could not take entry %s out of the queue, it will run for nobody: %s", entry_id, error)

    async def _broadcast(self, message: Cancel) -> None:
        registry = self.node.registry
        workers = [*registry.tier("prefill"), *registry.tier("decode")]
        await asyncio.gather(*(self._send(worker.id, message) for worker in workers))

    async def _send(self, worker_id: str, message: Cancel) -> None:
        try:
            await self.node.mesh.send(worker_id, message)
        except PeerGone as error:
            log.debug("cancellation not sent: %s", error)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._on_done)
        return task

    def _on_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a background task failed", exc_info=error)
