"""Every row of the table in `headrace.kvtransfer.handoff`."""

from __future__ import annotations

import msgspec
import pytest
import xxhash

from headrace.kvtransfer import handoff as module
from headrace.kvtransfer.handoff import Handoff, HandoffFailed, State
from headrace.kvtransfer.messages import (
    Abort,
    Ack,
    Commit,
    Credit,
    Grant,
    OnDataLine,
    Pages,
    Part,
    Refuse,
    Released,
    Renew,
)
from headrace.kvtransfer.on_the_way import MAX_REPEATS, PATIENCE_SECONDS, Flight, Outgoing
from headrace.kvtransfer.segments import Segment
from headrace.wire import Decoder, encode
from tests.kvtransfer.parts import NUM_LAYERS, PAGE_BYTES, MemoryStore, frame_of, make_offer

decode: Decoder[OnDataLine] = Decoder(OnDataLine)

R = {"request_id": "r", "attempt": 0}
BIG = 1 << 20


def handoff(tokens: int = 12) -> Handoff:
    """One of so many prompt tokens, whose pages are 0, 1, 2, ... of a store where each page differs."""
    pages = list(range(-(-tokens // 4)))
    return Handoff(make_offer(range(tokens)), pages, filled(len(pages)))


def filled(num_pages: int) -> MemoryStore:
    """A store where each page differs."""
    store = MemoryStore(num_pages)
    for layer in range(NUM_LAYERS):
        store.data[layer] = [bytes([layer * 16 + page]) * PAGE_BYTES for page in range(num_pages)]
    return store


def granted(tokens: int = 12, held: int = 0, window: int = BIG, flight: Flight | None = None) -> Handoff:
    """One that the receiver has granted."""
    result = handoff(tokens)
    result.offer_to("decode-1", flight)
    result.handle(Grant(**R, held_pages=held, window_bytes=window))
    return result


def drain(sender: Handoff) -> list[Outgoing | Commit]:
    """All that it would send now."""
    messages = []
    while (item := sender.next_message()) is not None:
        messages.append(item)
    return messages


def sequences(sender: Handoff) -> list[int]:
    """The numbers of all pages that it would send now."""
    return [item.sequence for item in drain(sender) if isinstance(item, Outgoing)]


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
    assert isinstance(item, Outgoing)
    header, payload = frame_of(sender, [filled(3)], item)
    assert decode(header) == Pages(
        **R,
        sequence=0,
        layer=0,
        first_page=0,
        num_pages=3,
        checksum=xxhash.xxh3_64_digest(payload),
        credit_wanted=False,
    )
    assert payload == b"".join(bytes([page]) * PAGE_BYTES for page in range(3))
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
    pages = [(m.layers, m.first_page, m.page_ids) for m in drain(sender) if isinstance(m, Outgoing)]
    assert pages == [(range(1), 2, [2])]
    assert sender.sent_bytes == PAGE_BYTES


def test_the_window_bounds_what_is_on_the_way() -> None:
    """GRANTED with no credit left: nothing is sent until a Credit covers what was."""
    sender = granted(tokens=4, window=2 * PAGE_BYTES)
    for layer in range(3):
        sender.layer_ready(Segment(layer, 0, 1))
    assert sequences(sender) == [0, 1]
    sender.handle(Credit(**R, sequence=1))
    assert sequences(sender) == [2]


def test_a_page_larger_than_the_window_travels_alone() -> None:
    """No window can be so small that nothing moves."""
    sender = granted(tokens=4, window=1)
    sender.layer_ready(Segment(0, 0, 1))
    sender.layer_ready(Segment(1, 0, 1))
    assert len(drain(sender)) == 1
    sender.handle(Credit(**R, sequence=1))
    assert len(drain(sender)) == 1


def test_handoffs_to_one_receiver_share_the_room_on_the_way() -> None:
    """What one has on the way the other must wait for, and what failed gives its room back."""
    flight = Flight(2 * PAGE_BYTES)
    first, second = (granted(tokens=4, window=4 * PAGE_BYTES, flight=flight) for _ in range(2))
    for layer in range(2):
        first.layer_ready(Segment(layer, 0, 1))
    second.layer_ready(Segment(0, 0, 1))
    assert (sequences(first), sequences(second)) == ([0, 1], [])
    first.handle(Credit(**R, sequence=1))
    assert sequences(second) == [0]
    first.receiver_left("gone")
    assert flight.size == PAGE_BYTES


def test_credit_is_wanted_once_half_of_the_window_is_on_the_way() -> None:
    """So a sender that must wait will be credited, and a small prompt costs no credit at all."""
    sender = granted(tokens=4, window=4 * PAGE_BYTES)
    for layer in range(3):
        sender.layer_ready(Segment(layer, 0, 1))
    assert [item.credit_wanted for item in drain(sender) if isinstance(item, Outgoing)] == [False, False, True]


def test_large_segments_are_split_to_a_quarter_of_the_window() -> None:
    """So that several messages are on the way at once."""
    sender = granted(tokens=64, window=16 * PAGE_BYTES)
    sender.layer_ready(Segment(0, 0, 3))
    sender.layer_ready(Segment(1, 0, 16))
    pages = [(*m.layers, m.first_page, len(m.page_ids)) for m in drain(sender) if isinstance(m, Outgoing)]
    assert pages == [(0, 0, 3), (1, 0, 4), (1, 4, 4), (1, 8, 4)]


def test_layers_that_wait_with_the_same_pages_leave_in_one_message() -> None:
    """As far as it may be so large; other pages, and layers that do not follow, leave by themselves."""
    sender = granted(tokens=64, window=16 * PAGE_BYTES)
    for layer, first, count in ((0, 0, 1), (1, 0, 1), (2, 0, 1), (0, 1, 2), (1, 1, 2), (2, 1, 2), (0, 3, 1), (2, 3, 1)):
        sender.layer_ready(Segment(layer, first, count))
    sent = [(m.layers, m.first_page, m.page_ids) for m in drain(sender) if isinstance(m, Outgoing)]
    assert sent == [
        (range(3), 0, [0]),
        (range(2), 1, [1, 2]),
        (range(2, 3), 1, [1, 2]),
        (range(1), 3, [3]),
        (range(2, 3), 3, [3]),
    ]
    assert (sender.sent_pages, sender.sent_bytes) == (11, 11 * PAGE_BYTES)


def test_pages_read_in_place_are_named_in_as_many_messages_as_there_are_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each of the receiver's copies its part at once, however large; over TCP messages stay small."""
    monkeypatch.setattr(module, "MESSAGE_BYTES", {"shm": PAGE_BYTES, "tcp": PAGE_BYTES})
    monkeypatch.setattr(module, "STRIPES", NUM_LAYERS)
    for transport, messages in (("shm", NUM_LAYERS), ("tcp", 3 * NUM_LAYERS)):
        sender = handoff()
        sender.offer_to("decode-1")
        for layer in range(NUM_LAYERS):
            sender.layer_ready(Segment(layer, 0, 3))
        sender.handle(Grant(**R, held_pages=0, window_bytes=BIG, transport=transport))  # type: ignore[arg-type]
        assert len(sequences(sender)) == messages


class Computing:
    """See `Ready`."""

    def __init__(self) -> None:
        self.is_over = False

    def query(self) -> bool:
        """See `Ready`."""
        return self.is_over

    def synchronize(self) -> None:
        """See `Ready`."""


def test_a_layer_that_is_there_does_not_wait_for_one_that_is_being_computed() -> None:
    """On a GPU layers are announced before they are computed."""
    sender = granted(tokens=4)
    work = [Computing() for _ in range(NUM_LAYERS)]
    for layer, ready in enumerate(work):
        sender.layer_ready(Segment(layer, 0, 1, ready))
    work[0].is_over = work[1].is_over = True
    sent = [(m.layers, m.ready) for m in drain(sender) if isinstance(m, Outgoing)]
    assert sent == [(range(2), work[:2]), (range(2, 3), work[2:])]


def test_a_message_of_two_layers_has_the_pages_of_both() -> None:
    """In order, under one checksum."""
    sender = granted(tokens=8)
    for layer in (1, 2):
        sender.layer_ready(Segment(layer, 0, 2))
    item = sender.next_message()
    assert isinstance(item, Outgoing)
    header, payload = frame_of(sender, [filled(2)], item)
    message = decode(header)
    assert (message.layer, message.num_layers, message.num_pages) == (1, 2, 2)
    assert payload == b"".join(bytes([byte]) * PAGE_BYTES for byte in (16, 17, 32, 33))


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


async def test_pages_stay_until_the_receiver_has_answered_an_abort() -> None:
    """FAILED: it may still read them; Released says that it will not."""
    sender = granted(tokens=4)
    sender.fail("cancelled")
    assert not sender.receiver_is_done
    sender.handle(Credit(**R, sequence=0))
    assert not sender.receiver_is_done
    sender.handle(Released(**R))
    assert sender.receiver_is_done
    await sender.until_receiver_is_done()


@pytest.mark.parametrize("end", ["Abort", "left"])
def test_a_receiver_that_ended_it_reads_no_more_pages(end: str) -> None:
    """Nobody need be waited for."""
    sender = granted(tokens=4)
    if end == "Abort":
        sender.handle(Abort(**R, cause="checksum"))
    else:
        sender.receiver_left("gone")
    assert (sender.state, sender.receiver_is_done) == (State.FAILED, True)


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


def test_what_is_told_again_until_the_receiver_answers() -> None:
    """Open handoffs are renewed, a Commit and an Abort repeated."""
    sender = handoff(tokens=4)
    assert sender.renewal() is None
    sender.offer_to("decode-1")
    assert sender.renewal() == ("r", 0, 0)
    sender.handle(Grant(**R, held_pages=0, window_bytes=BIG))
    sender.layer_ready(Segment(0, 0, 1))
    sender.next_message()
    assert sender.renewal() == ("r", 0, 1)
    sender.finish(7, None)
    assert sender.next_message() == sender.renewal() == Commit(**R, sequence=1, token_id=7, logprobs=None)
    sender.fail("cancelled")
    assert sender.renewal() == Abort(**R, cause="sender_failed")
    sender.handle(Released(**R))
    assert sender.renewal() is None


@pytest.mark.parametrize("part", [(1, 0, 1), (0, 0, 2), (0, 1, 1), (2**31 - 1, 2**31 - 1, 1)])
def test_parts_that_this_worker_does_not_have_end_the_attempt(part: tuple[int, int, int]) -> None:
    """OFFERED -> FAILED: it has one rank with one head."""
    sender = handoff()
    sender.offer_to("decode-1")
    sender.layer_ready(Segment(0, 0, 3))
    rank, first_head, num_heads = part
    parts = [Part(rank=rank, first_head=first_head, num_heads=num_heads)]
    sender.handle(Grant(**R, held_pages=0, window_bytes=BIG, parts=parts))
    assert (sender.state, sender.next_message()) == (State.FAILED, None)


def test_workers_that_cut_alike_send_no_byte_for_those_that_do_not() -> None:
    """Neither a part's number nor a list of parts is on the wire."""
    sender = granted(tokens=4)
    sender.layer_ready(Segment(0, 0, 1))
    item = sender.next_message()
    assert isinstance(item, Outgoing)
    header, payload = frame_of(sender, [filled(1)], item)
    assert b"part" not in header + encode(Grant(**R, held_pages=0, window_bytes=BIG))
    assert len(payload) == PAGE_BYTES


class Clock:
    """Turned by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        """Seconds."""
        return self.now


def on_the_way(clock: Clock, flight: Flight | None = None) -> Handoff:
    """One that has sent two messages, one second apart."""
    sender = Handoff(make_offer(range(4)), [0], filled(1), clock)
    assert sender.seconds_until_overdue() is None
    sender.offer_to("decode-1", flight)
    assert sender.seconds_until_overdue() is None
    sender.handle(Grant(**R, held_pages=0, window_bytes=BIG))
    assert sender.seconds_until_overdue() is None
    for layer in (0, 1):
        sender.layer_ready(Segment(layer, 0, 1))
        assert sequences(sender) == [layer]
        clock.now += 1
    return sender


def test_pages_that_are_overdue_are_asked_for_and_sent_again() -> None:
    """GRANTED -> GRANTED: what had been on the way for long when it was asked, and is not here."""
    clock = Clock()
    sender = on_the_way(clock)
    assert sender.seconds_until_overdue() == 0
    assert sender.ask() == [Renew(handoffs=[("r", 0, 2)])]
    assert sender.seconds_until_overdue() == PATIENCE_SECONDS
    sender.layer_ready(Segment(2, 0, 1))
    assert sequences(sender) == [2]
    sender.handle(Credit(**R, sequence=1))
    assert sender.lost_some
    assert sequences(sender) == [1]
    assert (sender.repeats, sender.sent_pages) == (1, 3)
    sender.handle(Credit(**R, sequence=3))
    assert (sender.seconds_until_overdue(), sender.lost_some) == (None, False)


def test_nothing_is_sent_again_before_the_receiver_was_asked() -> None:
    """Credit may say little because little has been written."""
    clock = Clock()
    sender = on_the_way(clock)
    sender.handle(Credit(**R, sequence=0))
    assert drain(sender) == []


def test_a_commit_without_an_answer_is_repeated_and_its_pages_asked_for() -> None:
    """COMMITTED -> COMMITTED: any of them may be lost."""
    clock = Clock()
    sender = on_the_way(clock)
    sender.layer_ready(Segment(2, 0, 1))
    sender.finish(7, None)
    *_, commit = drain(sender)
    assert sender.seconds_until_overdue() == PATIENCE_SECONDS
    clock.now += PATIENCE_SECONDS
    assert sender.seconds_until_overdue() == 0
    assert sender.ask() == [commit, Renew(handoffs=[("r", 0, 3)])]
    sender.handle(Credit(**R, sequence=2))
    assert sequences(sender) == [2]
    assert sender.state is State.COMMITTED
    sender.handle(Ack(**R))
    assert (sender.state, sender.seconds_until_overdue()) == (State.DONE, None)


def test_patience_doubles_and_ends() -> None:
    """Then the lease decides."""
    clock = Clock()
    sender = on_the_way(clock)
    patience = PATIENCE_SECONDS
    for repeats in range(MAX_REPEATS + 1):
        assert sender.seconds_until_overdue() == 0
        sender.ask()
        sender.handle(Credit(**R, sequence=0))
        assert sequences(sender) == [0, 1]
        assert sender.repeats == repeats + 1
        patience *= 2
        clock.now += patience
    assert sender.seconds_until_overdue() is None


def test_a_slow_way_makes_patient() -> None:
    """Where pages usually take long, they are not overdue after half a second."""
    clock = Clock()
    flight = Flight(BIG)
    sender = on_the_way(clock, flight)
    sender.layer_ready(Segment(2, 0, 1))
    sender.finish(7, None)
    drain(sender)
    clock.now += 3
    sender.handle(Ack(**R))
    assert flight.patience == 12
    other = on_the_way(clock, flight)
    assert other.seconds_until_overdue() == 10
    for _ in range(100):
        flight.note(0.001)
    assert flight.patience == PATIENCE_SECONDS


def test_a_prompt_computed_in_place_says_nothing_of_the_way() -> None:
    """Nothing travelled: how soon other handoffs' pages are overdue stays as it is."""
    flight = Flight(BIG)
    offer = msgspec.structs.replace(make_offer(range(4)), in_place=True, may_wait=False)
    sender = Handoff(offer, [], filled(1))
    sender.offer_to("decode-1", flight)
    sender.handle(Grant(**R, held_pages=0, window_bytes=0))
    sender.handle(Ack(**R))
    assert sender.state is State.DONE
    assert flight.patience == PATIENCE_SECONDS
