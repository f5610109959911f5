"""Prefill and decode workers without a model: everything that moves and owns pages is real, the KV is keyed bytes."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Callable

from headrace.data_line import Listener
from headrace.data_lines import identify_by
from headrace.engine.page_pool import PagePool
from headrace.kvtransfer.departures import LineDepartures, Lines
from headrace.kvtransfer.handoff import Handoff, HandoffFailed
from headrace.kvtransfer.incoming import ReceivedRequest
from headrace.kvtransfer.messages import Offer, ToReceiver, ToSender
from headrace.kvtransfer.placement import Placement
from headrace.kvtransfer.receiver import Receiver
from headrace.kvtransfer.segments import Segment
from headrace.kvtransfer.sender import Send, Sender
from headrace.kvtransfer.transports import Transports, exports_of
from headrace.loadtest.keyed_kv import (
    LAYOUT,
    NUM_LAYERS,
    PAGE_SIZE,
    fill,
    first_token,
    new_cache,
    next_token,
    page_keys,
)
from headrace.mesh import PeerGone
from headrace.messages.control import Cancel
from headrace.messages.stream import PrefillReport, RequestFailed, TokenBatch, TokenEvent
from headrace.node import Node
from headrace.prefill.intake import Intake
from headrace.queue import Delivery
from headrace.registry import Member
from headrace.tasks import end_task, run_beside
from headrace.wire import Decoder, Message

REAP_SECONDS = 0.5
MAX_JOBS = 16
PAGES_A_CHUNK = 3

Key = tuple[str, int]


class BareDecode:
    """Receives prompts, holds them for a while, and answers with the commit's token and one made of the pages."""

    def __init__(self, node: Node, listener: Listener, num_pages: int, hold_seconds: float = 0.0) -> None:
        self.pool = PagePool(num_pages, PAGE_SIZE)
        self.received = 0
        self.post: Callable[[str, Message], None] = node.mesh.post
        self.cache = new_cache(num_pages)
        self.receiver = Receiver(
            LAYOUT,
            [self.cache],
            self.pool,
            num_pages,
            self._post,
            self._start_decoding,
            choice=Transports(LAYOUT, self.cache, node.mesh.refuse_from),
            call_soon=asyncio.get_running_loop().call_soon_threadsafe,
            refuse=node.mesh.refuse_from,
        )
        self._listener = listener
        self._node = node
        self._hold_seconds = hold_seconds
        self._held: dict[Key, ReceivedRequest] = {}
        self._decode: Decoder[ToReceiver | Cancel] = Decoder(ToReceiver | Cancel)
        node.registry.on_leave.append(self._member_left)

    async def run(self) -> None:
        """Serve until cancelled."""
        mesh = self._node.mesh
        self._listener.start(self.receiver.arrivals.on_frame, identify_by(mesh), mesh.refuse_from)
        try:
            await run_beside(self._mailbox_loop(), [self._reap_loop()])
        finally:
            self.cache.close()

    async def _mailbox_loop(self) -> None:
        while True:
            inbound, message = await self._node.mesh.receive_as(self._decode)
            match message, inbound.sender.tier:
                case Cancel(), "gateway":
                    self._cancel(message)
                case Cancel(), _:
                    self._node.mesh.refuse(inbound.sender, "only a gateway may cancel")
                case _, tier if tier != "prefill":
                    self._node.mesh.refuse(inbound.sender, "only a prefill worker hands over")
                case _:
                    self.receiver.handle(inbound.sender.id, message)

    def _cancel(self, cancel: Cancel) -> None:
        self.receiver.cancel(cancel.request_id, cancel.attempt)
        self._drop(lambda key, _: key[0] == cancel.request_id and key[1] <= cancel.attempt)

    async def _reap_loop(self) -> None:
        while True:
            await asyncio.sleep(REAP_SECONDS)
            self.receiver.reap()
            self.check_integrity()
            self._node.registry.update_stats(
                {
                    "kv_pages_in_use": self.pool.num_in_use,
                    "kv_pages_total": self.pool.num_pages,
                    "kv_page_tokens": PAGE_SIZE,
                }
            )

    def check_integrity(self) -> None:
        """Assert that every page is accounted for."""
        self.pool.check_integrity()
        self.receiver.check_integrity()

    def _member_left(self, member: Member) -> None:
        if member.tier == "prefill":
            self._listener.drop(member.id)
            self.receiver.sender_left(member.id)
        elif member.tier == "gateway":
            self.receiver.cancel_gateway(member.id)
            self._drop(lambda _, request: request.offer.gateway == member.id)

    def _drop(self, is_unwanted: Callable[[Key, ReceivedRequest], bool]) -> None:
        for key in [key for key, request in self._held.items() if is_unwanted(key, request)]:
            self._release(key)

    def _release(self, key: Key) -> None:
        self.pool.release(self._held.pop(key).pages)
        self.receiver.grant_waiting()

    def _start_decoding(self, request: ReceivedRequest) -> None:
        self.received += 1
        key = request.offer.request_id, request.offer.attempt
        self._held[key] = request
        asyncio.get_running_loop().call_later(self._hold_seconds, self._finish, key, self._next_token(request))

    def _next_token(self, request: ReceivedRequest) -> int:
        return next_token(self.cache.read_pages(layer, request.pages) for layer in range(NUM_LAYERS))

    def _finish(self, key: Key, token_id: int) -> None:
        request = self._held.get(key)
        if request is None:
            return
        assert self._next_token(request) == token_id, "somebody wrote into pages that are in use"
        first = request.commit.token_id
        assert first is not None
        event = TokenEvent(
            request_id=key[0],
            attempt=key[1],
            position=request.offer.generated,
            token_ids=[first, token_id],
            finish_reason="length",
        )
        self._post(request.offer.gateway, TokenBatch(events=[event]))
        self._release(key)

    def _post(self, peer: str, message: Message) -> None:
        try:
            self.post(peer, message)
        except PeerGone:
            pass  # the registry will say so too


class BarePrefill:
    """Takes requests from the queue, fills their pages layer by layer and hands them over meanwhile."""

    def __init__(
        self, node: Node, lines: Lines, num_pages: int, lease_seconds: float, renew_seconds: float, shares_memory: bool
    ) -> None:
        """`shares_memory` is whether receivers on this machine may read pages in place, instead of over TCP."""
        self.pool = PagePool(num_pages, PAGE_SIZE)
        self.send: Send = node.mesh.send
        self.accident: Callable[[], None] = lambda: None
        """Called before each layer; what it raises (`HandoffFailed`) ends the attempt."""
        self._node = node
        self._cache = new_cache(num_pages)
        self._exports = exports_of(self._cache) if shares_memory else None
        self._lease_seconds = lease_seconds
        self._renew_seconds = renew_seconds
        self._intake = Intake(node.queue, node.registry, lease_seconds)
        departures = LineDepartures([self._cache], LAYOUT.dtype, lines, asyncio.get_running_loop().call_soon_threadsafe)
        self._sender = Sender(lambda peer, message: self.send(peer, message), departures)
        self._placement = Placement(node.registry)
        self._room = asyncio.Semaphore(MAX_JOBS)
        self._tasks: dict[Key, asyncio.Task[None]] = {}
        self._broken: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()
        """What a task raised that it should not."""
        self._freed = asyncio.Event()
        self._decode: Decoder[ToSender | Cancel] = Decoder(ToSender | Cancel)
        node.registry.on_leave.append(self._member_left)

    async def run(self) -> None:
        """Serve until cancelled."""
        try:
            await run_beside(
                self._mailbox_loop(),
                [self._take_loop(), self._renew_loop(), self._keep_alive_loop(), self._until_broken()],
            )
        finally:
            for task in list(self._tasks.values()):
                await end_task(task)
            self._cache.close()

    async def _until_broken(self) -> None:
        raise await self._broken

    async def _take_loop(self) -> None:
        while True:
            await self._room.acquire()
            delivery = await self._intake.next()
            if delivery is None:
                self._room.release()
                continue
            key = delivery.entry.request_id, delivery.attempt
            self._tasks[key] = task = asyncio.create_task(self._serve(delivery))
            task.add_done_callback(functools.partial(self._served, key, delivery))

    def _served(self, key: Key, delivery: Delivery, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None and not self._broken.done():
            self._broken.set_result(error)
        self._intake.let_go(delivery)
        del self._tasks[key]
        self._room.release()

    async def _serve(self, delivery: Delivery) -> None:
        entry = delivery.entry
        try:
            async with asyncio.timeout(max(entry.deadline - time.time(), 0)):
                answer: PrefillReport | RequestFailed = await self._prefill(delivery)
        except (HandoffFailed, TimeoutError) as error:
            answer = RequestFailed(
                request_id=entry.request_id,
                attempt=delivery.attempt,
                code="worker_error",
                message=str(error),
                retryable=True,
            )
        try:
            self._node.mesh.post(entry.gateway, answer)
        except PeerGone:
            pass  # nobody waits any more
        await self._intake.acknowledge(delivery)

    async def _prefill(self, delivery: Delivery) -> PrefillReport:
        entry = delivery.entry
        needed = self.pool.pages_for(len(entry.token_ids))
        while needed > self.pool.num_free:
            self._freed.clear()
            await self._freed.wait()
        pages = self.pool.allocate(needed)
        offer = Offer(
            request_id=entry.request_id,
            attempt=delivery.attempt,
            gateway=entry.gateway,
            layout=LAYOUT,
            token_ids=entry.token_ids,
            generated=entry.generated,
            sampling=entry.sampling,
            deadline=entry.deadline,
            host=self._exports.host if self._exports else None,
            shm=self._exports.shm if self._exports else None,
        )
        handoff = Handoff(offer, pages, self._cache)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._sender.deliver(handoff, self._placement.choose))
                await self._compute(handoff, pages)
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None
        finally:
            self.pool.release(pages)
            self._freed.set()
        return PrefillReport(
            request_id=entry.request_id,
            attempt=delivery.attempt,
            decode_worker=handoff.receiver,
            queue_ms=0.0,
            prefill_ms=0.0,
            handoff_ms=0.0,
            cached_tokens=0,
        )

    async def _compute(self, handoff: Handoff, pages: list[int]) -> None:
        keys = page_keys(handoff.offer.token_ids)
        for first in range(0, len(pages), PAGES_A_CHUNK):
            chunk = slice(first, first + PAGES_A_CHUNK)
            for layer in range(NUM_LAYERS):
                self.accident()
                fill(self._cache, layer, pages[chunk], keys[chunk])
                handoff.layer_ready(Segment(layer, first, len(pages[chunk])))
                await asyncio.sleep(0)
        handoff.finish(first_token(keys), None)

    async def _mailbox_loop(self) -> None:
        while True:
            inbound, message = await self._node.mesh.receive_as(self._decode)
            if isinstance(message, Cancel):
                self._intake.cancel(message.request_id, message.attempt)
                for key, task in self._tasks.items():
                    if key[0] == message.request_id and key[1] <= message.attempt:
                        task.cancel()
            else:
                self._sender.handle(inbound.sender.id, message)

    async def _renew_loop(self) -> None:
        while True:
            await asyncio.sleep(self._renew_seconds)
            await self._sender.renew()

    async def _keep_alive_loop(self) -> None:
        while True:
            await asyncio.sleep(self._lease_seconds / 4)
            await self._intake.renew()
            self.pool.check_integrity()
            self._node.registry.update_stats(
                {"kv_pages_in_use": self.pool.num_in_use, "kv_pages_total": self.pool.num_pages}
            )

    def _member_left(self, member: Member) -> None:
        if member.tier == "decode":
            self._sender.receiver_left(member.id)
