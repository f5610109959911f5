"""Percentiles, intervals, what is in time, and the search for a rate."""

from __future__ import annotations

import numpy as np
import pytest

from headrace.loadtest.load.crew import Run
from headrace.loadtest.load.figures import Estimate, Limits, Overhead, numbers
from headrace.loadtest.load.messages import Done, Result
from headrace.loadtest.load.sse import read_stream
from headrace.loadtest.load.sweep import MAX_RUNS, RateSearch


def result(*times: float, tokens: int | None = None, sent: float = 0.0, failure: str = "") -> Result:
    """A request with text at these times."""
    return Result(0, sent, 0.0, list(times), times[-1] if times else 0.0, 10, tokens, failure)


def run_of(*results: Result, planned: int | None = None) -> Run:
    """A run of these."""
    return Run("server", 1.0, 0, planned or len(results), list(results), [Done(0.1, 1.0, [0.0], [0.0], 1)])


def test_the_figures_of_two_requests_can_be_computed_by_hand() -> None:
    """TPOT counts tokens as the server does; gaps are those between events."""
    run = run_of(result(0.1, 0.2, 0.4, tokens=4), result(0.3, 0.5, sent=0.5), result(failure="status 503", sent=0.1))
    figures = numbers(run, Limits(ttft=0.2))
    assert figures["TTFT mean", "ms"] == pytest.approx(200)
    assert figures["ITL mean", "ms"] == pytest.approx(500 / 3)
    assert figures["TPOT mean", "ms"] == pytest.approx((100 + 200) / 2)
    assert figures["output", "tokens/s"] == pytest.approx(6 / 1.0)
    assert figures["requests", "1/s"] == pytest.approx(2.0)
    assert figures["in time", "%"] == pytest.approx(100 / 3)
    assert figures["failed", "%"] == pytest.approx(100 / 3)


def test_one_late_token_spoils_a_request() -> None:
    """So do a late first token, a slow mean, a late end, and a failure."""
    good = result(0.1, 0.11, 0.12)
    assert Limits(0.1, 0.011, 0.011, 0.12).hold(good)
    assert not Limits(ttft=0.09).hold(good)
    assert not Limits(itl=0.02).hold(result(0.1, 0.11, 0.14))
    assert not Limits(tpot=0.019).hold(result(0.1, 0.11, 0.14))
    assert not Limits(e2e=0.11).hold(good)
    assert not Limits().hold(result(failure="status 503"))
    assert Limits(ttft=0.2).share_held([good], 4) == 0.25  # what was never sent was not in time


def test_intervals_hold_the_true_mean_as_often_as_they_say() -> None:
    """95 of 100, from four repeats each."""
    random = np.random.default_rng(1)
    estimates = [Estimate.of([float(value) for value in random.normal(10, 3, 4)]) for _ in range(2000)]
    held = sum(abs(e.value - 10) <= (e.spread or 0) for e in estimates)
    assert held / len(estimates) == pytest.approx(0.95, abs=0.02)
    assert Estimate.of([5.0]) == Estimate(5.0)


def test_ratios_are_taken_pair_by_pair() -> None:
    """A drift of the machine that meets both targets cancels out."""
    ratio = Estimate.ratio([2.0, 20.0, 200.0], [1.0, 10.0, 100.0])
    assert ratio is not None
    assert (ratio.value, ratio.spread) == (pytest.approx(2.0), pytest.approx(0.0, abs=1e-9))
    assert Estimate.ratio([0.0], [1.0]) is None


def test_a_busy_or_late_generator_is_told() -> None:
    """So that it is never the bottleneck unseen."""
    run = run_of(result(0.1, 0.12))
    assert Overhead.of([run]).warnings == ()
    run.generators = [Done(0.9, 1.0, [0.0], [0.02] * 100, 5), Done(0.1, 1.0, [0.0], [], 7)]
    run.results[0].late = 0.5
    cost = Overhead.of([run])
    assert (cost.cpu, cost.most_running, len(cost.warnings)) == (0.9, 12, 3)
    assert "core" in cost.warnings[0]
    assert "--processes" in cost.advice


@pytest.mark.parametrize(("capacity", "start"), [(37.0, 1.0), (37.0, 5000.0), (0.3, 2.0), (8.0, 8.0)])
def test_the_search_finds_the_highest_rate(capacity: float, start: float) -> None:
    """Within its precision, from below and from above."""
    search = RateSearch(start)
    runs = 0
    while search.rate is not None:
        search.tell(search.rate <= capacity)
        runs += 1
    assert capacity / 1.05 <= search.served <= capacity
    assert runs <= MAX_RUNS


def test_one_bad_run_does_not_mislead_the_search() -> None:
    """A pause of the machine is not the server's limit."""
    search = RateSearch(1.0)
    rates = []
    while search.rate is not None:
        rates.append(search.rate)
        search.tell(len(rates) % 4 != 1 and search.rate <= 37)
    assert 37 / 1.05 <= search.served <= 37


def test_a_server_that_serves_nothing_in_time_ends_the_search() -> None:
    """And one that serves everything does, too."""
    for serves in (False, True):
        search = RateSearch(1.0)
        while search.rate is not None:
            search.tell(serves)
        assert bool(search.served) is serves


def test_events_are_stamped_when_their_last_byte_came() -> None:
    """However pieces are cut; roles, comments and counts are no text."""
    stream = (
        b'data: {"choices":[{"delta":{"role":"assistant","content":""}}]}\n\n: ping\n\n'
        b'data: {"choices":[{"delta":{"content":"a"}}]}\r\n\r\n'
        b'data: {"choices":[{"delta":{"reasoning_content":"b"}}]}\n\n'
        b'data: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":3}}\n\ndata: [DONE]\n\n'
    )
    whole = read_stream([(1.0, stream)])
    assert (whole.times, whole.prompt_tokens, whole.output_tokens, whole.failure) == ([1.0, 1.0], 7, 3, "")
    bytewise = read_stream([(float(at), stream[at : at + 1]) for at in range(len(stream))])
    assert bytewise.times == [float(stream.index(mark) + len(mark)) for mark in (b'"a"}}]}\r', b'"b"}}]}')]


@pytest.mark.parametrize(
    ("stream", "failure"),
    [
        (b'data: {"choices":[{"text":"a"}]}\n\n', "without [DONE]"),
        (b"data: [DONE]\n\n", "without text"),
        (b"data: {]\n\n", "can't be read"),
        (b'data: {"error":{"message":"the worker died"}}\n\n', "the worker died"),
    ],
)
def test_a_broken_stream_is_no_answer(stream: bytes, failure: str) -> None:
    """The cause is told."""
    assert failure in read_stream([(0.0, stream)]).failure
