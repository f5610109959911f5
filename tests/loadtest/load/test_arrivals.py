"""When requests come, and how long they are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from headrace.errors import StartError
from headrace.loadtest.load.arrivals import Lengths, Workload, arrival_times
from headrace.scaling.trace import TraceRequest, read_trace

COUNT = 20_000


def draws(text: str) -> np.ndarray:
    """Many lengths."""
    return np.array(Lengths.parse(text).draw(COUNT, np.random.default_rng(1)))


@pytest.mark.parametrize(("burstiness", "variation"), [(1.0, 1.0), (0.25, 4.0), (4.0, 0.25)])
def test_gaps_have_the_rate_and_the_burstiness_asked_for(burstiness: float, variation: float) -> None:
    """The squared coefficient of variation is 1 / burstiness; a Poisson process has 1."""
    gaps = np.diff(arrival_times(50.0, COUNT, np.random.default_rng(1), burstiness))
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.05)
    assert gaps.var() / gaps.mean() ** 2 == pytest.approx(variation, rel=0.1)


def test_a_poisson_process_has_as_many_arrivals_a_second_as_it_should() -> None:
    """Counts of a second vary as much as their mean, which no other spacing of this rate gives."""
    times = arrival_times(10.0, COUNT, np.random.default_rng(2))
    counts = np.bincount(np.array(times).astype(int))[:-1]
    assert counts.mean() == pytest.approx(10, rel=0.05)
    assert counts.var() == pytest.approx(10, rel=0.1)


@pytest.mark.parametrize("seed", range(5))
def test_a_run_has_the_rate_asked_for_and_not_about_that(seed: int) -> None:
    """Whatever the seed; within the run arrivals are where they would be without scaling."""
    times = np.array(arrival_times(16.0, 320, np.random.default_rng(seed)))
    assert 0 < times[0] < times[-1] < 20 < times[-1] + 1
    fractions = times / 20
    ranks = np.arange(1, 321) / 320
    assert np.abs(fractions - ranks).max() < 1.63 / np.sqrt(320)  # Kolmogorov and Smirnov, 1 %


def test_infinite_burstiness_is_a_metronome() -> None:
    """As in other tools."""
    assert np.diff(arrival_times(4.0, 9, np.random.default_rng(1), float("inf"))) == pytest.approx(0.25)


def test_lengths_follow_their_distribution() -> None:
    """Means, spreads and bounds."""
    assert set(draws("77")) == {77}
    uniform = draws("uniform:10:30")
    assert (uniform.min(), uniform.max()) == (10, 30)
    assert uniform.mean() == pytest.approx(20, rel=0.02)
    normal = draws("normal:500:50")
    assert (normal.mean(), normal.std()) == (pytest.approx(500, rel=0.01), pytest.approx(50, rel=0.05))
    lognormal = draws("lognormal:200:0.5:1000")
    assert np.median(lognormal) == pytest.approx(200, rel=0.03)
    assert np.log(lognormal).std() == pytest.approx(0.5, rel=0.05)
    assert lognormal.max() <= 1000
    assert draws("normal:3:50").min() == 1


@pytest.mark.parametrize(
    "text", ["", "0", "many", "-5", "uniform:9", "uniform:9:3", "normal:5", "zipf:1:2", "nan", "9:9"]
)
def test_a_length_that_makes_no_sense_is_refused_with_what_would(text: str) -> None:
    """All forms are named."""
    with pytest.raises(StartError, match="lognormal:MEDIAN:SIGMA"):
        Lengths.parse(text)


def test_a_seed_gives_the_same_plan_again() -> None:
    """And another one another."""
    workload = Workload(Lengths.parse("normal:100:20"), Lengths.parse("uniform:1:50"))
    assert workload.plan(5.0, 50, 3) == workload.plan(5.0, 50, 3) != workload.plan(5.0, 50, 4)
    assert all(planned.at is None for planned in workload.plan(None, 5, 3))


def test_a_trace_is_stretched_to_a_rate_and_starts_anew_at_its_end(tmp_path: Path) -> None:
    """Lengths and hashes stay with their requests."""
    path = tmp_path / "trace.jsonl"
    path.write_text(
        '{"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [1, 2]}\n'
        '{"timestamp": 1000, "input_length": 20, "output_length": 7, "hash_ids": [3]}\n'
    )
    trace = read_trace(path)
    assert trace[0] == TraceRequest(0.0, 600, 5, (1, 2))
    workload = Workload(Lengths.parse("1"), Lengths.parse("1"), trace=trace)
    assert workload.trace_rate == 2.0
    plan = workload.plan(4.0, 4, 1)
    assert [planned.at for planned in plan] == [0.0, 0.5, 0.5, 1.0]
    assert [planned.output_tokens for planned in plan] == [5, 7, 5, 7]
    assert plan[2].hash_ids == (1, 2)
