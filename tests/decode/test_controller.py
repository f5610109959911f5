"""The controller against a search through all lengths, and in simulations with known chances and costs."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from headrace.decode.balance import LOSS, MOST_OWED, MOST_SAVED, Balance
from headrace.decode.controller import GAIN, Acceptance, HeadCost, RequestAcceptance, best_lengths
from headrace.decode.drafter import MAX_DRAFT_TOKENS, Draft
from headrace.decode.step_cost import MAX_ROWS, PlainSteps, StepCost
from headrace.engine.draft_head import MAX_HEAD_DEPTH

MEASURED = {1: 41.0, 2: 40.0, 4: 49.0, 8: 59.0, 16: 82.0, 32: 140.0, 64: 237.0}
"""Milliseconds of the built-in model in float32 on two cores."""


def choose_lengths(drafts: Sequence[Sequence[float]], requests: int, cost: StepCost) -> list[int]:
    """Of steps that a head has no part in."""
    return best_lengths(drafts, requests, cost.verifying, requests / cost.plain[requests])[0]


chances = st.lists(st.floats(0.02, 1.0), max_size=4).map(lambda rates: list(itertools.accumulate(rates, float.__mul__)))


def test_costs_follow_what_steps_take() -> None:
    """Rows that are met change their own cost, all others' in time; single slow steps change nothing."""
    cost = StepCost({1: 1.0, 8: 1.0, 64: 1.0}, 64)
    for step in range(500):
        cost.observe(8, 100.0 if step % 10 == 0 else 2.0, "verifying")
        cost.observe(8, 1.5, "plain")
        cost.observe(1, 1.0, "plain")
    assert cost.plain[1] == pytest.approx(1.0, rel=0.05)
    assert cost.plain[8] == pytest.approx(1.5, rel=0.05)
    assert cost.verifying[8] == pytest.approx(2.0, rel=0.05)
    assert cost.verifying[64] > 1.9


def test_rows_that_were_never_met_do_not_raise_the_others() -> None:
    """The machine was busy when few rows were timed, and all steps have several times as many."""
    cost = StepCost({1: 20.0, 2: 21.0, 3: 22.0, 4: 23.0, 8: 30.0}, 8)
    for step in range(400):
        cost.observe(1 if step % 2 else 3, 5.5 if step % 2 else 7.0, "plain" if step % 2 else "verifying")
    assert cost.verifying[3] == pytest.approx(7.0, rel=0.05)
    assert cost.plain[1] == pytest.approx(5.5, rel=0.05)


def test_rows_that_were_timed_too_fast_are_found_out() -> None:
    """Twelve seemed to take as long as eight, on a machine whose speed changes all the time."""
    generator = random.Random(1)
    cost, chances = StepCost({1: 5.5, 4: 7.0, 8: 12.0, 12: 12.5, 32: 39.0}, 64), [[0.6]] * 8
    drafted = 0
    for step in range(600):
        rows = 8 + (sum(choose_lengths(chances, 8, cost)) if step % 64 else 0)
        drafted += (rows > 8) * (step >= 100)
        factor = 1.5 + 0.5 * (step // 50 % 2) + generator.gauss(0.0, 0.1)
        cost.observe(rows, (12.0 + 2.5 * (rows - 8)) * factor, "verifying" if rows > 8 else "plain")
    assert drafted <= 50


@given(st.lists(st.floats(-2.0, 2.0), max_size=300))
def test_no_more_is_lost_than_may_be(gains: list[float]) -> None:
    """Whatever drafts bring: while they lose there are pauses, which are over in time."""
    balance, lost, pause = Balance(), 0.0, 0
    for gain in gains:
        if balance.pauses:
            balance.add(0.0, 1.0)
            pause += 1
            assert pause <= 51
        else:
            balance.add(max(gain, -MOST_OWED), 1.0)
            lost, pause = lost - max(gain, -MOST_OWED), 0
    assert lost <= LOSS * len(gains) + MOST_OWED + MOST_SAVED + 1e-6


@given(st.lists(st.floats(-2.0, 2.0), max_size=30))
def test_steps_that_need_not_be_weighed_change_nothing(gains: list[float]) -> None:
    """However many of those are weighed together, each losing what it may, or nothing while there is a pause."""
    balance = Balance()
    for gain in gains:
        balance.add(gain, 1.0)
    pauses, steps = balance.pauses, balance.lasts(1.0)
    balance.add(0.0 if pauses else -MOST_OWED * steps, 1.0, steps - 1 if pauses else steps)
    assert balance.pauses == pauses
    assert not pauses or 0 < steps <= 51


def test_steps_without_drafts_come_ever_more_seldom() -> None:
    """After 16, 32 and so on up to 256 with drafts, two in a row."""
    plain, found = PlainSteps(in_a_row=2), list[int]()
    for step in range(1500):
        if plain.begin():
            found.append(step)
        else:
            plain.drafted()
    assert found[:6] == [16, 17, 50, 51, 116, 117]
    assert [late - early for early, late in itertools.pairwise(found[6::2])] == [258] * (len(found[6::2]) - 1)


def test_drafts_that_cost_more_than_was_measured_are_left_away() -> None:
    """They seemed to cost nothing, and hardly one is right."""

    def right(generator: random.Random, request: int, step: int) -> bool:
        return generator.random() < 0.1

    free = {rows: 41.0 + rows / 100 for rows in MEASURED}
    plain, _ = simulate(4, 3000, right, fixed=0)
    assert simulate(4, 3000, right, believed=free)[0] > 0.95 * plain


def test_what_was_slow_for_a_while_is_tried_again() -> None:
    """Steps with drafts take ten times as long during 600 steps; after another 2,000 they are chosen again."""
    cost, guess = StepCost(MEASURED, 64), [[0.9**length for length in range(1, 16)]]
    usual = choose_lengths(guess, 1, cost)
    for step in range(600):
        length = choose_lengths(guess, 1, cost)[0] if step % 64 else 0
        cost.observe(1 + length, 410.0 if length else 41.0, "verifying" if length else "plain")
    assert choose_lengths(guess, 1, cost) < usual
    for _ in range(2000):
        length = choose_lengths(guess, 1, cost)[0]
        cost.observe(1 + length, StepCost(MEASURED, 64).verifying[1 + length], "verifying" if length else "plain")
    assert choose_lengths(guess, 1, cost)[0] > usual[0] / 2


def test_costs_lie_on_lines_and_never_fall() -> None:
    """Where few rows seem to take longer than more of them, the more are right."""
    seconds = StepCost({1: 3.0, 2: 2.0, 4: 4.0}, 8).plain
    assert seconds[1:7] == [2.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    assert len(seconds) == MAX_ROWS + 1
    assert len(StepCost({1: 3.0, 2: 2.0}, 1000).verifying) == 1001
    assert StepCost({1: 5.0, 16: 20.0, 24: 40.0, 32: 36.0}, 64).verifying[64] == pytest.approx(68.0)


@given(
    drafts=st.lists(chances, max_size=3),
    more=st.integers(0, 3),
    slopes=st.lists(st.floats(0.1, 2), min_size=5, max_size=5),
)
@hypothesis_settings(deadline=None)
def test_no_choice_of_lengths_makes_more_tokens_a_second(
    drafts: list[list[float]], more: int, slopes: list[float]
) -> None:
    """All combinations are tried; drafts are left away where they gain less than `GAIN`."""
    requests = max(len(drafts) + more, 1)
    points = itertools.accumulate(slopes, initial=5.0)
    cost = StepCost(dict(zip((1, 2, 3, 5, 8, 20), points, strict=True)), 8)
    seconds = cost.plain

    def rate(lengths: tuple[int, ...]) -> float:
        expected = sum(sum(along[:length]) for along, length in zip(drafts, lengths, strict=True))
        return (requests + expected) / seconds[requests + sum(lengths)]

    chosen = tuple(choose_lengths(drafts, requests, cost))
    best = max(map(rate, itertools.product(*[range(len(along) + 1) for along in drafts])))
    nothing = rate((0,) * len(drafts))
    if any(chosen):
        assert rate(chosen) == pytest.approx(best)
        assert rate(chosen) > GAIN * nothing * 0.999
    else:
        assert best <= GAIN * nothing * 1.001


def test_a_head_costs_what_it_takes_and_never_less_than_was_measured() -> None:
    """Others take the cores for a while."""
    cost = HeadCost({1: 1.0, 4: 2.0})
    assert cost.of(4) == [2.0 * depth for depth in range(MAX_HEAD_DEPTH + 1)]
    for _ in range(100):
        cost.observe(2, 3, 8.0)
    assert cost.of(2)[3] == pytest.approx(8.0, rel=0.05)
    assert cost.of(2)[4] - cost.of(2)[3] == pytest.approx(4 / 3)
    for _ in range(200):
        cost.observe(1, 2, 0.5)
    assert cost.of(1)[1] == 1.0


def test_a_full_step_takes_no_drafts() -> None:
    """However sure they are and however little they cost."""
    cost = StepCost({1: 1.0, 2: 1.0}, 300)
    assert sum(choose_lengths([[1.0] * 4] * 50, MAX_ROWS - 100, cost)) == 100
    assert choose_lengths([[1.0] * 4] * 50, MAX_ROWS + 10, cost) == [0] * 50


def simulate(
    batch: int,
    steps: int,
    right: Callable[[random.Random, int, int], bool],
    fixed: int | None = None,
    believed: dict[int, float] = MEASURED,
) -> tuple[float, float]:
    """Tokens a second and the mean draft of `batch` requests that never end.

    `right(generator, request, step)`: whether a drafted token is right, if those before it are. `fixed`: a draft length
    without a controller. `believed`: what the controller takes for the costs at the start.
    """
    generator = random.Random(batch)
    seconds = StepCost(MEASURED, 64).plain
    cost = StepCost(believed, 64)
    acceptance = Acceptance()
    requests = [RequestAcceptance() for _ in range(batch)]
    tokens, drafted, elapsed = 0, 0, 0.0
    guess = Draft([1] * MAX_DRAFT_TOKENS, range(MAX_DRAFT_TOKENS))
    for step in range(steps):
        if fixed is None:
            along = [acceptance.chances(request, guess) for request in requests]
            lengths = choose_lengths(along, batch, cost)
        else:
            lengths = [fixed] * batch
        rows = batch + sum(lengths)
        elapsed += seconds[rows]
        cost.observe(rows, seconds[rows], "verifying" if rows > batch else "plain")
        drafted += sum(lengths)
        for number, length in enumerate(lengths):
            came = [1 if right(generator, number, step) else 0 for _ in range(length + 1)]
            stood = next((at for at, token in enumerate(came) if token == 0), length)
            came = came[: min(stood, length) + 1]
            tokens += len(came)
            acceptance.observe(requests[number], guess, came)
    return tokens / elapsed, drafted / batch / steps


@pytest.mark.parametrize("batch", [1, 4, 16, 64])
def test_drafts_that_are_never_right_cost_next_to_nothing(batch: int) -> None:
    """After the first few steps, plain decoding."""
    speed, _ = simulate(batch, 1000, lambda generator, request, step: False)
    plain, _ = simulate(batch, 1000, lambda generator, request, step: False, fixed=0)
    assert speed >= 0.99 * plain


@pytest.mark.parametrize("batch", [1, 2, 4, 16, 64])
@pytest.mark.parametrize("rate", [0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.97])
def test_with_a_constant_chance_the_controller_is_near_the_best_fixed_length(batch: int, rate: float) -> None:
    """Within 5 % of the best of all lengths, zero among them, without having been told the chance."""

    def right(generator: random.Random, request: int, step: int) -> bool:
        return generator.random() < rate

    steps = 2000 // batch
    longest = min(MAX_DRAFT_TOKENS, MAX_ROWS // batch - 1)
    best = max(simulate(batch, steps, right, fixed)[0] for fixed in range(longest + 1))
    assert simulate(batch, steps, right)[0] >= 0.95 * best


def test_requests_of_one_batch_have_their_own_lengths() -> None:
    """Half of the requests copy, half are never guessed: faster than any length for all."""

    def right(generator: random.Random, request: int, step: int) -> bool:
        return request % 2 == 0 and generator.random() < 0.95

    best = max(simulate(8, 300, right, fixed)[0] for fixed in range(MAX_DRAFT_TOKENS + 1))
    assert simulate(8, 300, right)[0] > 1.15 * best


def test_the_controller_follows_a_request_that_changes() -> None:
    """Every 60 steps a request begins or ends copying."""

    def right(generator: random.Random, request: int, step: int) -> bool:
        return step // 60 % 2 == 0 and generator.random() < 0.95

    speed, _ = simulate(1, 1200, right)
    plain, _ = simulate(1, 1200, right, fixed=0)
    best = max(simulate(1, 1200, right, fixed)[0] for fixed in range(1, MAX_DRAFT_TOKENS + 1))
    assert speed > 1.3 * plain
    assert speed > best


def test_chances_fall_along_a_draft_and_end_where_nothing_is_left() -> None:
    """A wrong token says something about its own depth alone."""
    acceptance, request = Acceptance(), RequestAcceptance()
    draft = Draft([1, 2, 3, 4], range(2, 6))
    for _ in range(10):
        acceptance.observe(request, draft, [1, 2, 9])
    along = acceptance.chances(request, draft)
    assert along[0] > along[1] > 0.9
    assert 0.02 < along[2] < 0.1
    newcomer = acceptance.chances(RequestAcceptance(), draft)
    assert 0.8 < newcomer[1] < along[1]
    assert along[2] < newcomer[2] < 0.2


def test_a_worker_of_one_request_has_one_cost_without_drafts() -> None:
    """And others with them."""
    cost = StepCost({1: 1.0}, 1, {2: 1.1, 16: 1.2})
    cost.observe(1, 1.0, "plain")
    assert cost.plain[1] == 1.0
    assert cost.verifying[16] == 1.2
    assert choose_lengths([[0.9] * 15], 1, cost) == [15]
