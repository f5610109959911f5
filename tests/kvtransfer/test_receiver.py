"""Every row of the table in `headrace.kvtransfer.receiver`."""

from __future__ import annotations

import msgspec
import pytest
import xxhash

from headrace.engine.page_pool import PagePool
from headrace.kvtransfer import admission as admission_module
from headrace.kvtransfer.incoming import OwnPrompt, ReceivedRequest
from headrace.kvtransfer.messages import Abort, Ack, Commit, Credit, Grant, Offer, Pages, Refuse, Released, Renew
from headrace.kvtransfer.receiver import LEASE_SECONDS, Receiver
from headrace.kvtransfer.transports import Beside, Transports
from headrace.wire import Message, encode
from tests.kvtransfer.parts import LAYOUT, NUM_LAYERS, PAGE_BYTES, PAGE_SIZE, BytesPayload, MemoryStore, make_offer

PREFILL = "prefill-1"


class Bench:
    """A receiver over real pages, with a clock that the test turns."""

    def __init__(self, num_pages: int = 8) -> None:
        self.pool = PagePool(num_pages, PAGE_SIZE)
        self.store = MemoryStore(num_pages)
        self.sent: list[tuple[str, Message]] = []
        self.received: list[ReceivedRequest] = []
        self.refused: list[tuple[str, str]] = []
        self.prompts: list[OwnPrompt] = []
        self.now = 0.0
        self.receiver = Receiver(
            LAYOUT,
            [self.store],
            self.pool,
            num_pages,
            lambda peer, message: self.sent.append((peer, message)),
            self.received.append,
            lambda: self.now,
            refuse=lambda sender, reason: self.refused.append((sender, reason)),
            on_prompt=self.prompts.append,
            most_prompt_tokens=5,
        )

    def offer_in_place(self, tokens: list[int], attempt: int = 0) -> None:
        """Have a prompt computed here."""
        offer = make_offer(tokens, "r", attempt)
        self.receiver.handle(PREFILL, msgspec.structs.replace(offer, may_wait=False, in_place=True))

    def offer(self, tokens: int, request_id: str = "r", attempt: int = 0, sender: str = PREFILL) -> Offer:
        """Offer a prompt that shares no page with others'."""
        offer = make_offer([hash(request_id) % 900 + token for token in range(tokens)], request_id, attempt)
        self.receiver.handle(sender, offer)
        return offer

    def pages(self, sequence: int, layer: int, first: int = 0, count: int = 1, sender: str = PREFILL) -> None:
        """Send pages of request `r` whose bytes tell their layer."""
        payload = bytes([layer + 1]) * (count * PAGE_BYTES)
        message = Pages(
            request_id="r",
            attempt=0,
            sequence=sequence,
            layer=layer,
            first_page=first,
            num_pages=count,
            checksum=xxhash.xxh3_64_digest(payload),
        )
        self.receiver.arrivals.on_frame(sender, encode(message), BytesPayload(payload))

    def commit(self, sequence: int, sender: str = PREFILL) -> None:
        """Commit request `r`."""
        message = Commit(request_id="r", attempt=0, sequence=sequence, token_id=5, logprobs=None)
        self.receiver.handle(sender, message)

    def deliver(self) -> None:
        """Request `r`, one page long, from its first to its last message."""
        for layer in range(NUM_LAYERS):
            self.pages(layer, layer)
        self.commit(NUM_LAYERS)

    @property
    def last(self) -> Message:
        """What the receiver said last."""
        return self.sent[-1][1]

    def assert_empty(self) -> None:
        """Nothing is held for anyone."""
        assert (self.receiver.num_open, self.receiver.num_waiting, self.pool.num_in_use) == (0, 0, 0)
        self.pool.check_integrity()


def pages_message(sequence: int, layer: int, payload: bytes, credit_wanted: bool = True) -> Pages:
    """The first page of one layer of request `r`."""
    return Pages(
        request_id="r",
        attempt=0,
        sequence=sequence,
        layer=layer,
        first_page=0,
        num_pages=1,
        checksum=xxhash.xxh3_64_digest(payload),
        credit_wanted=credit_wanted,
    )


@pytest.fixture
def bench() -> Bench:
    """One with eight free pages."""
    return Bench()


def test_an_offer_is_granted_where_pages_are_free(bench: Bench) -> None:
    """(none) -> RECEIVING: the whole prompt's pages are reserved at once."""
    bench.offer(9)
    assert isinstance(bench.last, Grant)
    assert (bench.last.held_pages, bench.pool.num_in_use, bench.receiver.num_open) == (0, 3, 1)


def test_a_worker_of_the_same_pool_needs_no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """(none) -> RECEIVING -> (none), though nothing is free and others wait; either side may let go first."""
    bench = Bench(num_pages=4)
    own = bench.pool.allocate(3)
    pages = {("r", 0): own}
    beside = Beside(PREFILL, lambda request_id, attempt: pages.get((request_id, attempt)))
    monkeypatch.setattr(bench.receiver, "_choice", Transports(LAYOUT, bench.store, lambda *_: None, beside))  # type: ignore[arg-type]
    bench.offer(8, "other", sender="prefill-2")
    bench.offer(9)
    assert isinstance(bench.last, Grant)
    assert (bench.last.transport, bench.last.held_pages, bench.receiver.num_waiting) == ("local", 3, 1)
    bench.commit(0)
    bench.pool.release(own)
    assert (bench.received[0].pages, bench.pool.num_in_use) == (own, 3)
    bench.pool.release(bench.received[0].pages)
    bench.receiver.grant_waiting()
    assert isinstance(bench.last, Grant)
    assert (bench.last.request_id, bench.last.transport) == ("other", "tcp")
    bench.offer(9, "r", attempt=1)  # which that worker has given up meanwhile
    assert bench.receiver.num_waiting == 1


def test_waiting_offers_are_granted_in_order(bench: Bench) -> None:
    """(none) -> WAITING -> RECEIVING: a small late offer does not overtake a large early one."""
    bench.offer(24, "first")
    bench.offer(20, "large")
    bench.offer(4, "small")
    assert bench.receiver.num_waiting == 2
    bench.receiver.check_integrity()
    bench.receiver.cancel("first", 0)
    granted = [message.request_id for _, message in bench.sent if isinstance(message, Grant)]
    assert granted == ["first", "large", "small"]


def test_reserved_pages_are_left_alone(bench: Bench) -> None:
    """Grants leave room for running requests to grow."""
    bench.receiver.room.reserve_pages = 7
    bench.offer(8)
    assert bench.receiver.num_waiting == 1
    bench.receiver.room.reserve_pages = 6
    bench.receiver.grant_waiting()
    assert bench.receiver.num_waiting == 0


def test_no_more_is_granted_than_can_be_run(bench: Bench) -> None:
    """However many pages are free: a prompt that is here early would only wait, after its first token."""
    bench.receiver.room.places = 2
    for name in ("a", "b", "c"):
        bench.offer(4, name)
    assert bench.receiver.num_waiting == 1
    bench.receiver.cancel("a", 0)
    assert bench.receiver.num_waiting == 0
    bench.receiver.room.places = 1
    bench.offer(4, "d")
    bench.receiver.cancel("b", 0)
    assert bench.receiver.num_waiting == 1


def refuse_cause(bench: Bench) -> str:
    """The cause of the refusal that was just sent."""
    assert isinstance(bench.last, Refuse)
    return bench.last.cause


def test_another_layout_is_refused_naming_both(bench: Bench) -> None:
    """Pages of another type can't be read here."""
    bench.receiver.handle(PREFILL, make_offer([1], layout=msgspec.structs.replace(LAYOUT, dtype="bfloat16")))
    assert refuse_cause(bench) == "layout"
    assert isinstance(bench.last, Refuse)
    assert "bfloat16" in bench.last.message
    assert "float32" in bench.last.message


def test_a_prompt_larger_than_the_cache_is_refused(bench: Bench) -> None:
    """It would wait for ever."""
    bench.offer(8 * PAGE_SIZE + 1)
    assert refuse_cause(bench) == "too_long"


def test_a_repeated_offer_is_granted_again(bench: Bench) -> None:
    """The Grant was lost; nothing more is reserved."""
    bench.offer(4)
    bench.offer(4)
    assert bench.sent[0] == bench.sent[1]
    assert bench.pool.num_in_use == 1
    bench.deliver()
    assert len(bench.received) == 1


@pytest.mark.parametrize(("tokens", "sender"), [(4, "prefill-2"), (5, PREFILL)], ids=["worker", "prompt"])
def test_another_offer_for_an_open_attempt_is_refused(bench: Bench, tokens: int, sender: str) -> None:
    """Of another worker, or of another prompt: the first one goes on."""
    bench.offer(4)
    bench.offer(tokens, sender=sender)
    assert refuse_cause(bench) == "duplicate"
    bench.deliver()
    assert len(bench.received) == 1


@pytest.mark.parametrize("changes", [{"token_ids": [1, 1000]}, {"generated": 2}], ids=["token", "generated"])
def test_an_offer_that_could_not_be_decoded_is_refused(bench: Bench, changes: dict[str, object]) -> None:
    """A token outside the vocabulary would end a step of the device for everybody."""
    bench.receiver.handle(PREFILL, msgspec.structs.replace(make_offer([1]), **changes))
    assert refuse_cause(bench) == "invalid"
    assert len(bench.refused) == 1
    bench.assert_empty()


def test_a_first_token_outside_the_vocabulary_ends_the_attempt(bench: Bench) -> None:
    """It never reaches the decoder."""
    bench.offer(4)
    for layer in range(NUM_LAYERS):
        bench.pages(layer, layer)
    bench.receiver.handle(PREFILL, Commit(request_id="r", attempt=0, sequence=3, token_id=1000, logprobs=None))
    assert isinstance(bench.last, Abort)
    bench.assert_empty()


def test_a_stale_attempt_is_refused_even_after_the_new_one_ended(bench: Bench) -> None:
    """A late sender can't bring back what a newer attempt has done."""
    bench.offer(4, attempt=3)
    bench.receiver.cancel("r", 3)
    bench.offer(4, attempt=2)
    assert refuse_cause(bench) == "stale"
    bench.assert_empty()


def test_a_stopping_worker_takes_nothing_new_but_ends_what_it_has(bench: Bench) -> None:
    """What was granted still arrives."""
    bench.offer(4)
    bench.receiver.room.stopping = True
    bench.offer(4, "late")
    assert refuse_cause(bench) == "stopping"
    bench.deliver()
    assert isinstance(bench.last, Ack)


def test_too_many_waiting_offers_are_refused(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The queue is bounded."""
    monkeypatch.setattr(admission_module, "MAX_WAITING", 1)
    bench.offer(32, "first")
    bench.offer(4, "waits")
    bench.offer(4, "over")
    assert refuse_cause(bench) == "full"


def test_a_committed_prompt_goes_to_the_decoder(bench: Bench) -> None:
    """RECEIVING -> (none): every byte is in its place, the pages are the decoder's, the sender gets its Ack."""
    bench.offer(4)
    bench.deliver()
    (request,) = bench.received
    assert (request.commit.token_id, len(request.pages)) == (5, 1)
    for layer in range(NUM_LAYERS):
        assert bench.store.data[layer][request.pages[0]] == bytes([layer + 1]) * PAGE_BYTES
    assert bench.sent[-1] == (PREFILL, Ack(request_id="r", attempt=0))
    assert (bench.receiver.num_open, bench.pool.num_in_use) == (0, 1)
    bench.pool.release(request.pages)
    bench.assert_empty()


def test_a_prefix_that_is_held_need_not_travel(bench: Bench) -> None:
    """A committed prompt is found again: only the page after it is missing."""
    bench.offer(4)
    bench.deliver()
    longer = make_offer([*bench.received[0].offer.token_ids, 9], "longer")
    bench.receiver.handle(PREFILL, longer)
    assert isinstance(bench.last, Grant)
    assert bench.last.held_pages == 1
    assert bench.pool.num_in_use == 2


def test_a_repeated_message_is_dropped(bench: Bench) -> None:
    """`Pages` below the expected sequence were written before."""
    bench.offer(4)
    bench.pages(0, 0)
    bench.pages(0, 0)
    bench.pages(1, 1)
    bench.pages(2, 2)
    bench.commit(3)
    assert isinstance(bench.last, Ack)


def test_a_flipped_byte_ends_the_attempt(bench: Bench) -> None:
    """The checksum finds it; the pages are free again and nothing was written."""
    bench.offer(4)
    message = Pages(
        request_id="r",
        attempt=0,
        sequence=0,
        layer=0,
        first_page=0,
        num_pages=1,
        checksum=xxhash.xxh3_64_digest(bytes(PAGE_BYTES)),
    )
    bench.receiver.arrivals.on_frame(PREFILL, encode(message), BytesPayload(b"\1" + bytes(PAGE_BYTES - 1)))
    assert isinstance(bench.last, Abort)
    assert bench.last.cause == "checksum"
    assert bench.store.data == MemoryStore(8).data
    bench.assert_empty()


@pytest.mark.parametrize(
    ("sequence", "layer", "first", "count"),
    [(0, NUM_LAYERS, 0, 1), (0, 0, 1, 1), (0, 0, 0, 2)],
    ids=["no such layer", "no such page", "more than granted"],
)
def test_pages_out_of_bounds_end_the_attempt(bench: Bench, sequence: int, layer: int, first: int, count: int) -> None:
    """RECEIVING -> (none): nothing outside of the grant is written."""
    bench.offer(4)
    bench.pages(sequence, layer, first, count)
    assert isinstance(bench.last, Abort)
    assert bench.last.cause == "sequence"
    bench.assert_empty()


def test_a_commit_waits_for_pages_that_it_overtook(bench: Bench) -> None:
    """RECEIVING -> COMMITTING -> (none): data lines are no part of the mesh, and pages may come in any order."""
    bench.offer(4)
    bench.pages(2, 1)
    bench.commit(3)
    bench.pages(1, 2)
    assert bench.received == []
    bench.pages(0, 0)
    assert (isinstance(bench.last, Ack), len(bench.received)) == (True, 1)
    assert bench.store.data[1][bench.received[0].pages[0]] == bytes([2]) * PAGE_BYTES


def test_a_commit_whose_pages_do_not_come_loses_its_lease(bench: Bench) -> None:
    """COMMITTING: Renew no longer helps, or pages that a line lost would be waited for until the request's deadline."""
    bench.offer(4)
    bench.commit(3)
    bench.now += LEASE_SECONDS
    bench.receiver.handle(PREFILL, Renew(handoffs=[("r", 0, 0)]))
    bench.now += 0.1
    bench.receiver.reap()
    assert bench.receiver.aborts == {"lease": 1}
    bench.assert_empty()


def test_pages_are_not_freed_while_a_thread_writes_to_them(bench: Bench) -> None:
    """RECEIVING -> DRAINING -> (none): the sender hears Released when its pages will not be read any more."""
    bench.offer(4)
    landing = bench.receiver._incoming["r", 0].landing
    assert landing is not None
    message = pages_message(0, 0, bytes(PAGE_BYTES))
    landing.claim(message)
    bench.receiver.handle(PREFILL, Abort(request_id="r", attempt=0, cause="sender_failed"))
    assert (bench.receiver.num_open, bench.pool.num_in_use, isinstance(bench.last, Grant)) == (0, 1, True)
    bench.receiver.handle(PREFILL, Abort(request_id="r", attempt=0, cause="sender_failed"))
    bench.receiver.check_integrity()
    landing.written(message, None)
    assert bench.sent[-1] == (PREFILL, Released(request_id="r", attempt=0))
    bench.assert_empty()


def test_an_abort_of_what_is_unknown_is_answered(bench: Bench) -> None:
    """Whoever waits to free its pages must not wait in vain."""
    bench.receiver.handle(PREFILL, Abort(request_id="r", attempt=0, cause="sender_failed"))
    assert bench.last == Released(request_id="r", attempt=0)


def test_what_breaks_the_schema_is_refused_and_counted(bench: Bench) -> None:
    """On the lines too; the handoff goes on."""
    bench.offer(4)
    bench.receiver.arrivals.on_frame(PREFILL, b"nonsense", BytesPayload(b""))
    assert [sender for sender, _ in bench.refused] == [PREFILL]
    bench.deliver()
    assert len(bench.received) == 1


@pytest.mark.parametrize("size", [0, PAGE_BYTES - 1, PAGE_BYTES + 1])
def test_a_payload_of_another_size_ends_the_attempt(bench: Bench, size: int) -> None:
    """It would leave a page half written."""
    bench.offer(4)
    bench.receiver.arrivals.on_frame(PREFILL, encode(pages_message(0, 0, bytes(size))), BytesPayload(bytes(size)))
    assert bench.receiver.aborts == {"checksum": 1}
    bench.assert_empty()


def test_a_commit_of_fewer_pages_ends_the_attempt(bench: Bench) -> None:
    """A prompt with a missing layer never reaches the decoder."""
    bench.offer(4)
    bench.pages(0, 0)
    bench.commit(1)
    assert isinstance(bench.last, Abort)
    assert bench.received == []
    bench.assert_empty()


def test_messages_of_strangers_change_nothing(bench: Bench) -> None:
    """Only the worker that offered can send, commit, renew or abort."""
    bench.offer(4)
    bench.pages(0, 0, sender="other")
    bench.commit(0, sender="other")
    bench.receiver.handle("other", Abort(request_id="r", attempt=0, cause="cancelled"))
    bench.receiver.handle("other", Renew(handoffs=[("r", 0, 0)]))
    assert bench.sent[1:] == [("other", Released(request_id="r", attempt=0))]
    assert [sender for sender, _ in bench.refused] == ["other"] * 3
    bench.deliver()
    assert len(bench.received) == 1


def test_credit_comes_where_it_is_wanted(bench: Bench) -> None:
    """One Credit covers all pages before it."""
    bench.offer(4)
    for layer in range(NUM_LAYERS):
        message = pages_message(layer, layer, bytes(PAGE_BYTES), credit_wanted=layer == 1)
        bench.receiver.arrivals.on_frame(PREFILL, encode(message), BytesPayload(bytes(PAGE_BYTES)))
    assert [message.sequence for _, message in bench.sent if isinstance(message, Credit)] == [2]


def test_a_silent_handoff_loses_its_lease(bench: Bench) -> None:
    """Any state -> (none); pages or a Renew start the lease again."""
    bench.offer(4)
    bench.now += LEASE_SECONDS
    bench.pages(0, 0)
    bench.receiver.reap()
    bench.now += LEASE_SECONDS
    bench.receiver.handle(PREFILL, Renew(handoffs=[("r", 0, 0)]))
    bench.now += LEASE_SECONDS
    bench.receiver.reap()
    assert bench.receiver.num_open == 1
    bench.now += 0.1
    bench.receiver.reap()
    assert isinstance(bench.last, Abort)
    assert bench.last.cause == "lease"
    bench.assert_empty()


def test_a_newer_attempt_replaces_an_older_one(bench: Bench) -> None:
    """The older sender is told, and its pages serve the newer."""
    bench.offer(32)
    bench.offer(32, attempt=1, sender="prefill-2")
    (_, abort), (peer, grant) = bench.sent[-2:]
    assert isinstance(abort, Abort)
    assert (peer, isinstance(grant, Grant)) == ("prefill-2", True)
    assert bench.receiver.num_open == 1


def test_cancels_and_deaths_free_everything(bench: Bench) -> None:
    """Whoever goes, the receiver keeps nothing of theirs."""
    bench.offer(4, "a")
    bench.receiver.cancel("a", 5)
    bench.offer(4, "b", sender="prefill-2")
    bench.receiver.sender_left("prefill-2")
    bench.offer(4, "c")
    bench.receiver.cancel_gateway("gateway-1")
    bench.offer(4, "d")
    bench.receiver.handle(PREFILL, Abort(request_id="d", attempt=0, cause="sender_failed"))
    aborted = [(peer, message.request_id) for peer, message in bench.sent if isinstance(message, Abort)]
    assert aborted == [(PREFILL, "a"), (PREFILL, "c")]
    assert bench.receiver.aborts == {"cancelled": 2, "sender_failed": 2}
    bench.assert_empty()


def test_a_cancelled_request_is_not_taken_afterwards(bench: Bench) -> None:
    """The cancel may overtake the offer."""
    bench.receiver.cancel("r", 0)
    bench.offer(4)
    assert refuse_cause(bench) == "stale"


def test_a_renewal_is_answered_with_what_may_be_lost(bench: Bench) -> None:
    """The Grant before the first pages, the newest Credit after them, an Abort for what is unknown."""
    bench.offer(4)
    bench.receiver.handle(PREFILL, Renew(handoffs=[("r", 0, 0), ("x", 0, 0)]))
    assert bench.sent[1] == bench.sent[0]
    assert bench.sent[2] == (PREFILL, Abort(request_id="x", attempt=0, cause="unknown"))
    bench.pages(0, 0)
    bench.receiver.handle(PREFILL, Renew(handoffs=[("r", 0, 1)]))
    assert bench.last == Credit(request_id="r", attempt=0, sequence=1)


def test_lost_pages_are_waited_for_no_longer_than_a_lease(bench: Bench) -> None:
    """Renew does not help what is on the way; pages that come do."""
    bench.offer(4)
    for sequence in (0, 1):
        bench.pages(sequence, sequence)
        bench.receiver.reap()  # as its timer does every second: it sees that pages came
        bench.now += LEASE_SECONDS
        bench.receiver.handle(PREFILL, Renew(handoffs=[("r", 0, 3)]))
        bench.receiver.reap()
    assert bench.receiver.num_open == 1
    bench.now += 0.1
    bench.receiver.reap()
    assert bench.receiver.aborts == {"lease": 1}
    bench.assert_empty()


def test_a_repeated_commit_is_acknowledged_again(bench: Bench) -> None:
    """The Ack was lost; the prompt is decoded once. Nobody else's commit, or another attempt's, is."""
    bench.offer(4)
    bench.deliver()
    bench.commit(NUM_LAYERS)
    assert bench.sent[-1] == bench.sent[-2] == (PREFILL, Ack(request_id="r", attempt=0))
    assert len(bench.received) == 1
    bench.commit(NUM_LAYERS, sender="other")
    assert bench.last == Abort(request_id="r", attempt=0, cause="unknown")
    bench.receiver.cancel("r", 1)
    bench.commit(NUM_LAYERS)
    assert bench.last == Abort(request_id="r", attempt=0, cause="unknown")


def test_what_may_not_wait_is_refused_where_it_would(bench: Bench) -> None:
    """For pages, for a place in the batch, or behind others."""
    offer = msgspec.structs.replace(make_offer(range(9), "r"), may_wait=False, coming=8)
    bench.receiver.room.reserve_pages = 4
    bench.receiver.handle("decode-2", offer)
    assert refuse_cause(bench) == "full"
    bench.receiver.room.reserve_pages, bench.receiver.room.seats = 3, 0
    bench.receiver.handle("decode-2", offer)
    assert refuse_cause(bench) == "full"
    bench.receiver.room.seats = 1
    bench.receiver.handle("decode-2", offer)
    assert isinstance(bench.last, Grant)
    assert bench.pool.num_in_use == 5
    bench.receiver.handle("decode-2", Abort(request_id="r", attempt=0, cause="sender_failed"))
    bench.assert_empty()


@pytest.mark.parametrize("came", [[], [1, 2], [1, 1000, 3]], ids=["none", "too few", "unknown"])
def test_a_commit_without_just_the_tokens_that_were_coming_is_refused(bench: Bench, came: list[int]) -> None:
    """And counted: no honest worker sends it."""
    bench.receiver.handle("decode-2", msgspec.structs.replace(make_offer([5], "r"), coming=3))
    for layer in range(NUM_LAYERS):
        bench.pages(layer, layer, sender="decode-2")
    commit = Commit(request_id="r", attempt=0, sequence=NUM_LAYERS, token_id=5, logprobs=None, came=came)
    bench.receiver.handle("decode-2", commit)
    assert isinstance(bench.last, Abort)
    assert len(bench.refused) == 1
    bench.assert_empty()


def test_tokens_that_came_are_part_of_what_is_received_and_of_what_can_be_found(bench: Bench) -> None:
    """Their page's hash covers them."""
    bench.receiver.handle("decode-2", msgspec.structs.replace(make_offer([5], "r"), coming=3))
    for layer in range(NUM_LAYERS):
        bench.pages(layer, layer, sender="decode-2")
    commit = Commit(request_id="r", attempt=0, sequence=NUM_LAYERS, token_id=9, logprobs=None, came=[6, 7, 8])
    bench.receiver.handle("decode-2", commit)
    (request,) = bench.received
    assert (request.token_ids, request.generated) == ([5, 6, 7, 8], 3)
    assert bench.pool.match_prefix(bench.pool.hashes([5, 6, 7, 8])) == request.pages


def test_an_attempt_that_its_sender_gave_up_may_come_from_another(bench: Bench) -> None:
    """An entry that went back to the queue, or a request that moves elsewhere after all."""
    bench.offer(4)
    bench.receiver.handle(PREFILL, Abort(request_id="r", attempt=0, cause="sender_failed"))
    bench.offer(4, sender="prefill-2")
    assert isinstance(bench.last, Grant)


def test_a_worker_that_stops_sends_those_away_who_wait(bench: Bench) -> None:
    """Their senders ask elsewhere at once; what was granted still arrives."""
    bench.offer(4)
    bench.offer(32, "long")
    bench.receiver.stop()
    assert refuse_cause(bench) == "stopping"
    assert (bench.receiver.num_waiting, bench.receiver.num_open) == (0, 1)
    bench.deliver()
    assert len(bench.received) == 1


def test_what_has_not_arrived_when_time_is_up_is_given_up(bench: Bench) -> None:
    """Nothing is handed over, and nothing held, once nobody would run it; the sender learns of it at once."""
    bench.offer(4)
    bench.receiver.stop()
    bench.receiver.give_up()
    assert bench.last == Abort(request_id="r", attempt=0, cause="receiver_failed", message="this worker stops")
    bench.deliver()
    assert bench.received == []
    bench.assert_empty()


def test_a_prompt_that_is_offered_in_place_is_computed_here(bench: Bench) -> None:
    """RECEIVING -> (none): the next one finds its pages, all but what its last token is in."""
    prompt = list(range(5))
    bench.offer_in_place(prompt)
    assert bench.last == Grant(request_id="r", attempt=0, held_pages=0, window_bytes=0)
    (computing,) = bench.prompts
    assert (computing.missing, len(computing.pages)) == (5, 2)
    assert computing.begin()
    computing.end(7)
    assert isinstance(bench.last, Ack)
    (received,) = bench.received
    assert (received.commit.token_id, received.token_ids, received.generated) == (7, prompt, 0)
    bench.receiver.handle(PREFILL, Renew(handoffs=[("r", 0, 0)]))
    assert isinstance(bench.last, Ack)
    bench.offer_in_place([*range(8)], attempt=1)
    assert (bench.prompts[1].missing, bench.prompts[1].pages[0]) == (4, received.pages[0])


def test_a_prompt_that_is_computed_here_is_kept_until_the_pass_has_ended(bench: Bench) -> None:
    """DRAINING: the device writes to its pages though nobody waits for it; one that has not begun never does."""
    bench.offer_in_place([1, 2, 3])
    assert bench.prompts[0].begin()
    bench.receiver.cancel("r", 0)
    assert bench.pool.num_in_use == 1
    bench.prompts[0].end(7)
    assert (bench.received, bench.pool.num_in_use) == ([], 0)
    bench.offer_in_place([1, 2, 3], attempt=1)
    bench.receiver.handle(PREFILL, Abort(request_id="r", attempt=1, cause="sender_failed"))
    assert isinstance(bench.last, Released)
    assert not bench.prompts[1].begin()
    bench.assert_empty()


def test_a_pass_that_fails_aborts(bench: Bench) -> None:
    """The prompt is computed elsewhere, in another attempt."""
    bench.offer_in_place([1, 2, 3])
    assert bench.prompts[0].begin()
    bench.prompts[0].end(None)
    assert bench.last == Abort(
        request_id="r", attempt=0, cause="receiver_failed", message="the prompt could not be computed"
    )
    bench.assert_empty()


def test_a_renewed_prompt_keeps_its_lease_however_long_its_pass_waits(bench: Bench) -> None:
    """Nothing is on the way to here."""
    bench.offer_in_place([1, 2, 3])
    for _ in range(3):
        bench.now += LEASE_SECONDS
        bench.receiver.handle(PREFILL, Renew(handoffs=[("r", 0, 0)]))
        bench.receiver.reap()
    assert bench.receiver.num_open == 1
    bench.now += LEASE_SECONDS + 0.1
    bench.receiver.reap()
    assert bench.receiver.aborts == {"lease": 1}
    bench.assert_empty()


def test_what_is_not_for_computing_here_is_refused(bench: Bench) -> None:
    """Too much of it is missing, it would have to wait, or it makes no sense."""
    bench.offer_in_place(list(range(6)))
    assert refuse_cause(bench) == "full"
    bench.receiver.room.reserve_pages = 8
    bench.offer_in_place([1])
    assert refuse_cause(bench) == "full"
    bench.receiver.room.reserve_pages = 0
    bench.receiver.handle(PREFILL, msgspec.structs.replace(make_offer([1]), in_place=True))
    assert refuse_cause(bench) == "invalid"
    bench.offer_in_place([1])
    bench.commit(0)
    assert "not granted" in bench.refused[-1][1]
    assert (len(bench.prompts), bench.received) == (1, [])
