"""What drives the handoffs of one worker: beside the table in `headrace.kvtransfer.handoff`."""

from __future__ import annotations

import asyncio

import msgspec

from headrace.kvtransfer.handoff import Handoff, Outgoing
from headrace.kvtransfer.messages import Ack, Grant
from headrace.kvtransfer.sender import Sender
from headrace.wire import Message
from tests.kvtransfer.parts import PAGE_SIZE, MemoryStore, make_offer


class _Departures:
    def send(self, handoff: Handoff, outgoing: Outgoing) -> None:
        """Pages go nowhere."""

    def reconnect(self, receiver: str) -> None:
        """Nor does anything else."""


async def _granted(sender: Sender, messages: asyncio.Queue[Message], handoff: Handoff) -> asyncio.Task[None]:
    async def choose(_: Handoff) -> str:
        return "decode-1"

    delivering = asyncio.create_task(sender.deliver(handoff, choose))
    await messages.get()
    sender.handle("decode-1", Grant(request_id="r", attempt=0, held_pages=0, window_bytes=2**20))
    return delivering


async def test_an_offer_in_place_ends_with_its_acknowledgement_and_is_no_transfer() -> None:
    """No page is sent and nothing committed; other handoffs take an Ack only after their Commit."""
    messages: asyncio.Queue[Message] = asyncio.Queue()
    sender = Sender(lambda _, message: messages.put(message), _Departures())
    offer = make_offer(range(PAGE_SIZE))
    handed_over = await _granted(sender, messages, Handoff(offer, [0], MemoryStore(1)))
    sender.handle("decode-1", Ack(request_id="r", attempt=0))
    await asyncio.sleep(0)
    assert not handed_over.done()
    handed_over.cancel()
    sender.receiver_left("decode-1")
    await asyncio.wait([handed_over])
    aborted = sender.stats.figures()
    in_place = msgspec.structs.replace(offer, in_place=True, may_wait=False)
    delivering = await _granted(sender, messages, Handoff(in_place, [], MemoryStore(1)))
    sender.handle("decode-1", Ack(request_id="r", attempt=0))
    await delivering
    assert sender.stats.figures() == aborted
