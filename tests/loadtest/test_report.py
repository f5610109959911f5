"""What a benchmark writes down."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from headrace.loadtest import report
from headrace.loadtest.prompts import sample_prompts, unique_tokens
from headrace.loadtest.report import Figure, publish


@pytest.mark.parametrize(
    ("value", "target", "met"),
    [(1.25, "<= 1.25", True), (1.26, "<= 1.25", False), (5.0, ">= 5", True), (0.0, "= 0", True), (None, ">= 1", None)],
)
def test_whether_a_target_is_met_follows_from_the_value(value: float | None, target: str, met: bool | None) -> None:
    """A figure that could not be taken is neither met nor missed."""
    assert Figure("x", value, "ratio", target).met is met


def test_results_are_written_with_machine_and_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file says what was measured, where and how."""
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    figures = [Figure("a", 2.0, "ms", "<= 3"), Figure("b", None, "ms", "<= 3", why="no GPU")]
    publish("demo", figures)
    written = json.loads((tmp_path / "demo.json").read_text())
    assert written["figures"][0] == {"name": "a", "value": 2.0, "unit": "ms", "target": "<= 3", "met": True}
    assert written["figures"][1]["why"] == "no GPU"
    assert {"commit", "machine", "card", "command", "date"} <= set(written)


def test_prompts_vary_and_stay_the_same() -> None:
    """No two are equal, both kinds are there, and a second call gives the same ones."""
    prompts = sample_prompts(50)
    assert len({prompt.text for prompt in prompts}) == 50
    assert {prompt.is_chat for prompt in prompts} == {True, False}
    assert prompts == sample_prompts(50)


def test_token_prompts_share_no_prefix() -> None:
    """So that no prefix cache can help a benchmark."""
    assert len({unique_tokens(8, number)[0] for number in range(20)}) > 15
