"""Every row of the table in `headrace.kvtransfer.staging`, and handoffs that share staging memory."""

from __future__ import annotations

import asyncio

import pytest

from headrace.kvtransfer.handoff import Handoff
from headrace.kvtransfer.messages import Abort, Ack, Commit, Credit, Grant, PagesInPlace
from headrace.kvtransfer.on_the_way import Flight, Outgoing
from headrace.kvtransfer.segments import Segment
from headrace.kvtransfer.sender import Sender
from headrace.kvtransfer.staging import Staging
from headrace.wire import Decoder, Message
from tests.kvtransfer.parts import NUM_LAYERS, PAGE_BYTES, PAGE_SIZE, MemoryStore, frame_of, make_offer

PAGES = 2
WINDOW = 4 * PAGES * PAGE_BYTES
"""So a message has one layer."""
decode: Decoder[PagesInPlace] = Decoder(PagesInPlace)


@pytest.fixture
def staging() -> Staging:
    """Room for two messages of two pages, and one block more."""
    return Staging(5)


def test_blocks_are_taken_until_none_are_left_and_come_back(staging: Staging) -> None:
    """(free), TAKEN, FILLING, FILLED, GONE; what was free longest goes first."""
    first, second = staging.take(2), staging.take(2)
    assert first is not None
    assert second is not None
    assert (first.blocks, second.blocks) == ([0, 1], [2, 3])
    assert staging.take(2) is None
    assert first.begin()
    first.end()
    assert staging.num_free == 1
    first.let_go()
    third = staging.take(3)
    assert third is not None
    assert third.blocks == [4, 0, 1]


def test_what_is_let_go_before_it_was_filled_is_not_filled(staging: Staging) -> None:
    """TAKEN to GONE: the blocks may be another message's already."""
    staged = staging.take(5)
    assert staged is not None
    staged.let_go()
    assert staging.num_free == 5
    assert not staged.begin()
    staged.let_go()
    staging.check_integrity()
    assert staging.num_free == 5


def test_what_is_let_go_while_a_thread_fills_it_is_free_when_that_ends(staging: Staging) -> None:
    """FILLING to LEFT to GONE."""
    staged = staging.take(5)
    assert staged is not None
    assert staged.begin()
    staged.let_go()
    assert staging.take(1) is None
    staged.end()
    assert staging.num_free == 5
    assert not staged.begin()
    staging.check_integrity()


def granted(request_id: str, staging: Staging) -> tuple[Handoff, MemoryStore]:
    """A handoff of two pages by `shm`, all of whose layers are computed."""
    store = MemoryStore(PAGES)
    for layer in range(NUM_LAYERS):
        store.data[layer] = [f"{request_id} {layer} {page}".encode().ljust(32) for page in range(PAGES)]
    handoff = Handoff(make_offer(range(PAGES * PAGE_SIZE), request_id), list(range(PAGES)), store)
    handoff.offer_to("decode-1", Flight(2**30), staging)
    handoff.handle(Grant(request_id=request_id, attempt=0, held_pages=0, window_bytes=WINDOW, transport="shm"))
    for layer in range(NUM_LAYERS):
        handoff.layer_ready(Segment(layer, 0, PAGES))
    handoff.finish(1, None)
    return handoff, store


def pages_of(handoff: Handoff) -> Outgoing:
    """The next message, which must be pages."""
    outgoing = handoff.next_message()
    assert isinstance(outgoing, Outgoing)
    return outgoing


def test_a_handoff_waits_for_the_blocks_of_another_one(staging: Staging) -> None:
    """Each message asks for credit, since others may need its blocks; the pages are where the message says."""
    first, store = granted("a", staging)
    second, _ = granted("b", staging)
    sent = [pages_of(first), pages_of(first)]
    assert first.next_message() is None
    assert second.next_message() is None
    for outgoing in sent:
        message = decode(frame_of(first, [store], outgoing)[0])
        assert message.credit_wanted
        assert [store.staged[block] for block in message.blocks] == store.data[outgoing.layers[0]]
    first.handle(Credit(request_id="a", attempt=0, sequence=1))
    assert pages_of(second).staged is not None
    assert first.next_message() is None
    first.handle(Credit(request_id="a", attempt=0, sequence=2))
    assert pages_of(first).layers == range(2, 3)
    assert isinstance(first.next_message(), Commit)
    first.handle(Ack(request_id="a", attempt=0))
    second.receiver_left("gone")
    assert staging.num_free == 5
    staging.check_integrity()


def test_a_message_that_waits_on_its_line_touches_no_blocks_after_its_handoff_is_over(staging: Staging) -> None:
    """They are another one's by then."""
    first, store = granted("a", staging)
    late = pages_of(first)
    first.handle(Abort(request_id="a", attempt=0, cause="cancelled"))
    assert staging.num_free == 5
    frame_of(first, [store], late)
    assert not store.staged


def test_without_staging_memory_pages_are_named_where_they_lie(staging: Staging) -> None:
    """As on a CPU; and another transport takes no blocks."""
    store = MemoryStore(PAGES)
    for transport, memory in (("shm", None), ("cuda_ipc", staging)):
        handoff = Handoff(make_offer(range(PAGES * PAGE_SIZE)), [1, 0], store)
        handoff.offer_to("decode-1", None, memory)
        grant = Grant(request_id="r", attempt=0, held_pages=0, window_bytes=2**20, transport=transport)  # type: ignore[arg-type]
        handoff.handle(grant)
        handoff.layer_ready(Segment(1, 0, PAGES))
        assert decode(frame_of(handoff, [store], pages_of(handoff))[0]).blocks == [PAGES + 1, PAGES]
    assert staging.num_free == 5


class Departing:
    """See `Departures`: remembers what is sent."""

    def __init__(self) -> None:
        self.sent: list[Outgoing] = []

    def send(self, handoff: Handoff, outgoing: Outgoing) -> None:
        """See `Departures`."""
        self.sent.append(outgoing)

    def reconnect(self, receiver: str) -> None:
        """See `Departures`."""


async def test_credit_of_one_receiver_lets_handoffs_to_others_go_on() -> None:
    """They wait for the same memory, and nothing else would wake them."""
    messages: asyncio.Queue[str] = asyncio.Queue()

    async def send(peer: str, message: Message) -> None:
        messages.put_nowait(peer)

    departures = Departing()
    sender = Sender(send, departures, staging_blocks=NUM_LAYERS * PAGES)
    handoffs = []
    for request_id, receiver in (("a", "decode-1"), ("b", "decode-2")):
        handoff = Handoff(make_offer(range(PAGES * PAGE_SIZE), request_id), list(range(PAGES)), MemoryStore(PAGES))

        async def choose(_: Handoff, receiver: str = receiver) -> str:
            return receiver

        handoffs.append(asyncio.create_task(sender.deliver(handoff, choose)))
        assert await messages.get() == receiver
        sender.handle(
            receiver, Grant(request_id=request_id, attempt=0, held_pages=0, window_bytes=WINDOW, transport="shm")
        )
        for layer in range(NUM_LAYERS):
            handoff.layer_ready(Segment(layer, 0, PAGES))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    assert len(departures.sent) == NUM_LAYERS
    sender.handle("decode-1", Credit(request_id="a", attempt=0, sequence=1))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert len(departures.sent) == NUM_LAYERS + 1
    sender.receiver_left("decode-1")
    sender.receiver_left("decode-2")
    await asyncio.gather(*handoffs, return_exceptions=True)
