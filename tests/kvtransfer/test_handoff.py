"""Every row of the table in `headrace.kvtransfer.handoff`."""

from __future__ import annotations

import pytest
import xxhash

from headrace.kvtransfer.handoff import Handoff, HandoffFailed, Segment, State
from headrace.kvtransfer.messages import Abort, Ack, Commit, Credit, Grant, Pages, Refuse
from headrace.wire import Message
from tests.kvtransfer.parts import NUM_LAYERS, PAGE_BYTES, MemoryStore, make_offer

R = {"request_id": "r", "attempt": 0}
BIG = 1 << 20


def handoff(tokens: int = 12) -> Handoff:
    """One of so many prompt tokens, whose pages are 0, 1, 2, ... of a store where each page differs."""
    pages = list(range(-(-tokens // 4)))
    store = MemoryStore(len(pages))
    for layer in range(NUM_LAYERS):
        store.data[layer] = [bytes([layer * 16 + page]) * PAGE_BYTES for page in pages]
    return Handoff(make_offer(range(tokens)), pages, store)


def granted(tokens: int = 12, held: int = 0, window: int = BIG) -> Handoff:
    """One that the receiver has granted."""
    result = handoff(tokens)
    result.offer_to("decode-1")
    result.handle(Grant(**R, held_pages=held, window_bytes=window))
    return result


def drain(sender: Handoff) -> list[Message]:
    """All that it would send now."""
    messages = []
    while (item := sender.next_message()) is not None:
        messages.append(item[0])
    return messages


def test_an_offer_goes_to_one_receiver() -> None:
    """UNPLACED -> OFFERED."""
    sender = handoff()
    assert sender.offer_to("decode-1") == sender.offer
    assert (sender.state, sender.receiver) == (State.OFFERED, "decode-1")


def test_layers_computed_before_the_grant_wait() -> None:
    """Nothing travels until the receiver has reserved pages; all of it does afterwards."""
    sender = handoff()
    sender.layer_ready(Segment(0, 0, 3))
    assert sender.next_message() is None
    sender.offer_to("decode-1")
    assert sender.next_message() is None
    sender.handle(Grant(**R, held_pages=0, window_bytes=BIG))
    item = sender.next_message()
    assert item is not None
    message, (payload,) = item
    assert message == Pages(
        **R, sequence=0, layer=0, first_page=0, num_pages=3, checksum=xxhash.xxh3_64_digest(payload)
    )
    assert bytes(payload) == b"".join(bytes([page]) * PAGE_BYTES for page in range(3))
    assert sender.sent_bytes == 3 * PAGE_BYTES


def test_a_refused_handoff_can_be_offered_to_another() -> None:
    """OFFERED -> UNPLACED, with the cause remembered."""
    sender = handoff()
    sender.offer_to("decode-1")
    sender.handle(Refuse(**R, cause="full", message=""))
    assert (sender.state, sender.receiver, sender.refused) == (State.UNPLACED, None, {"decode-1": "full"})
    sender.offer_to("decode-2")
    assert sender.receiver == "decode-2"


def test_pages_that_the_receiver_holds_do_not_travel() -> None:
    """A segment is cut to what is missing there; one that is held whole is skipped."""
    sender = granted(held=2)
    sender.layer_ready(Segment(0, 0, 3))
    sender.layer_ready(Segment(1, 0, 2))
    pages = [(m.layer, m.first_page, m.num_pages) for m in drain(sender) if isinstance(m, Pages)]
    assert pages == [(0, 2, 1)]
    assert sender.sent_bytes == PAGE_BYTES


def test_the_window_bounds_what_is_on_the_way() -> None:
    """GRANTED with no credit left: nothing is sent until a Credit covers what was."""
    sender = granted(tokens=4, window=2 * PAGE_BYTES)
    for layer in range(3):
        sender.layer_ready(Segment(layer, 0, 1))
    assert [m.sequence for m in drain(sender) if isinstance(m, Pages)] == [0, 1]
    sender.handle(Credit(**R, sequence=1))
    assert [m.sequence for m in drain(sender) if isinstance(m, Pages)] == [2]


def test_a_page_larger_than_the_window_travels_alone() -> None:
    """No window can be so small that nothing moves."""
    sender = granted(tokens=4, window=1)
    sender.layer_ready(Segment(0, 0, 1))
    sender.layer_ready(Segment(1, 0, 1))
    assert len(drain(sender)) == 1
    sender.handle(Credit(**R, sequence=1))
    assert len(drain(sender)) == 1


def test_large_segments_are_split_to_a_quarter_of_the_window() -> None:
    """The receiver credits by quarters: a larger message could wait for a credit that never comes."""
    sender = granted(tokens=64, window=16 * PAGE_BYTES)
    sender.layer_ready(Segment(0, 0, 3))
    sender.layer_ready(Segment(1, 0, 16))
    pages = [(m.layer, m.first_page, m.num_pages) for m in drain(sender) if isinstance(m, Pages)]
    assert pages == [(0, 0, 3), (1, 0, 4), (1, 4, 4), (1, 8, 4)]


def test_a_commit_follows_the_last_page() -> None:
    """GRANTED -> COMMITTED only when all is sent and the first token is known; Ack ends it."""
    sender = granted(tokens=4)
    sender.finish(7, None)
    sender.layer_ready(Segment(0, 0, 1))
    *_, commit = drain(sender)
    assert commit == Commit(**R, sequence=1, token_id=7, logprobs=None)
    assert sender.state is State.COMMITTED
    sender.handle(Ack(**R))
    assert sender.state is State.DONE


def test_messages_that_do_not_fit_the_state_are_dropped() -> None:
    """Late or repeated messages change nothing."""
    sender = handoff()
    for message in (Grant(**R, held_pages=1, window_bytes=1), Ack(**R), Credit(**R, sequence=9)):
        sender.handle(message)
    assert (sender.state, sender.held_pages) == (State.UNPLACED, 0)
    sender = granted()
    sender.handle(Grant(**R, held_pages=3, window_bytes=1))
    sender.handle(Refuse(**R, cause="full", message=""))
    sender.handle(Ack(**R))
    assert (sender.state, sender.held_pages) == (State.GRANTED, 0)


@pytest.mark.parametrize("placed", [True, False])
async def test_an_abort_ends_the_attempt_in_any_state(placed: bool) -> None:
    """Any state -> FAILED, and whoever waits is told why."""
    sender = granted() if placed else handoff()
    sender.handle(Abort(**R, cause="lease", message="no progress"))
    assert sender.next_message() is None
    with pytest.raises(HandoffFailed, match="lease no progress"):
        await sender.changed()


def test_nothing_undoes_an_acknowledged_handoff() -> None:
    """DONE stays DONE: the request is the receiver's."""
    sender = granted(tokens=4, held=1)
    sender.finish(1, None)
    assert len(drain(sender)) == 1
    sender.handle(Ack(**R))
    sender.handle(Abort(**R, cause="unknown"))
    assert sender.state is State.DONE


def test_an_offer_that_the_receiver_never_saw_can_be_made_again() -> None:
    """OFFERED -> UNPLACED: the offer, or its refusal, was lost. Once granted, `unknown` is the end."""
    sender = handoff()
    sender.offer_to("decode-1")
    sender.handle(Abort(**R, cause="unknown"))
    assert (sender.state, sender.receiver, sender.refused) == (State.UNPLACED, None, {})
    sender = granted()
    sender.handle(Abort(**R, cause="unknown"))
    assert sender.state is State.FAILED
