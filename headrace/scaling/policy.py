"""How many workers each tier should have: a pure function of what was measured and what was decided before.

Prefill is sized by how busy its workers are, and by the backlog: what waits must be computed within the TTFT target.
Decode is sized by its pages and by the time between two tokens. Both tiers leave a gap between the load at which they
grow and the one at which they shrink, so that a constant load does not make them swing: after a change, either way, the
load lies between the two. Where steps are so uneven that a worker was taken away in error, the next try waits twice as
long.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

ScaledTier = Literal["prefill", "decode"]
TIERS: tuple[ScaledTier, ...] = ("prefill", "decode")

FULL, SIZED, SPARE = 0.85, 0.75, 0.7
"""Share of a tier's time or pages in use at which it grows, for which it is sized when it does, and that it may not
pass by shrinking."""
ITL_SPARE = 0.8
"""The same as the last, for the time between tokens: of what the target leaves for streams beside the first."""
MOST_REGRETS = 5
CROWDED = 0.95
"""Share of decode's pages in use at which prompts wait for them: more prefill workers would not help then."""


@dataclass(frozen=True)
class Signals:
    """One look at a mesh, averaged over a few seconds. Only workers that serve count."""

    prefill_workers: int
    decode_workers: int
    backlog_tokens: float
    """Prompt tokens that wait to be computed."""
    prefill_rate: float
    """Prompt tokens a second of one worker while it computes; 0 where none is known yet."""
    prefill_busy: float
    """Share of the time in which a worker computes, 0 to 1."""
    pages_in_use: float
    """Share of the decode workers' pages, 0 to 1."""
    inter_token: float
    """Seconds between two tokens of a stream; 0 where none runs."""
    inter_token_alone: float = 0.0
    """The same of a worker that runs one stream alone; 0 where that was not seen yet."""


@dataclass(frozen=True)
class Targets:
    """Seconds that clients should see at most."""

    ttft: float
    itl: float


@dataclass(frozen=True)
class Bounds:
    """Of one tier's workers, and how fast they may change."""

    least: int = 1
    most: int = 16
    settle_seconds: float = 15.0
    """After a change, before the next one up: what was started has to show in the signals."""
    calm_seconds: float = 60.0
    """So long fewer workers must have been enough before there are fewer."""


@dataclass(frozen=True)
class TierState:
    """What was decided for one tier so far. Times are seconds of any one clock."""

    workers: int
    changed_at: float = -math.inf
    calm_since: float | None = None
    """Since when fewer workers would have been enough."""
    calm_need: int = 0
    """How many would have been, at the most, since then."""
    shrank: bool = False
    """The last change took workers away."""
    regrets: int = 0
    """How often in a row some were taken away that were needed soon after: each time the next calm has to be twice as
    long."""


Fleet = dict[ScaledTier, TierState]


def decide(now: float, fleet: Fleet, signals: Signals, targets: Targets, bounds: dict[ScaledTier, Bounds]) -> Fleet:
    """The fleet as it should be from `now` on."""
    needs = {"prefill": _prefill_need(signals, targets), "decode": _decode_need(signals, targets)}
    return {tier: _scale(now, fleet[tier], needs[tier], bounds[tier]) for tier in TIERS}


@dataclass(frozen=True)
class _Need:
    """In workers. `grow` None: those there are suffice."""

    grow: int | None
    shrink: int
    """So many are enough, with room to spare."""


def _prefill_need(signals: Signals, targets: Targets) -> _Need | None:
    workers = signals.prefill_workers
    if not workers:
        return None
    load = workers * signals.prefill_busy
    behind = 0.0
    if signals.prefill_rate >= 1.0 and signals.pages_in_use < CROWDED:
        behind = signals.backlog_tokens / (signals.prefill_rate * targets.ttft)
    grow = _up(load / SIZED + behind) if load / FULL + behind > workers else None
    return _Need(grow, _up(load / SPARE + behind))


def _decode_need(signals: Signals, targets: Targets) -> _Need | None:
    workers = signals.decode_workers
    if not workers:
        return None
    pages = workers * signals.pages_in_use
    # More workers shorten only what a step takes beyond that of a stream alone. Where that alone takes longer than the
    # target, none would help; where it isn't known, taking it for 0 asks for too few and frees too few: the next look
    # tells. With fewer workers steps take longer, so streams last longer and there are more of them (Little's law):
    # hence the last factor.
    alone, now, target = signals.inter_token_alone, signals.inter_token, targets.itl
    steps = 0.0
    if now > alone and alone < target:
        steps = workers * (now - alone) / (target - alone) * max(target / now, 1.0)
    grow = _up(max(pages / SIZED, steps)) if max(pages / FULL, steps) > workers else None
    return _Need(grow, _up(max(pages / SPARE, steps / ITL_SPARE)))


def _up(workers: float) -> int:
    return math.ceil(workers - 1e-9)


def _scale(now: float, state: TierState, need: _Need | None, bounds: Bounds) -> TierState:
    bounded = min(max(state.workers, bounds.least), bounds.most)
    if bounded != state.workers:
        return TierState(bounded, now)
    if need is None:
        return replace(state, calm_since=None)
    calm_seconds = bounds.calm_seconds * 2**state.regrets
    if need.grow is not None:
        grown = min(need.grow, bounds.most)
        if grown > state.workers and now - state.changed_at >= bounds.settle_seconds:
            regrets_it = state.shrank and now - state.changed_at < 2 * calm_seconds
            return TierState(grown, now, regrets=min(state.regrets + 1, MOST_REGRETS) if regrets_it else state.regrets)
        return replace(state, calm_since=None)
    # Some at a time: how much slower the others become shows only then.
    enough = max(need.shrink, state.workers - max(state.workers // 4, 1), bounds.least)
    if enough >= state.workers:
        return replace(state, calm_since=None)
    if state.calm_since is None:
        return replace(state, calm_since=now, calm_need=enough)
    enough = max(enough, state.calm_need)
    if now - state.calm_since >= calm_seconds and now - state.changed_at >= calm_seconds:
        return TierState(enough, now, shrank=True, regrets=state.regrets)
    return replace(state, calm_need=enough)
