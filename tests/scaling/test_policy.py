"""The policy in a closed loop with a mesh that is a formula: constant loads, sudden loads, any signals."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.scaling.policy import TIERS, Bounds, Fleet, Signals, Targets, TierState, decide

TARGETS = Targets(ttft=0.5, itl=0.05)
LOOK_SECONDS = 5.0
START_SECONDS = 20.0
MOST = 40
RATE = 2000.0
SLOPE = 0.0005
"""Seconds that a row adds to a step."""


@dataclass
class Load:
    """What clients ask for: `prompts` in prefill workers, `rows` that decode at once, their `pages` in workers."""

    prompts: float
    rows: float
    pages: float
    base: float
    """Seconds of a decode step without rows."""
    flat: float
    """So many rows of a worker cost nothing."""
    alone_is_known: bool
    backlog: float = 0.0

    def step(self, rows: float) -> float:
        """Seconds of a decode step."""
        return self.base + SLOPE * max(rows - self.flat, 0.0)

    def signals(self, prefill: int, decode: int) -> Signals:
        """What so many workers would show; the backlog grows or shrinks for one look."""
        self.backlog = max(self.backlog + (self.prompts - prefill) * RATE * LOOK_SECONDS, 0.0)
        return Signals(
            prefill_workers=prefill,
            decode_workers=decode,
            backlog_tokens=self.backlog,
            prefill_rate=RATE,
            prefill_busy=1.0 if self.backlog else min(self.prompts / prefill, 1.0),
            pages_in_use=min(self.pages / decode, 1.0),
            inter_token=self.step(self.rows / decode) if self.rows else 0.0,
            inter_token_alone=self.step(1) if self.alone_is_known else 0.0,
        )


loads = st.builds(
    Load,
    prompts=st.floats(0, 30),
    rows=st.floats(0, 3000),
    pages=st.floats(0, 30),
    base=st.floats(0.001, 0.045),
    flat=st.sampled_from([0.0, 0.0, 8.0, 32.0]),
    alone_is_known=st.booleans(),
)


def run(load: Load, looks: int, fleet: Fleet, bounds: Bounds) -> list[dict[str, int]]:
    """How many workers there are after each look; those that are added serve `START_SECONDS` later."""
    history: list[dict[str, int]] = []
    serving = {tier: fleet[tier].workers for tier in TIERS}
    coming: list[tuple[float, str]] = []
    for look in range(looks):
        now = look * LOOK_SECONDS
        for at, tier in list(coming):
            if at <= now:
                serving[tier] += 1
                coming.remove((at, tier))
        fleet = decide(
            now, fleet, load.signals(serving["prefill"], serving["decode"]), TARGETS, dict.fromkeys(TIERS, bounds)
        )
        for tier in TIERS:
            expected = serving[tier] + sum(name == tier for _, name in coming)
            coming += [(now + START_SECONDS, tier)] * max(fleet[tier].workers - expected, 0)
            serving[tier] = min(serving[tier], fleet[tier].workers)
        history.append({tier: fleet[tier].workers for tier in TIERS})
    return history


def fleet_of(prefill: int, decode: int) -> Fleet:
    """Nothing was decided yet."""
    return {"prefill": TierState(prefill), "decode": TierState(decode)}


def turns(numbers: list[int]) -> int:
    """How often a row of numbers changes its direction."""
    signs = [b > a for a, b in itertools.pairwise(numbers) if a != b]
    return sum(a != b for a, b in itertools.pairwise(signs))


@settings(max_examples=80, deadline=None)
@given(load=loads, prefill=st.integers(1, MOST), decode=st.integers(1, MOST))
def test_a_constant_load_never_makes_a_tier_swing(load: Load, prefill: int, decode: int) -> None:
    """It grows once to clear what had piled up, shrinks to what the load needs, and stays."""
    load.flat = 0.0
    history = run(load, 600, fleet_of(prefill, decode), Bounds(most=MOST))
    for tier in TIERS:
        numbers = [looked[tier] for looked in history]
        assert turns(numbers) <= 1, numbers
        assert len(set(numbers[-100:])) == 1, numbers


@settings(max_examples=50, deadline=None)
@given(load=loads, workers=st.integers(1, MOST))
def test_uneven_steps_cost_a_few_wrong_tries_at_most(load: Load, workers: int) -> None:
    """Rows that cost nothing up to a point, and streams that last as long as steps make them."""
    rate = load.rows / 0.05
    fleet, turned, now = fleet_of(1, workers), [workers], 0.0
    for look in range(1000):
        now = look * LOOK_SECONDS
        decode = fleet["decode"].workers
        rows = 1.0
        for _ in range(60):
            rows = min(rate / decode * load.step(rows), 256.0)
        signals = Signals(1, decode, 0, RATE, 0.5, 0.5, load.step(rows), load.step(1))
        fleet = decide(now, fleet, signals, TARGETS, dict.fromkeys(TIERS, Bounds(most=MOST)))
        turned.append(fleet["decode"].workers)
    assert turns(turned) <= 12, turned


@settings(max_examples=80, deadline=None)
@given(load=loads)
def test_a_sudden_load_is_met_within_a_bound(load: Load) -> None:
    """A start, the time in which it shows, and two looks; where a stream alone was not timed yet, some rounds of it."""
    looks = math.ceil((START_SECONDS + Bounds.settle_seconds) / LOOK_SECONDS) + 2
    load.pages = min(load.pages, 0.9)
    after = run(load, looks * 8, fleet_of(1, 1), Bounds(most=MOST))[looks if load.alone_is_known else -1]
    assert after["prefill"] >= min(math.ceil(load.prompts), MOST)
    if load.rows and after["decode"] < MOST:
        assert load.step(load.rows / after["decode"]) <= TARGETS.itl * 1.001


@settings(max_examples=50, deadline=None)
@given(load=loads)
def test_a_load_beyond_all_pages_is_met_in_rounds(load: Load) -> None:
    """Full pages don't tell how many more there should be: each round adds a third, so it is logarithmic."""
    looks = math.ceil((START_SECONDS + Bounds.settle_seconds) / LOOK_SECONDS) + 2
    rounds = math.ceil(math.log(30, 4 / 3)) + 2
    final = run(load, looks * rounds, fleet_of(1, 1), Bounds(most=MOST))[-1]
    assert final["decode"] >= min(math.ceil(load.pages), MOST)
    assert final["prefill"] >= min(math.ceil(load.prompts), MOST)


any_signals = st.builds(
    Signals,
    prefill_workers=st.integers(0, 100),
    decode_workers=st.integers(0, 100),
    backlog_tokens=st.floats(0, 1e9),
    prefill_rate=st.floats(0, 1e6),
    prefill_busy=st.floats(0, 1),
    pages_in_use=st.floats(0, 1),
    inter_token=st.floats(0, 100),
    inter_token_alone=st.floats(0, 100),
)


@given(
    looks=st.lists(any_signals, min_size=1, max_size=30),
    least=st.integers(1, 5),
    room=st.integers(0, 20),
    workers=st.integers(0, 50),
)
def test_no_signals_lead_out_of_the_bounds(looks: list[Signals], least: int, room: int, workers: int) -> None:
    """Whatever is measured, and wherever it starts."""
    bounds = Bounds(least, least + room)
    fleet = fleet_of(workers, workers)
    for index, signals in enumerate(looks):
        fleet = decide(index * LOOK_SECONDS, fleet, signals, TARGETS, dict.fromkeys(TIERS, bounds))
        assert all(least <= fleet[tier].workers <= least + room for tier in TIERS)


def test_full_decode_pages_start_no_prefill_workers() -> None:
    """Prompts wait for pages then: whoever computed them would only hold them."""
    signals = Signals(2, 2, 50_000, 1000, 0.3, 1.0, 0.02)
    fleet = decide(0, fleet_of(2, 2), signals, TARGETS, dict.fromkeys(TIERS, Bounds()))
    assert fleet["prefill"].workers == 2
    assert fleet["decode"].workers == 3


def test_one_quiet_look_takes_nobody_away() -> None:
    """A tier shrinks only after a while of calm, and then to the most that the while has needed."""
    bounds = dict.fromkeys(TIERS, Bounds(calm_seconds=60))
    fleet = fleet_of(8, 8)
    for look, busy in enumerate([0.1, 0.1, 0.35, *[0.1] * 9]):
        fleet = decide(look * 5.0, fleet, Signals(8, 8, 0, 1000, busy, 0.8, 0.04), TARGETS, bounds)
        assert fleet["prefill"].workers == 8
    fleet = decide(60.0, fleet, Signals(8, 8, 0, 1000, 0.1, 0.8, 0.04), TARGETS, bounds)
    assert fleet["prefill"].workers == 6
