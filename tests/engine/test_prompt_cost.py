"""A line through measured passes."""

from __future__ import annotations

import pytest

from headrace.engine.prompt_cost import CostLine, PromptCost


def _measured(*passes: tuple[int, float]) -> CostLine:
    cost = PromptCost()
    for tokens, seconds in passes:
        cost.observe(tokens, seconds)
    line = cost.line()
    assert line is not None
    return line


def test_base_and_slope_are_found() -> None:
    """Of passes that differ in size; those that are alike all count as slope."""
    line = _measured((10, 0.03), (100, 0.12), (300, 0.32))
    assert (line.base, line.per_token) == (pytest.approx(0.02), pytest.approx(0.001))
    assert line.seconds(50) == pytest.approx(0.07)
    assert _measured((100, 0.1), (101, 0.2)).seconds(200) == pytest.approx(0.3, rel=0.02)
    assert PromptCost().line() is None


def test_noise_makes_no_part_negative() -> None:
    """A long pass that was faster than a short one, or slower than in proportion."""
    assert _measured((10, 0.1), (100, 0.05)).per_token == 0.0
    assert _measured((10, 0.001), (100, 0.5)).base == 0.0


def test_what_is_measured_follows_the_machine() -> None:
    """Old passes fade."""
    cost = PromptCost()
    for seconds in [0.1] * 100 + [0.2] * 100:
        cost.observe(100, seconds)
    line = cost.line()
    assert line is not None
    assert line.seconds(100) == pytest.approx(0.2, rel=0.01)
