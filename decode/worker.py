"""The decode worker: receive, schedule, run, publish."""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Awaitable
from concurrent.futures import ThreadPoolExecutor

from headrace.data_line import Listener
from headrace.data_lines import identify_by
from headrace.decode.scheduler import DecodeScheduler, Plan
from headrace.decode.sequence import Key, Sequence
from headrace.engine.decode_batch import RunningBatch, new_batch
from headrace.engine.engine import Engine
from headrace.engine.sampler import SampledToken
from headrace.kvtransfer.messages import Layout, ToReceiver
from headrace.kvtransfer.receiver import ReceivedRequest, Receiver
from headrace.kvtransfer.transports import Transports
from headrace.mesh import PeerGone
from headrace.messages.control import Cancel
from headrace.messages.stream import FailureCode, RequestFailed, TokenBatch, TokenEvent, TokenLogprobs
from headrace.node import Node
from headrace.registry import Member
from headrace.tasks import end_task
from headrace.wire import Decoder, Message

log = logging.getLogger(__name__)

REAP_SECONDS = 1.0


class DecodeWorker:
    """Runs all requests whose prompts have been handed over, one step at a time."""

    def __init__(
        self,
        node: Node,
        engine: Engine,
        device_thread: ThreadPoolExecutor,
        layout: Layout,
        max_num_seqs: int,
        listener: Listener,
    ) -> None:
        self._node = node
        self._engine = engine
        self._device_thread = device_thread
        self._batch: RunningBatch[Key] | None = None
        """Made and used on the device thread alone, see `_run_step`."""
        self._scheduler = DecodeScheduler(engine.pool, max_num_seqs)
        self._receiver = Receiver(
            layout,
            [engine.cache],
            engine.pool,
            engine.pool.num_pages,
            self._post,
            self._start_decoding,
            choice=Transports(layout, engine.cache, node.mesh.refuse_from),
            call_soon=asyncio.get_running_loop().call_soon_threadsafe,
            refuse=node.mesh.refuse_from,
        )
        self._listener = listener
        self._outbox: dict[str, list[TokenEvent]] = defaultdict(list)
        self._work = asyncio.Event()
        self._idle = asyncio.Event()
        self._decode: Decoder[ToReceiver | Cancel] = Decoder(ToReceiver | Cancel)
        node.registry.on_leave.append(self._member_left)

    async def run(self, stopped: Awaitable[None], drain_timeout: float) -> None:
        """Serve until `stopped` is done, then finish what is held (for `drain_timeout` seconds at most)."""
        self._publish_stats()
        self._listener.start(
            self._receiver.arrivals.on_frame, identify_by(self._node.mesh), self._node.mesh.refuse_from
        )
        async with asyncio.TaskGroup() as group:
            loops = [group.create_task(loop) for loop in (self._mailbox_loop(), self._reap_loop())]
            stepping = group.create_task(self._step_loop())
            await stopped
            self._node.registry.drain()
            self._receiver.stopping = True
            try:
                async with asyncio.timeout(drain_timeout):
                    await self._until_idle()
            except TimeoutError:
                log.warning("giving up %d requests that did not end in time", len(self._scheduler.sequences()))
            await asyncio.gather(*[end_task(task) for task in [*loops, stepping]])
            for sequence in self._scheduler.sequences():
                self._fail(sequence, "worker_stopping", "the decode worker was stopped")

    async def _until_idle(self) -> None:
        while self._scheduler.has_work or self._receiver.num_open:
            self._idle.clear()
            await self._idle.wait()

    async def _step_loop(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._work.wait()
            plan = self._scheduler.schedule()
            if plan is not None:
                for sequence in plan.preempted:
                    self._fail(sequence, "preempted", "the KV cache was full; the request is computed again")
                if self._scheduler.num_running:
                    self._scheduler.started()
            try:
                tokens = await loop.run_in_executor(self._device_thread, self._run_step, plan)
            except Exception:
                log.exception("a decode step failed, giving its requests up")
                self._give_up_running()
            else:
                self._apply(tokens)
            self._publish()

    def _give_up_running(self) -> None:
        for sequence in self._scheduler.sequences():
            self._fail(sequence, "worker_error", "a decode step failed")
            self._scheduler.remove(sequence.key)
        self._scheduler.abandon_steps()
        self._scheduler.schedule()
        self._batch = None

    def _run_step(self, plan: Plan | None) -> list[tuple[Key, SampledToken]] | None:
        """On the device's own thread: start the planned step, then collect the oldest one, if it is due.

        No other thread may run a parallel operation of torch: libgomp would see more threads than cores and, for ever
        after, let those that wait sleep at once, and a step would take half as long again.
        """
        if self._batch is None:
            self._batch = new_batch(self._engine)
        batch = self._batch
        if plan is None:
            return batch.collect()
        for key in plan.leaves:
            batch.leave(key)
        for key, pages in plan.new_pages.items():
            batch.add_pages(key, pages)
        for sequence in plan.joins:
            batch.join(sequence.key, sequence.token_ids, sequence.generated, sequence.pages, sequence.offer.sampling)
        if len(batch):
            batch.start()
        due = batch.in_flight > (batch.lookahead if len(batch) else 0)
        return batch.collect() if due else None

    def _apply(self, tokens: list[tuple[Key, SampledToken]] | None) -> None:
        if tokens is None:
            return
        self._scheduler.collected()
        for key, token in tokens:
            sequence = self._scheduler.running(key)
            if sequence is not None:  # or it ended while this step ran
                sequence.in_flight -= 1
                self._add_token(sequence, token.token_id, token.logprobs)

    def _add_token(self, sequence: Sequence, token_id: int, logprobs: TokenLogprobs | None) -> bool:
        """Take one more token of a request and queue it for its gateway. Returns whether the request goes on."""
        sequence.append(token_id)
        reason = sequence.finish_reason(self._engine.max_model_len)
        event = TokenEvent(
            request_id=sequence.offer.request_id,
            attempt=sequence.offer.attempt,
            position=sequence.generated - 1,
            token_ids=[token_id],
            logprobs=[logprobs] if logprobs is not None else None,
            finish_reason=reason,
        )
        self._outbox[sequence.offer.gateway].append(event)
        if reason is not None:
            self._scheduler.remove(sequence.key)
        return reason is None

    def _start_decoding(self, received: ReceivedRequest) -> None:
        """The receiver's hand-over: the first token is on its way to the client before any step runs."""
        offer = received.offer
        sequence = Sequence(offer, list(offer.token_ids), received.pages, offer.generated)
        self._scheduler.add(sequence)
        if self._add_token(sequence, received.commit.token_id, received.commit.logprobs):
            self._work.set()
        self._publish()

    def _publish(self) -> None:
        """Send what the outbox holds, free pages for those who wait, and rest if nothing is left to do."""
        for gateway, events in self._outbox.items():
            self._post(gateway, TokenBatch(events=events))
        self._outbox.clear()
        self._receiver.reserve_pages = self._scheduler.num_running
        self._receiver.grant_waiting()
        if not self._scheduler.has_work:
            self._work.clear()
            self._engine.cpu_share.rest()
            self._idle.set()
        self._publish_stats()

    def _post(self, peer: str, message: Message) -> None:
        try:
            self._node.mesh.post(peer, message)
        except PeerGone as error:
            log.debug("not sent: %s", error)  # the registry will say so too, and what it held is freed then

    def _fail(self, sequence: Sequence, code: FailureCode, message: str) -> None:
        request_id, attempt = sequence.key
        failed = RequestFailed(request_id=request_id, attempt=attempt, code=code, message=message, retryable=True)
        self._post(sequence.offer.gateway, failed)

    def _cancel(self, keys: list[Key]) -> None:
        for key in keys:
            self._scheduler.remove(key)
        self._work.set()

    async def _mailbox_loop(self) -> None:
        while True:
            inbound, message = await self._node.mesh.receive_as(self._decode)
            match message, inbound.sender.tier:
                case Cancel(), "gateway":
                    self._receiver.cancel(message.request_id, message.attempt)
                    held = [sequence.key for sequence in self._scheduler.sequences()]
                    self._cancel([key for key in held if key[0] == message.request_id and key[1] <= message.attempt])
                case Cancel(), _:
                    self._node.mesh.refuse(inbound.sender, "only a gateway may cancel")
                case _, "prefill":
                    self._receiver.handle(inbound.sender.id, message)
                case _:
                    self._node.mesh.refuse(inbound.sender, "only a prefill worker hands over")

    async def _reap_loop(self) -> None:
        while True:
            await asyncio.sleep(REAP_SECONDS)
            self._receiver.reap()
            self._idle.set()
            self._publish_stats()

    def _member_left(self, member: Member) -> None:
        if member.tier == "prefill":
            self._listener.drop(member.id)
            self._receiver.sender_left(member.id)
        elif member.tier == "gateway":
            self._receiver.cancel_gateway(member.id)
            self._cancel([s.key for s in self._scheduler.sequences() if s.offer.gateway == member.id])

    def _publish_stats(self) -> None:
        pool = self._engine.pool
        stats: dict[str, float] = {
            "kv_pages_in_use": pool.num_in_use,
            "kv_pages_total": pool.num_pages,
            "kv_page_tokens": pool.page_size,
            "requests_waiting": self._receiver.num_open + self._scheduler.num_ready,
            "requests_running": self._scheduler.num_running,
            "handoff_recomputed_total": 0,
            "messages_refused_total": self._node.mesh.refused,
        }
        stats |= {f"handoff_aborts_{cause}_total": count for cause, count in self._receiver.aborts.items()}
        self._node.registry.update_stats(stats)
