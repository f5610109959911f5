"""What a prefill worker says of its speed."""

from __future__ import annotations

from headrace.prefill.step_rate import StepRate


def test_only_steps_that_use_their_budget_tell_of_speed() -> None:
    """A warm-up of one token says nothing about a backlog; what was measured follows the machine."""
    rate = StepRate()
    assert rate.figures() == {}
    rate.observe(1, 512, 0.05)
    assert rate.figures() == {"prefill_step_tokens": 512}
    rate.observe(512, 512, 0.25)
    rate.observe(16, 512, 0.05)
    assert rate.figures()["prefill_tokens_per_second"] == 2048
    for _ in range(30):
        rate.observe(512, 512, 0.5)
    assert 1024 <= rate.figures()["prefill_tokens_per_second"] < 1100
