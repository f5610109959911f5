"""How fast full prefill steps are: what the gateways need to know how long a backlog will last."""

from __future__ import annotations

MEMORY = 0.9
"""What a step's weight is worth at the next one."""
FULL = 0.25
"""Part of its budget that a step must use to count: smaller ones say nothing about a backlog."""


class StepRate:
    """Tokens a second, large steps counting most."""

    def __init__(self) -> None:
        self.budget = 0
        """Tokens of a full step, as of the last one."""
        self._tokens = 0.0
        self._seconds = 0.0

    def observe(self, tokens: int, budget: int, seconds: float) -> None:
        """A step with room for `budget` tokens computed `tokens` of them."""
        self.budget = budget
        if tokens >= budget * FULL:
            self._tokens = self._tokens * MEMORY + tokens
            self._seconds = self._seconds * MEMORY + seconds

    def figures(self) -> dict[str, float]:
        """For the registry; what is not known yet is missing."""
        figures: dict[str, float] = {"prefill_step_tokens": self.budget} if self.budget else {}
        if self._seconds > 0:
            figures["prefill_tokens_per_second"] = round(self._tokens / self._seconds, 1)
        return figures
