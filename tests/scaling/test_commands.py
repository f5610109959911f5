"""The commands as a user types them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from headrace.cli import EXIT_USAGE, main
from headrace.scaling.step_costs import Cost, StepCosts


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A trace of 40 short requests and the costs of a worker, as arguments."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    trace, costs = tmp_path / "trace.jsonl", tmp_path / "costs.json"
    line = '{{"timestamp": {}, "input_length": 50, "output_length": 20, "hash_ids": []}}\n'
    trace.write_text("".join(line.format(index * 200) for index in range(40)))
    StepCosts(machine="test", prefill=Cost([(1, 0.05)]), decode=Cost([(1, 0.01)])).write(costs)
    return [str(trace), "--step-costs", str(costs)]


def test_simulate_prints_workers_cost_and_attainment(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """For a person, and as JSON."""
    assert main(["simulate", *files, "--prefill", "1:4", "--decode", "2"]) == 0
    printed = capsys.readouterr().out
    assert "worker-seconds" in printed
    assert "100.0 % of the requests within 500 ms and 50 ms a token" in printed
    assert main(["simulate", *files, "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["requests"], summary["attainment"]) == (40, 1.0)
    assert summary["workers"] == [{"at": 0.0, "prefill": 1, "decode": 1}]
    assert summary["ttft"]["50"] == pytest.approx(0.05)
    assert main(["simulate", *files, "--colocate", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["worker_seconds"] < summary["worker_seconds"]


def test_plan_says_when_not_to_split(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """One worker has time for both."""
    assert main(["plan", *files, "--itl", "100ms"]) == 0
    assert "Don't split: 1 x" in capsys.readouterr().out
    assert main(["plan", *files, "--itl", "5ms", "--most", "4"]) == 0
    assert "No number of workers up to 4" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["scale", "decode=2", "--port", "9"], "no `headrace up` of yours runs"),
        (["scale", "decode"], "as decode=3"),
        (["autoscale", "--executor", "kubernetes"], "service account"),
        (["autoscale", "--port", "9"], "no `headrace up` of yours runs"),
        (["plan", "nothing.jsonl", "--step-costs", "nothing.json"], "can't read the trace"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(
    files: list[str], words: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """And ends with the exit code for that."""
    assert main(words) == EXIT_USAGE
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--ttft", "fast"], ["--prefill", "3:2"], ["--decode", "0"], ["--itl", "0ms"]])
def test_a_bad_value_is_refused_with_an_example(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """By argparse, before anything is done."""
    with pytest.raises(SystemExit):
        main(["autoscale", *words])
    assert "write" in capsys.readouterr().err
