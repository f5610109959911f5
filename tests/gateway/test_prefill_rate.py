"""The rate that a backlog is divided by."""

from __future__ import annotations

import pytest

from headrace.gateway.prefill_rate import PrefillRate


class _Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> _Clock:
    """One that tests move."""
    return _Clock()


def _run(rate: PrefillRate, clock: _Clock, seconds: float, tokens_a_second: float, workers: float) -> None:
    rate.observe(0, workers)
    for _ in range(int(seconds * 10)):
        clock.now += 0.1
        rate.observe(int(tokens_a_second / 10), workers)


def test_a_backlog_shows_the_rate_whatever_the_workers_say(clock: _Clock) -> None:
    """Their own figure fills in for the first second; what limits them elsewhere is not in it."""
    rate = PrefillRate(clock)
    assert rate(2, None) is None
    assert rate(2, 3000.0) == 6000.0
    _run(rate, clock, 0.5, 500, workers=1)
    assert 1500 < (rate(1, 3000.0) or 0) < 2000
    _run(rate, clock, 1.0, 500, workers=1)
    assert rate(1, 3000.0) == pytest.approx(500, rel=0.1)
    assert rate(3, None) == pytest.approx(1500, rel=0.1)


def test_a_new_rate_is_learned_within_seconds(clock: _Clock) -> None:
    """Two memories later the old one counts for a seventh of what it did."""
    rate = PrefillRate(clock)
    _run(rate, clock, 20, 1000, workers=2)
    assert rate(2, None) == pytest.approx(1000, rel=0.02)
    _run(rate, clock, 20, 200, workers=2)
    assert (rate(2, None) or 0) < 320


def test_time_without_a_backlog_teaches_nothing(clock: _Clock) -> None:
    """A quiet hour leaves what the workers say."""
    rate = PrefillRate(clock)
    _run(rate, clock, 5, 1000, workers=1)
    rate.observe(0, 0.0)
    clock.now += 20
    rate.observe(64, 0.0)
    assert rate(1, 4000.0) == pytest.approx(1000, rel=0.02)
    clock.now += 3600
    assert rate(1, 4000.0) == pytest.approx(4000, rel=0.02)
