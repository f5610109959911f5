"""Both sides of the handoff joined by a network that repeats, loses, reorders and damages messages, by workers that
die, and by threads that write while all that goes on.

The first prefill worker's pages travel; the second one's are read in place, the third one's in staging memory (all of
these travel where workers have several ranks); the fourth one's are of the decode worker's own pool, where both cut
alike. All this happens to workers that cut KV alike and to workers that don't.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from headrace.engine.page_pool import OutOfPages, PagePool
from headrace.kvtransfer import admission as admission_module
from headrace.kvtransfer.admission import WINDOWS_IN_PLACE
from headrace.kvtransfer.base import Destination, Done, Source
from headrace.kvtransfer.handoff import Handoff, State
from headrace.kvtransfer.incoming import ReceivedRequest
from headrace.kvtransfer.landing import Landing
from headrace.kvtransfer.messages import Abort, Layout, Offer, OnDataLine, Pages, Renew, ToReceiver, TransportName
from headrace.kvtransfer.on_the_way import MAX_REPEATS, PATIENCE_SECONDS, Flight, Outgoing
from headrace.kvtransfer.receiver import LEASE_SECONDS, Receiver
from headrace.kvtransfer.segments import Segment
from headrace.kvtransfer.staging import Staging
from headrace.wire import Decoder, Message
from tests.kvtransfer.parts import (
    LAYOUT,
    NUM_LAYERS,
    PAGE_BYTES,
    PAGE_SIZE,
    BytesPayload,
    MemoryStore,
    cut,
    frame_of,
    make_offer,
)

DECODE_PAGES = 9
WINDOW = 4 * PAGE_BYTES
SENDERS = ("prefill-1", "prefill-2", "prefill-3", "prefill-4")
LOCAL = SENDERS[3]
FLIGHT = 6 * PAGE_BYTES
STAGING_BLOCKS = 5
Frame = tuple[bytes, bytes]
"""Header and payload on a data line."""
decode: Decoder[OnDataLine] = Decoder(OnDataLine)

any_request = st.sampled_from(["a", "b", "c"])
any_sender = st.sampled_from(SENDERS)
any_index = st.integers(0, 7)
prompts = st.tuples(st.sampled_from([0, 100]), st.integers(1, 5 * PAGE_SIZE)).map(lambda p: list(range(p[0], sum(p))))


def new_stores(layout: Layout, num_pages: int, staged: dict[int, bytes] | None = None) -> list[MemoryStore]:
    """The cache of each rank. A head of a token takes four bytes."""
    page_bytes = cut(layout, 0, 0, [1]).nbytes
    return [MemoryStore(num_pages, page_bytes, staged) for _ in range(layout.tensor_parallel_size)]


class Job:
    """A handoff and how far its prompt is computed. It has stores of its own: page i of the prompt is page i."""

    def __init__(
        self,
        layout: Layout,
        tokens: list[int],
        request_id: str,
        attempt: int,
        clock: Callable[[], float],
        staged: dict[int, bytes] | None = None,
    ) -> None:
        self.layout = layout
        self.staged = staged
        self.tokens = tokens
        self.num_pages = -(-len(tokens) // layout.page_size)
        self.computed = 0
        self.stores, pages = self.take_pages()
        self.handoff = Handoff(make_offer(tokens, request_id, attempt, layout), pages, self.stores[0], clock)

    def take_pages(self) -> tuple[list[MemoryStore], list[int]]:
        """Where the prompt's KV goes."""
        return new_stores(self.layout, self.num_pages, self.staged), list(range(self.num_pages))

    def free_pages(self) -> None:
        """Others have them now."""
        for store in self.stores:
            for pages in store.data:
                pages[:] = [b"?" * store.page_bytes] * self.num_pages

    def compute(self, count: int) -> None:
        """One prefill step over up to `count` pages."""
        end = min(self.computed + count, self.num_pages)
        for layer in range(NUM_LAYERS):
            for rank, store in enumerate(self.stores):
                pages = cut(self.layout, rank, layer, self.tokens)
                for index in range(self.computed, end):
                    store.data[layer][self.handoff.pages[index]] = pages[index].tobytes()
                if end > self.computed:
                    self.handoff.layer_ready(Segment(layer, self.computed, end - self.computed, rank=rank))
        self.computed = end
        if end == self.num_pages:
            self.handoff.finish(1, None)


class LocalJob(Job):
    """Its pages are the decode worker's, those of a known prefix among them."""

    def __init__(
        self,
        layout: Layout,
        tokens: list[int],
        request_id: str,
        attempt: int,
        clock: Callable[[], float],
        stores: list[MemoryStore],
        pool: PagePool,
    ) -> None:
        self.pool = pool
        self.shared_stores = stores
        super().__init__(layout, tokens, request_id, attempt, clock)

    def take_pages(self) -> tuple[list[MemoryStore], list[int]]:
        """Raises `OutOfPages`, taking none."""
        full = (len(self.tokens) - 1) // self.layout.page_size
        held = self.pool.match_prefix(self.pool.hashes(self.tokens)[:full])
        self.computed = len(held)
        try:
            return self.shared_stores, held + self.pool.allocate(self.num_pages - len(held))
        except OutOfPages:
            self.pool.release(held)
            raise

    def free_pages(self) -> None:
        """This worker needs them no more; the decode worker may."""
        self.pool.release(self.handoff.pages)


class InPlace:
    """A `Source`: the memory of one job."""

    def __init__(self, job: Job, store: MemoryStore) -> None:
        self.job = job
        self.store = store

    def memory(self) -> list[bytes]:
        """Its blocks."""
        return [page for pages in self.job.stores[0].data for page in pages]

    def copy(self, blocks: Sequence[int], layers: range, page_ids: Sequence[int], done: Done) -> None:
        """See `Source`."""
        memory = self.memory()
        places = [(layer, page) for layer in layers for page in page_ids]
        for block, (layer, page) in zip(blocks, places, strict=True):
            self.store.data[layer][page] = memory[block]
        done(None)

    def gather(self, row_bytes: int, rows: np.ndarray[Any, Any]) -> memoryview:
        """See `RowSource`."""
        memory = np.frombuffer(b"".join(self.memory()), np.uint8).reshape(-1, row_bytes)
        return memoryview(memory[rows].tobytes())


class InStaging(InPlace):
    """Another one: what a sender put there."""

    def memory(self) -> list[bytes]:
        """Its blocks."""
        return [self.job.stores[0].staged[block] for block in range(STAGING_BLOCKS)]


@dataclass
class Write:
    """A thread that is busy with one message."""

    landing: Landing
    message: OnDataLine
    destination: Destination
    pages: list[int]
    """All that it may write to."""
    content: bytes
    source: Source | None

    def write(self) -> None:
        """At last, reading only now what is read in place."""
        message = self.message
        layers = range(message.layer, message.layer + message.num_layers)
        if isinstance(message, Pages):
            each = message.num_pages * self.destination.page_bytes
            for index, layer in enumerate(layers):
                content = memoryview(self.content)[index * each : (index + 1) * each]
                self.destination.write(layer, message.first_page, message.num_pages, content)
        else:
            assert self.source is not None
            ends: list[Exception | None] = []
            self.destination.copy(self.source, layers, message.first_page, message.blocks, ends.append)
            assert ends == [None]


class Handoffs(RuleBasedStateMachine):
    """Two prefill workers, one decode worker, and everything that can go wrong between them."""

    layouts = (LAYOUT, LAYOUT)
    """Of the prefill workers, and of the decode worker."""

    def __init__(self) -> None:
        super().__init__()
        self.window = mock.patch.object(admission_module, "WINDOW_BYTES", WINDOW)
        self.window.start()
        self.from_layout, self.layout = self.layouts
        self.num_pages = DECODE_PAGES * PAGE_SIZE // self.layout.page_size
        self.pool = PagePool(self.num_pages, self.layout.page_size)
        self.stores = new_stores(self.layout, self.num_pages)
        self.now = 0.0
        self.jobs: dict[str, list[Job]] = {sender: [] for sender in SENDERS}
        self.to_receiver: dict[str, deque[ToReceiver]] = {sender: deque() for sender in SENDERS}
        self.on_lines: dict[str, list[Frame]] = {sender: [] for sender in SENDERS}
        self.writes: list[Write] = []
        self.flights = {sender: Flight(FLIGHT) for sender in SENDERS}
        self.staging = Staging(STAGING_BLOCKS)
        self.staged = dict.fromkeys(range(STAGING_BLOCKS), cut(self.from_layout, 0, 0, [1]).tobytes())
        self.to_sender: dict[str, deque[Message]] = {sender: deque() for sender in SENDERS}
        self.newest_attempt: dict[str, int] = {}
        self.decoding: list[ReceivedRequest] = []
        self.receiver = Receiver(
            self.layout,
            self.stores,
            self.pool,
            self.num_pages,
            lambda peer, message: self.to_sender[peer].append(message),
            self.on_received,
            self.clock,
            choice=self,
        )

    def clock(self) -> float:
        """Of both sides, in seconds."""
        return self.now

    def pages_here(self, sender: str, offer: Offer) -> list[int] | None:
        """See `Choice`."""
        if sender != LOCAL or self.from_layout != self.layout:
            return None
        jobs = [j for j in self.jobs[LOCAL] if j.handoff.key == (offer.request_id, offer.attempt)]
        return list(jobs[0].handoff.pages) if jobs else None

    def choose(self, sender: str, offer: Offer) -> tuple[TransportName, Source | None]:
        """See `Choice`."""
        if sender == SENDERS[0] or offer.layout.tensor_parallel_size > 1:
            return "tcp", None
        jobs = [j for j in self.jobs[sender] if j.handoff.key == (offer.request_id, offer.attempt)]
        source = InStaging if sender == SENDERS[2] else InPlace
        job = jobs[0] if jobs else Job(self.from_layout, [1], "gone", 0, self.clock, self.staged)
        return "shm", source(job, self.stores[0])

    def make_job(self, sender: str, tokens: list[int], request_id: str, attempt: int) -> Job:
        """A prompt of this sender. Raises `OutOfPages`."""
        if sender == LOCAL and self.from_layout == self.layout:
            return LocalJob(self.layout, tokens, request_id, attempt, self.clock, self.stores, self.pool)
        staged = self.staged if sender == SENDERS[2] else None
        return Job(self.from_layout, tokens, request_id, attempt, self.clock, staged)

    def offer(self, sender: str, job: Job) -> None:
        """To the only receiver."""
        staging = self.staging if sender == SENDERS[2] else None
        self.to_receiver[sender].append(job.handoff.offer_to("decode-1", self.flights[sender], staging))

    def forget(self, sender: str) -> None:
        """See `Choice`."""

    def on_received(self, request: ReceivedRequest) -> None:
        """What arrived is what was computed, whether it travelled now or was held."""
        self.assert_intact(request)
        self.decoding.append(request)

    def assert_intact(self, request: ReceivedRequest) -> None:
        """Every token of a decoding request has the KV that its prompt gives, on every rank."""
        tokens, page_size = request.offer.token_ids, self.layout.page_size
        for layer in range(NUM_LAYERS):
            for rank, store in enumerate(self.stores):
                for index, expected in enumerate(cut(self.layout, rank, layer, tokens)):
                    page = np.frombuffer(store.data[layer][request.pages[index]], np.uint32).reshape(expected.shape)
                    count = min(len(tokens) - index * page_size, page_size)
                    assert np.array_equal(page[..., :count], expected[..., :count])

    def job(self, sender: str, index: int) -> Job | None:
        """One of a sender's jobs."""
        jobs = self.jobs[sender]
        return jobs[index % len(jobs)] if jobs else None

    @rule(sender=any_sender, request=any_request, step=st.sampled_from([1, 1, 1, 0, -1]), tokens=prompts)
    def begin(self, sender: str, request: str, step: int, tokens: list[int]) -> None:
        """A new attempt, or a stale one, is offered."""
        attempt = max(self.newest_attempt.get(request, 0) + step, 0)
        self.newest_attempt[request] = max(attempt, self.newest_attempt.get(request, 0))
        if any(job.handoff.key == (request, attempt) for job in self.jobs[sender]):
            return
        try:
            job = self.make_job(sender, tokens, request, attempt)
        except OutOfPages:
            return
        self.jobs[sender].append(job)
        self.offer(sender, job)

    @rule(sender=any_sender, index=any_index)
    def offer_again(self, sender: str, index: int) -> None:
        """A refused handoff tries once more."""
        job = self.job(sender, index)
        if job and job.handoff.state is State.UNPLACED:
            self.offer(sender, job)

    @rule(sender=any_sender, index=any_index, count=st.integers(1, 3))
    def compute(self, sender: str, index: int, count: int) -> None:
        """A prefill step."""
        if (job := self.job(sender, index)) and job.computed < job.num_pages:
            job.compute(count)

    @rule(sender=any_sender, index=any_index)
    def send(self, sender: str, index: int) -> None:
        """All that may be sent goes into the lines."""
        job = self.job(sender, index)
        while job and (item := job.handoff.next_message()) is not None:
            if isinstance(item, Outgoing):
                self.on_lines[sender].append(frame_of(job.handoff, job.stores, item))
            else:
                self.to_receiver[sender].append(item)

    @rule(sender=any_sender, index=any_index, fate=st.sampled_from(["arrives"] * 12 + ["twice", "lost", "damaged"]))
    def data_line(self, sender: str, index: int, fate: str) -> None:
        """Some frame reaches the decode worker, or doesn't."""
        if not self.on_lines[sender]:
            return
        header, payload = self.on_lines[sender].pop(index % len(self.on_lines[sender]))
        if fate == "damaged":
            damaged = bytearray(header + payload)
            damaged[(index * 13) % len(damaged)] ^= 1 << index
            header, payload = bytes(damaged[: len(header)]), bytes(damaged[len(header) :])
        for _ in range({"lost": 0, "twice": 2}.get(fate, 1)):
            self.receiver.arrivals.on_frame(sender, header, BytesPayload(payload))

    @rule(sender=any_sender, index=any_index)
    def begin_write(self, sender: str, index: int) -> None:
        """A thread takes a frame and is slow."""
        if not self.on_lines[sender]:
            return
        header, payload = self.on_lines[sender].pop(index % len(self.on_lines[sender]))
        message = decode(header)
        arriving = self.receiver.arrivals._arriving.get((sender, message.request_id, message.attempt))
        if arriving is None or not arriving.landing.claim(message):
            return
        first_token = message.first_page * self.from_layout.page_size
        end_token = first_token + message.num_pages * self.from_layout.page_size
        pages = self.receiver._incoming[message.request_id, message.attempt].pages
        touched = pages[first_token // self.layout.page_size : -(-end_token // self.layout.page_size)]
        destination = arriving.destinations[message.part]
        self.writes.append(Write(arriving.landing, message, destination, touched, payload, arriving.source))

    @precondition(lambda self: self.writes)
    @rule(index=any_index)
    def end_write(self, index: int) -> None:
        """It is done at last. Whatever happened meanwhile, these pages are nobody else's."""
        write = self.writes.pop(index % len(self.writes))
        before = [[list(layer) for layer in store.data] for store in self.stores]
        write.write()
        changed = {
            page
            for store, old in zip(self.stores, before, strict=True)
            for layer, old_layer in zip(store.data, old, strict=True)
            for page in range(self.num_pages)
            if layer[page] != old_layer[page]
        }
        assert changed <= set(write.pages)
        assert not changed & {page for request in self.decoding for page in request.pages}
        assert all(self.pool._references[page] == 1 for page in changed)
        write.landing.written(write.message, None)

    @rule(sender=any_sender, fate=st.sampled_from(["arrives"] * 12 + ["twice", "lost"]))
    def line_to_receiver(self, sender: str, fate: str) -> None:
        """The head of the line reaches the decode worker, or doesn't."""
        if not self.to_receiver[sender] or fate == "lost":
            self.to_receiver[sender] = deque(list(self.to_receiver[sender])[1:])
            return
        message = self.to_receiver[sender].popleft()
        for _ in range(2 if fate == "twice" else 1):
            self.receiver.handle(sender, message)

    @rule(sender=any_sender, fate=st.sampled_from(["arrives"] * 12 + ["twice", "lost"]))
    def line_to_sender(self, sender: str, fate: str) -> None:
        """The head of the other line reaches the prefill worker, or doesn't."""
        if not self.to_sender[sender]:
            return
        message = self.to_sender[sender].popleft()
        for job in self.jobs[sender]:
            if job.handoff.receiver and job.handoff.key == (message.request_id, message.attempt):  # type: ignore[attr-defined]
                for _ in range({"lost": 0, "twice": 2}.get(fate, 1)):
                    job.handoff.handle(message)  # type: ignore[arg-type]
        for job in [j for j in self.jobs[sender] if j.handoff.state in (State.DONE, State.FAILED)]:
            if job.handoff.receiver_is_done:
                job.free_pages()
                self.jobs[sender].remove(job)

    @rule(sender=any_sender, count=st.integers(1, 5), rounds=st.integers(1, 8))
    def flow(self, sender: str, count: int, rounds: int) -> None:
        """Everything goes well for a while."""
        for _ in range(rounds):
            for index in range(len(self.jobs[sender])):
                self.compute(sender, index, count)
                self.send(sender, index)
            while self.to_receiver[sender]:
                self.line_to_receiver(sender, "arrives")
            while self.on_lines[sender]:
                self.data_line(sender, count, "arrives")
            while self.writes:
                self.end_write(count)
            while self.to_sender[sender]:
                self.line_to_sender(sender, "arrives")

    @rule(sender=any_sender, index=any_index)
    def give_up(self, sender: str, index: int) -> None:
        """A prefill worker abandons one handoff and says so."""
        if job := self.job(sender, index):
            request_id, attempt = job.handoff.key
            job.handoff.fail("given up")
            if not job.handoff.receiver_is_done:
                abort = Abort(request_id=request_id, attempt=attempt, cause="sender_failed")
                self.to_receiver[sender].append(abort)
            else:
                job.free_pages()
                self.jobs[sender].remove(job)

    @rule(sender=any_sender)
    def die(self, sender: str) -> None:
        """A prefill worker is gone with all that it had on the way."""
        for job in self.jobs[sender]:
            job.free_pages()
        self.jobs[sender] = []
        self.to_receiver[sender].clear()
        self.on_lines[sender].clear()
        self.to_sender[sender].clear()
        self.flights[sender] = Flight(FLIGHT)
        if sender == SENDERS[2]:
            self.staging = Staging(STAGING_BLOCKS)
        self.receiver.sender_left(sender)
        assert all(incoming.sender != sender for incoming in self.receiver._incoming.values())

    @rule(sender=any_sender)
    def renew(self, sender: str) -> None:
        """A prefill worker says which handoffs it still wants."""
        handoffs = []
        for job in self.jobs[sender]:
            match renewal := job.handoff.renewal():
                case None:
                    pass
                case tuple():
                    handoffs.append(renewal)
                case _:
                    self.to_receiver[sender].append(renewal)
        self.to_receiver[sender].append(Renew(handoffs=handoffs))

    @rule(sender=any_sender)
    def ask(self, sender: str) -> None:
        """Prefill workers' patience ends where something is overdue."""
        for job in self.jobs[sender]:
            if job.handoff.seconds_until_overdue() == 0:
                self.to_receiver[sender].extend(job.handoff.ask())

    @rule(seconds=st.sampled_from([1.0, LEASE_SECONDS / 2, LEASE_SECONDS + 1]))
    def time_passes(self, seconds: float) -> None:
        """Leases run out."""
        self.now += seconds
        self.receiver.reap()

    @rule(request=any_request)
    def cancel(self, request: str) -> None:
        """The client went away."""
        self.receiver.cancel(request, self.newest_attempt.get(request, 0))

    @precondition(lambda self: self.decoding)
    @rule(index=any_index)
    def end_decoding(self, index: int) -> None:
        """A request ends: its pages were untouched to the last, and others may have them."""
        request = self.decoding.pop(index % len(self.decoding))
        self.assert_intact(request)
        self.pool.release(request.pages)
        self.receiver.grant_waiting()

    @invariant()
    def pages_are_conserved(self) -> None:
        """No page is lost, held twice, or held by what waits."""
        self.pool.check_integrity()
        self.receiver.check_integrity()

    @invariant()
    def the_window_is_respected(self) -> None:
        """No more is on the way than was granted."""
        for job in (job for jobs in self.jobs.values() for job in jobs):
            sizes = [sent.size for sent in job.handoff._on_the_way.sent]
            window = WINDOW if job.handoff.transport == "tcp" else WINDOWS_IN_PLACE * WINDOW
            assert sum(sizes) <= window or len(sizes) == 1
        for sender, jobs in self.jobs.items():
            sizes = [sent.size for job in jobs for sent in job.handoff._on_the_way.sent]
            assert sum(sizes) == self.flights[sender].size
            assert sum(sizes) <= FLIGHT or len(sizes) == 1

    @invariant()
    def staging_memory_is_conserved(self) -> None:
        """What is not free is on the way."""
        self.staging.check_integrity()
        taken = 0
        for job in self.jobs[SENDERS[2]]:
            on_the_way = {sent.outgoing.sequence for sent in job.handoff._on_the_way.sent}
            assert set(job.handoff._staged) == (on_the_way if job.handoff.transport == "shm" else set())
            taken += sum(len(staged.blocks) for staged in job.handoff._staged.values())
        assert self.staging.num_free == STAGING_BLOCKS - taken

    def end_leases(self) -> None:
        """All of them; the first look of the reaper finds what has landed since its last one."""
        for _ in range(2):
            self.now += 2 * LEASE_SECONDS
            self.receiver.reap()

    def teardown(self) -> None:
        """After all leases have ended and all requests too, every page is free."""
        self.window.stop()
        while self.writes:
            self.end_write(0)
        for job in self.jobs[LOCAL]:
            job.free_pages()
        self.end_leases()
        while self.receiver.num_waiting or self.decoding:
            while self.decoding:
                self.end_decoding(0)
            self.end_leases()
        assert (self.receiver.num_open, self.pool.num_in_use) == (0, 0)
        self.pool.check_integrity()


def layout(kv_heads: int, ranks: int, page_size: int) -> Layout:
    """One worker's way to cut."""
    return msgspec.structs.replace(LAYOUT, kv_heads=kv_heads, tensor_parallel_size=ranks, page_size=page_size)


class OtherPages(Handoffs):
    """Of the same ranks: no page ends where another does."""

    layouts = (layout(1, 1, 3), layout(1, 1, 2))


class OneToTwo(Handoffs):
    """Heads are halved, pages doubled."""

    layouts = (layout(2, 1, 2), layout(2, 2, 4))


class TwoToOne(Handoffs):
    """Each page comes from two ranks, and is cut in two."""

    layouts = (layout(2, 2, 4), layout(2, 1, 2))


class TwoToFour(Handoffs):
    """Four ranks share two heads; no page ends where another does."""

    layouts = (layout(2, 2, 3), layout(2, 4, 2))


class TwoToTwo(Handoffs):
    """Only the number of caches is new."""

    layouts = (layout(2, 2, 4), layout(2, 2, 4))


class OneHead(Handoffs):
    """Both ranks need all of each page."""

    layouts = (layout(1, 1, 4), layout(1, 2, 4))


MACHINES = (Handoffs, OtherPages, OneToTwo, TwoToOne, TwoToFour, TwoToTwo, OneHead)
TestHandoffs, TestOtherPages, TestOneToTwo, TestTwoToOne, TestTwoToFour, TestTwoToTwo, TestOneHead = (
    machine.TestCase for machine in MACHINES
)
TestHandoffs.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
for machine_type in MACHINES[1:]:
    machine_type.TestCase.settings = settings(max_examples=25, stateful_step_count=60, deadline=None)


@pytest.mark.parametrize("machine_type", MACHINES)
def test_a_quiet_network_delivers_everything_whatever_the_steps(machine_type: type[Handoffs]) -> None:
    """Without accidents every prompt arrives, large steps after small ones among them, within the window."""
    machine = machine_type()
    for number, steps in enumerate([[1, 4], [5], [1, 1, 1, 1, 1], [2, 3]]):
        sender = SENDERS[number % len(SENDERS)]
        machine.begin(sender, "abcd"[number], 1, [number * 50 + token for token in range(5 * PAGE_SIZE)])
        for step in [*steps, *[1] * 60]:
            machine.flow(sender, step, 1)
        assert [request.offer.request_id for request in machine.decoding] == ["abcd"[number]]
        machine.end_decoding(0)
    machine.teardown()


@pytest.mark.parametrize("machine_type", MACHINES)
@settings(max_examples=25, deadline=None)
@given(
    lost=st.lists(st.booleans(), max_size=20).filter(lambda lost: sum(lost) <= MAX_REPEATS),
    tokens=st.integers(1, 5 * PAGE_SIZE),
)
def test_lost_pages_are_sent_again_long_before_the_lease_ends(
    machine_type: type[Handoffs], lost: list[bool], tokens: int
) -> None:
    """Whichever frames are lost, second ones among them, the prompt arrives in its first attempt."""
    machine = machine_type()
    fates = iter(lost)
    for sender in SENDERS:
        machine.begin(sender, sender[-1], 1, list(range(tokens)))
        for _ in range(60):
            machine.compute(sender, 0, 2)
            machine.send(sender, 0)
            machine.ask(sender)
            while machine.to_receiver[sender]:
                machine.line_to_receiver(sender, "arrives")
            while machine.on_lines[sender]:
                machine.data_line(sender, 0, "lost" if next(fates, False) else "arrives")
            while machine.to_sender[sender]:
                machine.line_to_sender(sender, "arrives")
            machine.now += PATIENCE_SECONDS / 2
        assert [request.offer.request_id for request in machine.decoding] == [sender[-1]]
        machine.end_decoding(0)
    machine.teardown()
