"""The decode worker: receive, schedule, run, publish."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable
from dataclasses import replace

from headrace.data_line import Listener
from headrace.data_lines import identify_by
from headrace.decode.in_place import InPlacePrompts
from headrace.decode.mover import Mover
from headrace.decode.output import Output
from headrace.decode.scheduler import DecodeScheduler
from headrace.decode.sequence import Sequence, repeat_tokens
from headrace.decode.speculator import Speculator
from headrace.decode.step import Alongside
from headrace.decode.step_runner import StepRunner
from headrace.engine.device_thread import DeviceThread
from headrace.engine.engine import Engine
from headrace.farewell import Farewell
from headrace.kvtransfer.departures import LineDepartures, Lines
from headrace.kvtransfer.incoming import OwnPrompt, ReceivedRequest
from headrace.kvtransfer.messages import Abort, Commit, Layout, Offer, Renew, ToReceiver, ToSender, WireDtype
from headrace.kvtransfer.nixl import NixlEndpoint
from headrace.kvtransfer.placement import Placement
from headrace.kvtransfer.receiver import Receiver
from headrace.kvtransfer.sender import Sender
from headrace.kvtransfer.transports import Beside, Transports, Wanted, exports_of
from headrace.mesh import PeerGone
from headrace.messages.control import Cancel, Flushed, Repeat
from headrace.messages.stream import Moved, RequestFailed, TokenBatch
from headrace.node import Node
from headrace.registry import Member
from headrace.tasks import end_task
from headrace.wire import Decoder, Message

log = logging.getLogger(__name__)

Inbound = ToReceiver | ToSender | Cancel | Flushed | Repeat
REAP_SECONDS = 1.0
STATS_SECONDS = 0.1
"""Between two looks at the figures while steps run."""
READY_PART = 8
"""One in so many of the places is taken by a request that waits for one: the next is ready when a place comes free,
and none has a first token and no second one for long."""


class DecodeWorker:
    """Runs all requests whose prompts have been handed over, one step at a time."""

    def __init__(
        self,
        node: Node,
        engine: Engine,
        device_thread: DeviceThread,
        layout: Layout,
        max_num_seqs: int,
        listener: Listener,
        lines: Lines,
        wire_dtype: WireDtype = "auto",
        speculator: Speculator | None = None,
        beside: Beside | None = None,
        alongside: Alongside | None = None,
        most_prompt_tokens: int = 0,
        nixl: NixlEndpoint | None = None,
        transport: Wanted = "auto",
    ) -> None:
        """`most_prompt_tokens`: of a pass of prompts that this worker computes itself; 0: it computes none."""
        call_soon = asyncio.get_running_loop().call_soon_threadsafe
        self._node = node
        self._engine = engine
        self._max_num_seqs = max_num_seqs
        self._scheduler = DecodeScheduler(engine.pool, max_num_seqs)
        self._output = Output(self._scheduler, self._post, node.telemetry)
        self._most_held = max_num_seqs + max(max_num_seqs // READY_PART, 1)
        self._speculator = speculator
        self._steps = StepRunner(
            engine, device_thread, self._scheduler, self._output, speculator, alongside, node.telemetry, max_num_seqs
        )
        self.receiver = Receiver(
            layout,
            [engine.cache],
            engine.pool,
            engine.pool.num_pages,
            self._post,
            self._start_decoding,
            choice=Transports(layout, engine.cache, node.mesh.refuse_from, beside, nixl, transport),
            call_soon=call_soon,
            refuse=node.mesh.refuse_from,
            on_prompt=self._start_computing,
            most_prompt_tokens=most_prompt_tokens,
        )
        self._prompts = InPlacePrompts(engine, device_thread, most_prompt_tokens)
        self._listener = listener
        departures = LineDepartures([engine.cache], layout.dtype, lines, call_soon)
        # where there is one beside, the staging memory is its
        exports, staging = exports_of(engine.cache, nixl), engine.cache.staging_blocks
        if beside is not None and staging:
            exports, staging = replace(exports, shm=None), 0
        self._sender = Sender(node.mesh.send, departures, staging)
        self._mover = Mover(
            self._scheduler,
            engine.pool,
            engine.cache,
            layout,
            exports,
            wire_dtype,
            self._sender,
            Placement(node.registry),
            self._moved,
            self._wake,
        )
        self._farewell = Farewell(node)
        self._moved_here = 0
        engine.pool.on_freed.append(self._pages_came_free)
        self._stats_at = 0.0
        self._work = asyncio.Event()
        self._idle = asyncio.Event()
        self._decode: Decoder[Inbound] = Decoder(Inbound)
        node.registry.on_leave.append(self._member_left)

    async def run(self, stopped: Awaitable[None], drain_timeout: float) -> None:
        """Serve until `stopped` is done, then hand over what is held, or finish it where nobody takes it.

        What is left after `drain_timeout` seconds is given up, to be computed again elsewhere.
        """
        self._publish_stats()
        self._listener.start(self.receiver.arrivals.on_frame, identify_by(self._node.mesh), self._node.mesh.refuse_from)
        async with asyncio.TaskGroup() as group:
            loops = [group.create_task(loop) for loop in (self._mailbox_loop(), self._reap_loop())]
            stepping = group.create_task(self._step_loop())
            await stopped
            self._node.registry.drain()
            self.receiver.stop()
            self._mover.is_active = True
            try:
                async with asyncio.timeout(drain_timeout):
                    await self._until_idle()
            except TimeoutError:
                log.warning("giving up requests that did not end in time: they are computed again")
            await self._mover.stop()
            await end_task(stepping)
            self._output.publish()
            self.receiver.give_up()  # or it would hand over what nobody runs
            for sequence in self._scheduler.sequences():
                self._output.fail(sequence, "worker_stopping", "the decode worker was stopped")
            self._scheduler.abandon_steps()
            await self._farewell.say()
            await asyncio.gather(*[end_task(task) for task in loops])

    async def _until_idle(self) -> None:
        while self._scheduler.has_work or self.receiver.num_open or self._mover.num_open:
            self._idle.clear()
            await self._idle.wait()

    async def _step_loop(self) -> None:
        while True:
            await self._work.wait()
            if self._prompts:
                await self._prompts.run_pass()
            if self._scheduler.has_work:
                await self._steps.run_one(self._publish)
                if self._mover.num_open:  # another worker's tokens must not be there before these
                    self._publish()
                self._mover.after_step()
            if self._prompts or not self._scheduler.has_work:
                self._publish()
                self._rest()

    def _start_decoding(self, received: ReceivedRequest) -> None:
        """The receiver's hand-over: the first token goes to the client before any step runs."""
        offer = received.offer
        matcher = self._engine.grammars.matcher(offer.sampling)
        sequence = Sequence(offer, received.token_ids, received.pages, self._engine.max_model_len, matcher)
        self._moved_here += offer.coming > 0
        self._scheduler.add(sequence)
        self._output.take_first(sequence, received.commit)
        self._wake()
        self._publish()

    def join(self, sender: str, commit: Commit) -> None:
        """Take a request of the prefill worker beside into the next step, which computes its last prompt token."""
        self.receiver.handle(sender, commit)

    def _start_computing(self, prompt: OwnPrompt) -> None:
        self._prompts.add(prompt)
        self._wake()

    def _wake(self) -> None:
        if self._scheduler.has_work or self._prompts:
            self._work.set()
        self._idle.set()

    def _moved(self, sequence: Sequence, receiver: str) -> None:
        request_id, attempt = sequence.key
        self._post(sequence.gateway, Moved(request_id=request_id, attempt=attempt, decode_worker=receiver))

    def _publish(self) -> None:
        """Send the tokens that there are, free pages for those who wait, and tell of figures now and then."""
        self._output.publish()
        self._grant()
        if time.monotonic() - self._stats_at > STATS_SECONDS:
            self._publish_stats()

    def _rest(self) -> None:
        """If nothing is left to do."""
        if not self._scheduler.has_work and not self._prompts:
            self._work.clear()
            self._engine.cpu_share.rest()
            self._steps.gauge.rest()
            self._idle.set()
            self._publish_stats()

    def _grant(self) -> None:
        """Free pages for those who wait, but for one that each running request may grow into.

        Who computes prompts in the same pool leaves alone what the first of those needs, too.
        """
        self.receiver.room.reserve_pages = self._scheduler.num_running
        self.receiver.room.seats = self._max_num_seqs - self._scheduler.num_running - self._scheduler.num_ready
        self.receiver.room.places = self._most_held - self._scheduler.num_running - self._scheduler.num_ready
        self.receiver.grant_waiting()
        self._engine.pool.reserve(self._scheduler.num_running + self.receiver.pages_wanted)

    def _pages_came_free(self) -> None:
        if self.receiver.num_waiting:
            asyncio.get_running_loop().call_soon(self._grant)

    def _post(self, peer: str, message: Message) -> None:
        try:
            self._node.mesh.post(peer, message)
        except PeerGone as error:
            log.debug("not sent: %s", error)  # the registry will say so too, and what it held is freed then

    def _cancel(self, sequences: list[Sequence]) -> None:
        for sequence in sequences:
            self._mover.cancel(sequence.key)
            self._output.cancel(sequence)
        self._work.set()

    async def _mailbox_loop(self) -> None:
        while True:
            inbound, message = await self._node.mesh.receive_as(self._decode)
            match message, inbound.sender.tier:
                case Cancel(), "gateway":
                    self.receiver.cancel(message.request_id, message.attempt)
                    held = self._sequences()
                    self._cancel([s for s in held if s.key[0] == message.request_id and s.key[1] <= message.attempt])
                case Flushed(), "gateway":
                    self._farewell.answered(inbound.sender.id)
                case Repeat(), "gateway":
                    self._post(inbound.sender.id, self._repeated(message))
                case ((Cancel() | Flushed() | Repeat()), _):
                    self._node.mesh.refuse(
                        inbound.sender, "only a gateway may cancel, ask for tokens or say what it has taken"
                    )
                case ((Offer() | Commit() | Renew() | Abort()), "prefill"):
                    self._received(inbound.sender.id, message)
                case _, "decode":
                    self._from_peer(inbound.sender.id, message)
                case _:
                    self._node.mesh.refuse(inbound.sender, "only workers hand over")

    def _from_peer(self, sender: str, message: ToReceiver | ToSender) -> None:
        """Another decode worker hands over to this one, or this one to it: never both, of one request."""
        if isinstance(message, Offer | Commit | Renew) or (
            isinstance(message, Abort) and not self._sender.is_open(message.request_id, message.attempt)
        ):
            self._received(sender, message)
        else:
            self._sender.handle(sender, message)

    def _received(self, sender: str, message: ToReceiver) -> None:
        if isinstance(message, Offer) and message.sampling.grammar is not None:
            grammars = self._engine.grammars  # it is compiled while the pages travel
            asyncio.get_running_loop().run_in_executor(None, grammars.prepare, message.sampling.grammar)
        self.receiver.handle(sender, message)

    def _sequences(self) -> list[Sequence]:
        """All requests held."""
        return [*self._scheduler.sequences(), *self._mover.sequences()]

    def _repeated(self, wanted: Repeat) -> TokenBatch | RequestFailed:
        key = wanted.request_id, wanted.attempt
        held = [sequence for sequence in self._sequences() if sequence.key == key]
        if held and (events := repeat_tokens(held[0], wanted.position)) is not None:
            return TokenBatch(events=events)
        self._cancel(held)
        return RequestFailed(
            request_id=wanted.request_id,
            attempt=wanted.attempt,
            code="worker_error",
            message="tokens were lost on the way and can't be repeated",
            retryable=True,
        )

    async def _reap_loop(self) -> None:
        while True:
            await asyncio.sleep(REAP_SECONDS)
            self.receiver.reap()
            if self._sender.num_open:
                await self._sender.renew()
            self._expire()
            self._grant()
            self._idle.set()
            self._publish_stats()

    def _expire(self) -> None:
        """Let go of what nobody waits for any more, also where its gateway can't say so."""
        now = time.time()
        for sequence in [sequence for sequence in self._scheduler.sequences() if sequence.offer.deadline < now]:
            self._mover.cancel(sequence.key)
            message = "the request's deadline passed before its last token"
            self._output.fail(sequence, "deadline", message, retryable=False)
            self._work.set()

    def _member_left(self, member: Member) -> None:
        if member.tier == "gateway":
            self.receiver.cancel_gateway(member.id)
            self._cancel([sequence for sequence in self._sequences() if sequence.gateway == member.id])
            self._farewell.answered(member.id)
        else:
            self._listener.drop(member.id)
            self.receiver.sender_left(member.id)
            self._sender.receiver_left(member.id)

    def _publish_stats(self) -> None:
        self._stats_at = time.monotonic()
        pool = self._engine.pool
        stats: dict[str, float] = {
            "kv_pages_in_use": pool.num_in_use,
            "kv_pages_total": pool.num_pages,
            "kv_page_tokens": pool.page_size,
            "max_num_seqs": self._max_num_seqs,
            "requests_waiting": self.receiver.num_open + self._scheduler.num_ready,
            "requests_running": self._scheduler.num_running,
            "handoff_recomputed_total": 0,
            "handoff_moved_here_total": self._moved_here,
            "messages_refused_total": self._node.mesh.refused,
        }
        stats |= self._steps.gauge.stats() | self._prompts.figures()
        stats |= {f"handoff_aborts_{cause}_total": count for cause, count in self.receiver.aborts.items()}
        if self._speculator is not None:
            stats |= self._speculator.stats()
        stats |= self._node.telemetry.stats()
        self._node.registry.update_stats(stats)
