"""What a prefill worker says of its steps."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from headrace.prefill.step_meter import StepMeter


def running(meter: StepMeter) -> Callable[[int, int, float], None]:
    """Runs steps of (tokens, prompts, seconds) one right after the other, each with room for 512 tokens."""
    now = 0.0

    def run(tokens: int, prompts: int, seconds: float) -> None:
        nonlocal now
        meter.ran(tokens, prompts, 512, now, now + seconds)
        now += seconds

    return run


def test_counters_tell_how_busy_the_worker_was() -> None:
    """From two looks at them rates come."""
    meter = StepMeter()
    run = running(meter)
    run(512, 2, 0.5)
    run(88, 1, 0.1)
    assert list(meter.figures().values())[:3] == [600, 3, pytest.approx(0.6)]


def test_steps_in_flight_overlap() -> None:
    """One that was started early counts from the end of the one before."""
    meter = StepMeter()
    meter.ran(512, 1, 512, started=0.0, ended=0.5)
    meter.ran(512, 1, 512, started=0.1, ended=1.0)
    assert meter.figures()["prefill_busy_seconds_total"] == 1.0
    assert meter.figures()["prefill_tokens_per_second"] == 1024


def test_only_steps_that_use_their_budget_tell_of_speed() -> None:
    """A warm-up of one token says nothing about a backlog; what was measured follows the machine."""
    meter = StepMeter()
    run = running(meter)
    assert "prefill_step_tokens" not in meter.figures()
    run(1, 1, 0.05)
    assert meter.figures()["prefill_step_tokens"] == 512
    assert "prefill_tokens_per_second" not in meter.figures()
    run(512, 1, 0.25)
    run(16, 1, 0.05)
    assert meter.figures()["prefill_tokens_per_second"] == 2048
    for _ in range(30):
        run(512, 1, 0.5)
    assert 1024 <= meter.figures()["prefill_tokens_per_second"] < 1100


def test_all_steps_tell_what_one_more_prompt_would_take() -> None:
    """As a line through tokens and seconds."""
    meter = StepMeter()
    run = running(meter)
    for tokens in (10, 100, 500):
        run(tokens, 1, 0.01 + 0.0001 * tokens)
    line = meter.cost.line()
    assert line is not None
    assert line.seconds(200) == pytest.approx(0.03)
