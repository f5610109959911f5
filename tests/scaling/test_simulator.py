"""Traces are read and replayed: cases that can be computed by hand, and any trace at all."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.scaling.plan import advice, smallest_colocated, smallest_split
from headrace.scaling.policy import TIERS, Bounds, Targets
from headrace.scaling.simulator import Simulation
from headrace.scaling.step_costs import Cost, Handoff, Limits, StepCosts
from headrace.scaling.trace import TraceRequest, read_trace
from headrace.settings import SettingsError

TARGETS = Targets(ttft=1.0, itl=0.05)
COSTS = StepCosts(
    machine="test",
    prefill=Cost([(100, 0.1), (200, 0.2)]),  # 1 ms a token, 100 at least
    decode=Cost([(1, 0.01), (101, 0.11)], seconds_per_context=1e-6),
    handoff=Handoff(seconds=0.004, bytes_per_token=1000, bytes_per_second=1e6),
    limits=Limits(page_size=10, pages=1000, max_num_batched_tokens=200, max_num_prefills=4),
    overhead_seconds=0.002,
)


def served(trace: list[TraceRequest], prefill: int = 1, decode: int = 1) -> list[tuple[float, float]]:
    """Time to first token and inter-token time of each request."""
    found = Simulation(trace, COSTS, TARGETS, prefill, decode).run().served
    return [(s.ttft or -1.0, s.itl or -1.0) for s in found]


def test_one_request_takes_what_its_steps_cost() -> None:
    """150 tokens of prompt, their handoff, and two decode steps at 151 and 152 tokens of KV."""
    ((ttft, itl),) = served([TraceRequest(0.0, 150, 3)])
    assert ttft == pytest.approx(0.150 + 0.004 + 0.150 + 0.002)
    assert itl == pytest.approx(0.01 + 151.5e-6)


def test_a_long_prompt_goes_in_chunks_and_the_next_fills_the_last_one() -> None:
    """250 tokens are 200 and 50; 150 of the second one's fit beside the 50."""
    first, second = served([TraceRequest(0.0, 250, 1), TraceRequest(0.0, 150, 1)])
    assert first[0] == pytest.approx(0.4 + 0.004 + 0.250 + 0.002)
    assert second[0] == pytest.approx(0.4 + 0.004 + 0.150 + 0.002)


def test_a_second_prefill_worker_halves_the_wait() -> None:
    """Prompts that come together go to different workers."""
    trace = [TraceRequest(0.0, 200, 1), TraceRequest(0.0, 200, 1)]
    assert served(trace, prefill=1)[1][0] == pytest.approx(served(trace, prefill=2)[1][0] + 0.2)


def test_known_prefixes_are_not_computed_again() -> None:
    """The second prompt shares one hash id of 512 tokens, of which it is 510 long: all whole pages but the last."""
    trace = [TraceRequest(0.0, 510, 1, (7,)), TraceRequest(10.0, 510, 1, (7,)), TraceRequest(20.0, 510, 1, (8,))]
    times = [ttft for ttft, _ in served(trace)]
    assert times[0] == pytest.approx(0.2 + 0.2 + 0.11 + 0.004 + 0.51 + 0.002)
    assert times[1] == pytest.approx(0.1 + 0.004 + 0.51 + 0.002)
    assert times[2] == pytest.approx(times[0])


def test_rows_share_a_step() -> None:
    """Ten streams cost hardly more than one."""
    found = served([TraceRequest(0.0, 10, 50) for _ in range(10)])
    assert all(itl < 0.025 for _, itl in found)


def test_what_no_worker_could_hold_is_counted_and_misses_its_targets() -> None:
    """10,000 tokens of KV are there."""
    found = Simulation([TraceRequest(0.0, 9_999, 2), TraceRequest(0.0, 10, 2)], COSTS, TARGETS, 1, 1).run()
    assert found.refused == 1
    assert found.attainment(TARGETS) == 0.5


traces = st.lists(
    st.builds(
        TraceRequest,
        at=st.floats(0, 30),
        prompt_tokens=st.integers(1, 3000),
        output_tokens=st.integers(1, 400),
        hash_ids=st.lists(st.integers(0, 3), max_size=3).map(tuple),
    ),
    min_size=1,
    max_size=40,
)


@settings(max_examples=60, deadline=None)
@given(
    trace=traces, prefill=st.integers(1, 3), decode=st.integers(1, 3), mode=st.sampled_from(["fixed", "scaled", "both"])
)
def test_every_request_ends(trace: list[TraceRequest], prefill: int, decode: int, mode: str) -> None:
    """Whatever comes; and workers hold nothing afterwards."""
    bounds = dict.fromkeys(TIERS, Bounds(1, 6, calm_seconds=10)) if mode == "scaled" else None
    trace.sort(key=lambda request: request.at)
    simulation = Simulation(trace, COSTS, TARGETS, prefill, decode, bounds, colocated=mode == "both")
    found = simulation.run()
    assert all(s.ended_at is not None and s.ttft is not None and s.ttft > 0 for s in found.served)
    assert found.worker_seconds > 0
    for tier in TIERS:
        for worker in simulation._tiers[tier]:
            assert (worker.pages, worker.promised, worker.held, worker.kv_tokens) == (0, 0, 0, 0)


def test_a_growing_load_brings_workers_and_its_end_takes_them_away() -> None:
    """Ten prompts of 200 tokens a second are two workers' time."""
    trace = [TraceRequest(index * 0.1, 200, 2) for index in range(900)] + [TraceRequest(700.0, 10, 2)]
    found = Simulation(trace, COSTS, TARGETS, 1, 1, dict.fromkeys(TIERS, Bounds(1, 8))).run()
    counts = [workers["prefill"] for _, workers in found.workers]
    assert max(counts) >= 3
    assert counts[-1] == 1
    assert found.worker_seconds < 700 * 8


def test_a_plan_splits_only_where_that_needs_fewer_workers() -> None:
    """Short prompts and few: one worker for both. Prompts whose chunks don't fit between tokens: split."""
    few = [TraceRequest(index * 1.0, 20, 20) for index in range(20)]
    together = smallest_colocated(few, COSTS, Targets(0.5, 0.2), 0.95, 8)
    split = smallest_split(few, COSTS, Targets(0.5, 0.2), 0.95, 8)
    assert together is not None
    assert split is not None
    assert (together.workers, split.workers) == (1, 2)
    assert advice(together, split, 8).startswith("Don't split")
    many = [TraceRequest(index * 0.25, 190, 40) for index in range(80)]
    tight = Targets(1.5, 0.02)
    together, split = (
        smallest_colocated(many, COSTS, tight, 0.95, 12),
        smallest_split(many, COSTS, tight, 0.95, 12),
    )
    assert split is not None
    assert together is None or split.workers < together.workers
    assert advice(together, split, 12).startswith("Split")


def test_both_layouts_of_traces_are_read(tmp_path: Path) -> None:
    """Times are relative to the first request."""
    mooncake = tmp_path / "trace.jsonl"
    mooncake.write_text(
        '{"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47]}\n'
        '{"timestamp": 30535, "input_length": 6472, "output_length": 26, "hash_ids": [46]}\n'
    )
    assert read_trace(mooncake) == [
        TraceRequest(0.0, 6955, 52, (46, 47)),
        TraceRequest(pytest.approx(3.053), 6472, 26, (46,)),
    ]
    azure = tmp_path / "trace.csv"
    azure.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n"
    )
    assert read_trace(azure) == [TraceRequest(0.0, 374, 44), TraceRequest(pytest.approx(4.314579), 396, 109)]


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.jsonl", '{"timestamp": 0, "input_length": 0, "output_length": 1}', "line 1"),
        ("b.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,1,1", "line 2"),
        ("c.csv", "time,in,out\n1,2,3", "ContextTokens"),
        ("d.jsonl", "", "no requests"),
    ],
)
def test_a_bad_trace_says_where_and_what_is_expected(tmp_path: Path, name: str, text: str, says: str) -> None:
    """The error is for whoever brings their own trace."""
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(SettingsError, match=says):
        read_trace(path)


def test_costs_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    """They round-trip through their file; a typo does not pass."""
    path = tmp_path / "costs.json"
    COSTS.write(path)
    assert StepCosts.read(path) == COSTS
    path.write_text(path.read_text().replace("overhead_seconds", "overheads"))
    with pytest.raises(SettingsError, match="overheads"):
        StepCosts.read(path)
