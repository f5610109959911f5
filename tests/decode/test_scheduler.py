"""Which requests a decode step runs, and who gives way when pages run out."""

from __future__ import annotations

from collections import deque

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from headrace.decode.scheduler import DecodeScheduler
from headrace.decode.sequence import Sequence
from headrace.engine.page_pool import PagePool
from headrace.kernels.draft_tree import chain
from headrace.messages.request import SamplingParams
from tests.kvtransfer.parts import PAGE_SIZE, make_offer


def arrived(pool: PagePool, name: str, tokens: int) -> Sequence:
    """A request as the receiver hands it over: pages for its prompt, and the first token."""
    offer = make_offer(range(tokens), name)
    return Sequence(offer, [*offer.token_ids, 7], pool.allocate(pool.pages_for(tokens)), 1000)


def step(scheduler: DecodeScheduler) -> None:
    """The step that was scheduled runs, and each request has its token."""
    scheduler.started()
    scheduler.collected()
    for sequence in scheduler.batch():
        sequence.token_ids.append(8)


def names(sequences: list[Sequence]) -> list[str]:
    """Their request ids."""
    return [sequence.offer.request_id for sequence in sequences]


def test_requests_join_in_order_up_to_the_limit() -> None:
    """The others wait and join when a place comes free."""
    pool = PagePool(8, PAGE_SIZE)
    scheduler = DecodeScheduler(pool, 2)
    for name in "abc":
        scheduler.add(arrived(pool, name, 2))
    assert names(scheduler.schedule().joins) == ["a", "b"]
    assert (scheduler.num_running, scheduler.num_ready) == (2, 1)
    scheduler.remove(("a", 0))
    plan = scheduler.schedule()
    assert (names(plan.joins), plan.leaves) == (["c"], [("a", 0)])


def test_a_request_gets_a_page_when_it_needs_one() -> None:
    """Neither earlier nor for a page that is not full yet."""
    pool = PagePool(4, PAGE_SIZE)
    scheduler = DecodeScheduler(pool, 2)
    sequence = arrived(pool, "a", PAGE_SIZE - 1)
    scheduler.add(sequence)
    assert scheduler.schedule().new_pages == {}
    assert len(sequence.pages) == 1
    step(scheduler)
    plan = scheduler.schedule()
    assert plan.new_pages == {("a", 0): sequence.pages[1:]}
    assert len(sequence.pages) == 2


def test_a_joining_request_brings_all_its_pages() -> None:
    """`new_pages` is about requests that run already."""
    pool = PagePool(4, PAGE_SIZE)
    scheduler = DecodeScheduler(pool, 2)
    sequence = arrived(pool, "a", PAGE_SIZE)
    scheduler.add(sequence)
    plan = scheduler.schedule()
    assert (plan.new_pages, len(plan.joins[0].pages)) == ({}, 2)


def test_the_youngest_gives_way_when_pages_run_out() -> None:
    """The oldest goes on with the youngest's pages."""
    pool = PagePool(3, PAGE_SIZE)
    scheduler = DecodeScheduler(pool, 4)
    old, young = arrived(pool, "old", PAGE_SIZE - 1), arrived(pool, "young", PAGE_SIZE + 1)
    scheduler.add(old)
    scheduler.add(young)
    scheduler.schedule()
    step(scheduler)
    plan = scheduler.schedule()
    assert names(plan.preempted) == ["young"]
    assert plan.leaves == [("young", 0)]
    assert list(plan.new_pages) == [("old", 0)]
    pool.check_integrity()


def test_a_request_given_up_before_it_ran_never_joins() -> None:
    """The engine hears of it neither as joined nor as left."""
    pool = PagePool(2, PAGE_SIZE)
    scheduler = DecodeScheduler(pool, 4)
    scheduler.add(arrived(pool, "old", 1))
    scheduler.schedule()
    scheduler.add(arrived(pool, "young", PAGE_SIZE))
    plan = scheduler.schedule()
    assert (names(plan.preempted), plan.joins, plan.leaves, plan.new_pages) == (["young"], [], [], {})


def test_removing_what_waits_concerns_no_engine() -> None:
    """A request that has not joined leaves without a trace; an unknown one is nothing to remove."""
    pool = PagePool(2, PAGE_SIZE)
    scheduler = DecodeScheduler(pool, 1)
    scheduler.add(arrived(pool, "a", 1))
    scheduler.remove(("a", 0))
    scheduler.remove(("b", 0))
    assert not scheduler.has_work
    assert pool.num_in_use == 0


@pytest.mark.parametrize(
    ("sampling", "tokens", "generated", "expected"),
    [
        (SamplingParams(max_tokens=9), [1, 2], 1, None),
        (SamplingParams(max_tokens=1), [1, 2], 1, "length"),
        (SamplingParams(max_tokens=9), [1] * 16, 1, "length"),
        (SamplingParams(max_tokens=9, stop_token_ids=(2,)), [1, 2], 1, "stop"),
        (SamplingParams(max_tokens=1, stop_token_ids=(2,)), [1, 2], 1, "stop"),
        (SamplingParams(max_tokens=9, stop_token_ids=(2,), min_tokens=1), [1, 2], 1, None),
        (SamplingParams(max_tokens=9, stop_token_ids=(2,), min_tokens=1), [1, 2, 2], 2, "stop"),
        (SamplingParams(max_tokens=9, stop_token_ids=(1,)), [1, 2], 1, None),
    ],
)
def test_a_sequence_knows_its_end(
    sampling: SamplingParams, tokens: list[int], generated: int, expected: str | None
) -> None:
    """A stop token wins over the length; `min_tokens` output tokens come before any stop."""
    offer = msgspec.structs.replace(make_offer(tokens), generated=generated, sampling=sampling)
    assert Sequence(offer, tokens, [0], 16).finish_reason() == expected


def test_tokens_after_the_last_one_are_dropped() -> None:
    """A draft may go on past a stop token; what follows is nobody's output."""
    sampling = SamplingParams(max_tokens=9, stop_token_ids=(2,))
    sequence = Sequence(msgspec.structs.replace(make_offer([1]), sampling=sampling), [1, 5], [0], 16)
    assert sequence.take([6, 7]) is None
    assert sequence.take([8, 2, 9]) == "stop"
    assert (sequence.token_ids, sequence.generated) == ([1, 5, 6, 7, 8, 2], 5)


def test_a_page_comes_free_when_no_step_can_write_to_it() -> None:
    """Not when its request ends, but when the step that was started with it has ended."""
    pool = PagePool(2, PAGE_SIZE)
    scheduler = DecodeScheduler(pool, 1)
    scheduler.add(arrived(pool, "a", 1))
    scheduler.schedule()
    scheduler.started()
    scheduler.remove(("a", 0))
    assert pool.num_in_use == 1
    assert scheduler.has_work
    scheduler.collected()
    assert pool.num_in_use == 0


def test_nobody_is_given_up_while_a_step_may_free_pages() -> None:
    """The step in flight is collected first; only then does the youngest give way."""
    pool = PagePool(2, PAGE_SIZE)
    scheduler = DecodeScheduler(pool, 2)
    sequences = [arrived(pool, name, PAGE_SIZE - 1) for name in "ab"]
    for sequence in sequences:
        scheduler.add(sequence)
    assert scheduler.schedule() is not None
    scheduler.started()
    assert scheduler.schedule() is None
    scheduler.collected()
    for sequence in sequences:
        sequence.token_ids.append(5)
    plan = scheduler.schedule()
    assert plan is not None
    assert names(plan.preempted) == ["b"]


def test_a_draft_gets_pages_and_a_refused_one_gives_them_back() -> None:
    """The block table grows before the step and shrinks before the next one."""
    pool = PagePool(8, PAGE_SIZE)
    scheduler = DecodeScheduler(pool, 2)
    sequence = arrived(pool, "a", PAGE_SIZE - 1)
    scheduler.add(sequence)
    scheduler.schedule()
    plan = scheduler.schedule()
    scheduler.reserve(plan, {("a", 0): [1] * (PAGE_SIZE + 1)})
    assert plan.drafts == {("a", 0): [1] * (PAGE_SIZE + 1)}
    assert plan.new_pages == {("a", 0): sequence.pages[1:]}
    assert len(sequence.pages) == 3
    step(scheduler)
    scheduler.roll_back(sequence)
    assert len(sequence.pages) == 2
    assert pool.num_in_use == 2
    plan = scheduler.schedule()
    assert (plan.kept_pages, plan.new_pages) == ({("a", 0): 2}, {})
    assert scheduler.schedule().kept_pages == {}


def test_pages_that_a_drafter_reads_into_come_with_the_step_before() -> None:
    """As far as they are spare; a request that is not drafted for keeps them until they are used."""
    pool = PagePool(4, PAGE_SIZE)
    scheduler = DecodeScheduler(pool, 2)
    for name in "ab":
        scheduler.add(arrived(pool, name, PAGE_SIZE - 1))
    plan = scheduler.schedule()
    scheduler.reserve(plan, {("a", 0): [1]}, {("a", 0): 2, ("b", 0): 5 * PAGE_SIZE})
    assert plan.drafts == {("a", 0): [1]}
    assert [len(sequence.pages) for sequence in scheduler.batch()] == [2, 2]
    assert plan.new_pages == {}


def test_pages_ahead_are_given_back_before_anybody_is_given_up() -> None:
    """One request has a page that it may need later, another needs one now."""
    pool = PagePool(3, PAGE_SIZE)
    scheduler = DecodeScheduler(pool, 2)
    for name, tokens in (("a", PAGE_SIZE - 3), ("b", PAGE_SIZE - 1)):
        scheduler.add(arrived(pool, name, tokens))
    plan = scheduler.schedule()
    scheduler.reserve(plan, {}, {("a", 0): 4})
    assert pool.num_free == 0
    step(scheduler)
    plan = scheduler.schedule()
    assert plan.preempted == []
    assert plan.kept_pages == {("a", 0): 1}
    assert list(plan.new_pages) == [("b", 0)]


def test_drafts_take_free_pages_only() -> None:
    """They are cut, or dropped, where pages run out; nobody gives way."""
    pool = PagePool(4, PAGE_SIZE)
    scheduler = DecodeScheduler(pool, 3)
    for name, tokens in (("a", PAGE_SIZE - 2), ("b", PAGE_SIZE - 1), ("c", PAGE_SIZE - 1)):
        scheduler.add(arrived(pool, name, tokens))
    plan = scheduler.schedule()
    scheduler.reserve(plan, {(name, 0): [1] * (2 * PAGE_SIZE) for name in "abc"})
    assert plan.preempted == []
    assert {key[0]: len(draft) for key, draft in plan.drafts.items()} == {"a": PAGE_SIZE + 1}
    assert plan.new_pages == {}
    assert pool.num_free == 0


class Batch(RuleBasedStateMachine):
    """A scheduler and an engine that believes its plans and starts steps before it collects those before them."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(6, PAGE_SIZE)
        self.scheduler = DecodeScheduler(self.pool, 3)
        self.engine: dict[tuple[str, int], list[int]] = {}
        self.in_flight: deque[dict[tuple[str, int], list[int]]] = deque()
        self.drafts: deque[dict[tuple[str, int], list[int]]] = deque()
        self.count = 0

    @rule(tokens=st.integers(1, 3 * PAGE_SIZE))
    def arrive(self, tokens: int) -> None:
        """A request whose pages fit."""
        if self.pool.pages_for(tokens) <= self.pool.num_free:
            self.count += 1
            self.scheduler.add(arrived(self.pool, str(self.count), tokens))

    @precondition(lambda self: self.scheduler.sequences())
    @rule(index=st.integers(0, 20))
    def end(self, index: int) -> None:
        """Any request ends or is cancelled, whether a step runs or not."""
        sequences = self.scheduler.sequences()
        self.scheduler.remove(sequences[index % len(sequences)].key)

    @precondition(
        lambda self: len(self.in_flight) < 2 and not any(any(t[0] >= 0 for t in d.values()) for d in self.drafts)
    )
    @rule(
        lengths=st.lists(st.integers(0, 9), max_size=3),
        ahead=st.integers(0, 5),
        guessed=st.booleans(),
        depth=st.integers(0, 4),
    )
    def start(self, lengths: list[int], ahead: int, guessed: bool, depth: int) -> None:
        """A step begins: the engine's pages are the scheduler's, and there is one for each token to be written.

        Drafts that the host knows there are while no other step runs, and no other step starts while they are verified.
        """
        oldest = self.scheduler.sequences()[:1]
        plan = self.scheduler.schedule()
        if plan is None:
            assert self.in_flight, "nothing to wait for"
            return
        if guessed or not self.in_flight:
            drafted = zip(self.scheduler.batch(), lengths, strict=False)
            drafts = {s.key: chain(length) if guessed else [5] * length for s, length in drafted if length}
            more = {} if guessed else {sequence.key: ahead for sequence in self.scheduler.batch()}
            self.scheduler.reserve(plan, drafts, more, depth if guessed else 0)
            assert plan.follows_tokens == (not guessed and bool(plan.drafts))
        for key in plan.leaves:
            del self.engine[key]
        for key, count in plan.kept_pages.items():
            del self.engine[key][count:]
        for key, pages in plan.new_pages.items():
            self.engine[key].extend(pages)
        for sequence in plan.joins:
            assert sequence.key not in self.engine
            self.engine[sequence.key] = list(sequence.pages)
        assert len(self.engine) == self.scheduler.num_running <= 3
        for key, pages in self.engine.items():
            sequence = self.scheduler.running(key)
            assert sequence is not None
            assert pages == sequence.pages
            assert sequence.pages_missing(PAGE_SIZE, len(plan.drafts.get(key, ()))) <= 0
        if oldest and oldest[0] in plan.preempted:
            assert self.scheduler.num_running == 0
        if self.engine:
            self.scheduler.started(plan.drafts)
            self.in_flight.append({key: list(pages) for key, pages in self.engine.items()})
            self.drafts.append(plan.drafts)

    @precondition(lambda self: self.in_flight)
    @rule(accepted=st.integers(0, 9))
    def collect(self, accepted: int = 0) -> None:
        """The oldest step ends; the requests that still run get a token each, and those of their drafts that stand."""
        step, drafts = self.in_flight.popleft(), self.drafts.popleft()
        assert self.scheduler.collected() == bool(drafts)
        for key in step:
            sequence = self.scheduler.running(key)
            if sequence is not None:
                for _ in range(1 + min(accepted, len(drafts.get(key, ())))):
                    sequence.token_ids.append(5)
                if drafts:
                    self.scheduler.roll_back(sequence)
                assert sequence.drafts_in_flight == sum(len(drafts.get(key, ())) for drafts in self.drafts)

    @precondition(lambda self: self.in_flight)
    @rule()
    def fail(self) -> None:
        """The device gives up: every request ends, and no step will be collected."""
        for sequence in self.scheduler.sequences():
            self.scheduler.remove(sequence.key)
        self.scheduler.abandon_steps()
        self.scheduler.schedule()
        self.engine.clear()
        self.in_flight.clear()
        self.drafts.clear()
        assert not self.scheduler.has_work
        assert self.pool.num_in_use == 0

    @invariant()
    def pages_are_conserved(self) -> None:
        """What is in use belongs to exactly one request, or to one that ended while a step may write to it."""
        self.pool.check_integrity()
        owner = {page: s.key for s in self.scheduler.sequences() for page in s.pages}
        assert len(owner) == sum(len(s.pages) for s in self.scheduler.sequences())
        retired = {page for step in self.in_flight for key, pages in step.items() for page in pages} - set(owner)
        assert self.pool.num_in_use <= len(owner) + len(retired)
        for step in self.in_flight:
            for key, pages in step.items():
                assert all(owner.get(page, key) == key for page in pages), "a page went to another while it is written"

    def teardown(self) -> None:
        """At the end no page is left."""
        for sequence in self.scheduler.sequences():
            self.scheduler.remove(sequence.key)
        while self.in_flight:
            self.collect()
        assert self.pool.num_in_use == 0


TestBatch = Batch.TestCase
TestBatch.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
