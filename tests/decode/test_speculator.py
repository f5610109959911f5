"""What is drafted, learned and counted between a scheduler and a drafter."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import msgspec

from headrace.decode.balance import MAX_STEPS_AHEAD
from headrace.decode.chain_choice import DeviceHead, ThreadChain
from headrace.decode.controller import HeadCost
from headrace.decode.drafter import Draft
from headrace.decode.ngram import NgramDrafter
from headrace.decode.sequence import Key, Sequence, Steps
from headrace.decode.speculator import Speculator
from headrace.decode.step_cost import StepCost
from headrace.engine.decode_batch import DecodeBatch, Verified
from headrace.engine.draft_head import MAX_HEAD_DEPTH
from headrace.kernels.draft_tree import CHOICES, chain, place_of
from headrace.messages.request import SamplingParams
from tests.kvtransfer.parts import make_offer

CHEAP = StepCost({1: 1.0, 2: 1.001}, 8)
DEAR = StepCost({1: 1.0, 2: 2.0}, 8)
LOOP = [5, 6, 7, 8] * 4


def request(tokens: list[int], name: str = "a", max_tokens: int = 100, generated: int = 1) -> Sequence:
    """A request of the batch with this prompt and output."""
    sampling = SamplingParams(max_tokens=max_tokens)
    offer = msgspec.structs.replace(make_offer(tokens, name), generated=generated, sampling=sampling)
    return Sequence(offer, list(tokens), [], 10**6)


def speculator(cost: StepCost = CHEAP, max_model_len: int = 1000) -> Speculator:
    """With `ngram`."""
    return Speculator(NgramDrafter(), cost, max_model_len)


def test_a_request_that_repeats_itself_gets_a_draft() -> None:
    """One that does not gets none."""
    drafts = speculator().propose([request(LOOP), request([1, 2, 3], "b")])
    assert list(drafts) == [("a", 0)]
    assert drafts["a", 0] == [5, 6, 7, 8] * (len(drafts["a", 0]) // 4) + [5, 6, 7][: len(drafts["a", 0]) % 4]


def test_drafts_that_do_not_pay_are_left_away() -> None:
    """A drafted token costs as much as a step of its own."""
    assert speculator(DEAR).propose([request(LOOP)]) == {}


def test_a_draft_leaves_room_for_the_steps_own_token() -> None:
    """Neither `max_tokens` nor the model's length is passed."""
    assert len(speculator().propose([request(LOOP, max_tokens=10, generated=7)])["a", 0]) == 2
    assert speculator().propose([request(LOOP, max_tokens=10, generated=9)]) == {}
    assert len(speculator(max_model_len=len(LOOP) + 2).propose([request(LOOP)])["a", 0]) == 1
    assert speculator(max_model_len=len(LOOP) + 1).propose([request(LOOP)]) == {}


def test_accepted_tokens_are_counted_also_of_a_request_that_ended() -> None:
    """Each step's first token is no draft's."""
    speculating, sequence = speculator(), request(LOOP)
    drafts = speculating.propose([sequence])
    for token in (5, 6, 7):
        sequence.token_ids.append(token)
    speculating.ran(drafts, 0.5)
    again = speculating.propose([sequence])
    assert again["a", 0][:2] == [8, 5]
    sequence.token_ids.append(8)
    sequence.token_ids.append(5)
    speculating.ran(again, 0.25)
    assert speculating.propose([]) == {}
    speculating.ran({}, 0.125)
    counters = speculating.counters
    ngram = counters.of["ngram"]
    assert (ngram.accepted, ngram.drafts, counters.steps, counters.steps_without_drafts) == (3, 2, 3, 1)
    assert ngram.drafted == len(drafts["a", 0]) + len(again["a", 0])
    assert counters.verification_seconds == 0.75
    stats = speculating.stats()
    assert stats["speculation_ngram_accepted_total"] == 3
    assert stats["speculation_ngram_mean_accepted_length"] == 1.5


def test_guesses_that_were_not_verified_are_learned_from_too() -> None:
    """So that drafts come back where a request turns predictable."""
    between = StepCost({1: 1.0, 2: 1.7, 16: 11.5}, 8)
    speculating, sequence = speculator(between), request(LOOP)
    assert speculating.propose([sequence]) == {}
    for step in range(30):
        sequence.token_ids.append(5 + step % 4)
        drafts = speculating.propose([sequence])
    assert drafts


def test_a_key_that_comes_back_is_a_new_request() -> None:
    """A drafter forgets who is not in the batch."""
    speculating = speculator()
    assert speculating.propose([request(LOOP)])
    assert speculating.propose([request([1, 2, 3], "b")]) == {}
    assert speculating.propose([request([1, 2, 3, 4, 1, 2])])["a", 0][0] == 3


def test_a_step_waits_for_tokens_that_drafts_will_follow() -> None:
    """The first token of a guess is on its way, so one more is needed."""
    assert speculator().waits([request(LOOP)])
    assert not speculator(DEAR).waits([request(LOOP)])
    assert not speculator().waits([request(LOOP, max_tokens=10, generated=8)])


def test_steps_run_ahead_unasked_where_nothing_was_found() -> None:
    """More of them each time; a draft that is found resets that."""
    speculating, sequence = speculator(), request([1, 2, 3])
    looks = []
    for step in range(80):
        before = speculating.counters.drafting_seconds
        assert not speculating.waits([sequence])
        if speculating.counters.drafting_seconds != before:
            looks.append(step)
        sequence.token_ids.append(100 + step)
    gaps = [late - early for early, late in itertools.pairwise(looks)]
    assert gaps[:5] == [2, 4, 8, 16, 16]
    assert max(gaps) == MAX_STEPS_AHEAD + 1
    for token in LOOP:
        sequence.token_ids.append(token)
    assert any(speculating.waits([sequence]) for _ in range(MAX_STEPS_AHEAD + 1))
    assert speculating.propose([sequence])
    assert speculating.waits([sequence])


def ahead(sequence: Sequence, speculating: Speculator, right: bool, seconds: float = 1.1) -> int:
    """One more step while another is in flight, whose guesses all stand or none does; returns how far it guesses.
    `seconds`: what steps with guesses take, those without 1.0.
    """
    drafts = speculating.propose_ahead([sequence])
    depth, drafted = speculating.depth_on_device, drafts.get(sequence.key, [])
    length = sum(token % CHOICES == CHOICES - 1 for token in drafted)
    assert drafted[:length] == chain(length)
    step = len(sequence.token_ids)
    made = [1000 + step + at for at in range((length if right else 0) + 1)]  # of which nothing repeats
    tokens = [made[place_of(token)] if right and token in chain(length) else 1 for token in drafted]
    batch: Any = SimpleNamespace(verified={sequence.key: Verified(drafted, tokens, made)} if drafted else {})
    speculating.look(batch)
    speculating.ran(drafts, seconds if drafts or depth else 1.0)
    for token in made:
        sequence.token_ids.append(token)
    return depth


def test_a_head_on_the_device_guesses_as_deep_as_pays() -> None:
    """Nobody has seen its guesses before they are verified; when they fail it rests, and tries again now and then."""
    sequence = request([1, 2, 3], max_tokens=10_000)
    cost = StepCost({1: 1.0, 2: 1.001}, 8, {2: 2.0, 9: 2.0}, {2: 1.1, 9: 1.1})
    speculating = Speculator(NgramDrafter(), cost, 100_000, DeviceHead(HeadCost({1: 0.02}, 1)))
    assert speculating.propose([sequence]) == {}, "nothing was guessed yet"
    assert speculating.depth_on_device > 1
    assert not speculating.waits([sequence])
    for _ in range(40):
        deep = ahead(sequence, speculating, right=True)
    assert deep == MAX_HEAD_DEPTH
    of_head = speculating.counters.of["head"]
    assert of_head.accepted > 100
    depths = [ahead(sequence, speculating, right=False) for _ in range(2000)]
    assert 0 < sum(depth > 0 for depth in depths[-1000:]) <= 60
    several = [request([1, 2, 3]), request([4, 5, 6], "b")]
    assert speculating.propose(several) == {}
    assert speculating.depth_on_device == 0, "it guesses for one at most"


def test_steps_with_guesses_that_take_longer_than_at_the_start_do_not_make_others_seem_slow() -> None:
    """Three times as long, for 2.3 tokens: without a look at steps without any, these would be taken to have become
    slower, too.
    """
    sequence = request([1, 2, 3], max_tokens=10_000)
    cost = StepCost({1: 1.0, 2: 1.001}, 8, {2: 1.4, 9: 1.4}, {2: 1.4, 9: 1.4})
    speculating = Speculator(NgramDrafter(), cost, 100_000, DeviceHead(HeadCost({1: 0.02}, 1)))
    depths = [ahead(sequence, speculating, right=step % 6 == 0, seconds=3.0) for step in range(1500)]
    assert sum(depth > 0 for depth in depths[500:]) < 50
    assert cost.plain[1] < 1.1


def test_a_lookup_beats_the_head_where_it_is_worth_the_wait() -> None:
    """A long repetition is verified at once, while the head would go on guessing."""
    cost = StepCost({1: 1.0, 2: 1.001}, 8, {2: 1.3, 16: 1.3}, {2: 1.1, 16: 1.1})
    speculating = Speculator(NgramDrafter(), cost, 100_000, DeviceHead(HeadCost({1: 1.0}, 1)))
    sequence = request(LOOP * 3)
    assert speculating.waits([sequence])
    assert speculating.propose([sequence])["a", 0][:4] == [5, 6, 7, 8]


def test_a_lookup_beside_a_head_learns_from_what_came_while_steps_ran_ahead() -> None:
    """Looks are evidence also where the step that was looked ahead of was started before its tokens came."""
    cost = StepCost({1: 1.0, 2: 1.001}, 8, {2: 2.0, 16: 2.0}, {2: 1.1, 16: 1.1})
    speculating = Speculator(NgramDrafter(), cost, 100_000, DeviceHead(HeadCost({1: 1.0}, 1)))
    sequence = request([*range(100, 200)] * 3, max_tokens=1000)
    waited = []
    for step in range(40):
        sequence.steps = Steps(started=1)
        waited.append(speculating.waits([sequence]))
        speculating.propose_ahead([sequence])
        for token in range(3):
            sequence.token_ids.append(100 + (3 * step + token) % 100)
    assert not waited[0], "nothing is known of lookups yet"
    assert waited[-1]


def test_guesses_of_the_device_go_on_to_the_end_of_a_request() -> None:
    """Where few of those in flight stand, more are needed than if all did."""
    cost = StepCost({1: 1.0, 2: 1.001}, 8, {2: 1.1, 16: 1.1}, {2: 1.1, 16: 1.1})
    speculating = Speculator(NgramDrafter(), cost, 100_000, DeviceHead(HeadCost({1: 0.001}, 1)))
    sequence = request([1, 2, 3], max_tokens=20, generated=8)
    speculating.propose([sequence])
    sequence.steps, sequence.drafts_in_flight = Steps(started=1), 11
    assert speculating.propose_ahead([sequence])["a", 0]


class UselessHead:
    """Is never right, and takes half a step for a token."""

    name = "head"
    seconds = 0.0

    def draft(self, batch: DecodeBatch[Key], depth: int) -> dict[Key, Draft]:
        """As many tokens as asked for."""
        self.seconds = 0.5 * depth
        return {("a", 0): Draft([7] * depth, range(depth))} if depth else {}


def test_a_head_that_is_never_right_is_hardly_ever_tried() -> None:
    """So nobody is slower for it, and it is noticed when it becomes good."""
    head = UselessHead()
    cost = StepCost({1: 1.0, 2: 1.001}, 8)
    speculating = Speculator(NgramDrafter(), cost, 10**6, ThreadChain(head, HeadCost({1: 0.5})))
    sequence, batch, spent, tries = request([1, 2, 3], max_tokens=10**6), object.__new__(DecodeBatch), 0.0, 0
    for step in range(3000):
        drafts = speculating.propose([sequence])
        speculating.look(batch)
        speculating.ran(drafts, 1.0 + head.seconds)
        sequence.token_ids.append(step + 8)
        if step >= 1000:
            spent, tries = spent + head.seconds, tries + (head.seconds > 0)
    assert tries > 5
    assert spent < 0.003 * 2000


class DoubtfulHead:
    """Is always right, and in doubt behind its first token but for each fourth time; a token takes 0.3 of a step."""

    name = "head"
    seconds = 0.0

    def __init__(self, sequence: Sequence) -> None:
        self._sequence = sequence
        self._drafts = 0

    def draft(self, batch: DecodeBatch[Key], depth: int) -> dict[Key, Draft]:
        """Six tokens at most; each says how many there are before it."""
        self._drafts += 1
        length, said = min(depth, 1 if self._drafts % 4 else 6), len(self._sequence.token_ids)
        self.seconds = 0.003 * length
        return {("a", 0): Draft([*range(said, said + length)], range(0, 8 * length, 8))} if length else {}


def test_a_head_may_guess_deep_where_it_stops_by_itself() -> None:
    """Six tokens take two steps' time, but only now and then there are so many."""
    sequence, batch, deep = request([0, 1, 2], max_tokens=10**6), object.__new__(DecodeBatch), 0
    head, cost = DoubtfulHead(sequence), StepCost({1: 0.01, 8: 0.011}, 8)
    chain = ThreadChain(head, HeadCost({1: 0.003}))
    speculating = Speculator(NgramDrafter(), cost, 10**6, chain)
    for step in range(600):
        drafts = speculating.propose([sequence])
        for _ in range(1 + sum(map(len, drafts.values()))):
            sequence.token_ids.append(len(sequence.token_ids))
        speculating.look(batch)
        speculating.ran(drafts, 0.01 + head.seconds)
        deep += step >= 300 and chain.depth >= 6
    assert deep > 250
