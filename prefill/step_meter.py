"""What prefill steps take, measured once for all who go by it.

Gateways want to know how long a backlog will last, so how fast full steps are; whoever scales the tier, how busy this
worker is, which two looks at its counters tell; and this worker, what one more prompt would take (`cost`).
"""

from __future__ import annotations

from headrace.engine.prompt_cost import PromptCost

MEMORY = 0.9
"""What a full step's weight is worth at the next one."""
FULL = 0.25
"""Part of its budget that a step must use to tell how fast full ones are."""


class StepMeter:
    """Of one worker."""

    def __init__(self) -> None:
        self.cost = PromptCost()
        self._tokens = 0
        self._prompts = 0
        self._busy_seconds = 0.0
        self._budget = 0
        """Tokens of a full step, as of the last one."""
        self._full_tokens = 0.0
        self._full_seconds = 0.0
        """Of full steps, old ones counting less."""
        self._last_end = 0.0

    def ran(self, tokens: int, prompts: int, budget: int, started: float, ended: float) -> None:
        """A step with room for `budget` tokens computed `tokens` of them and completed so many prompts.

        Times are seconds of any one clock. Steps in flight overlap: each counts from the end of the one before.
        """
        seconds = ended - max(started, self._last_end)
        self._last_end = ended
        self.cost.observe(tokens, seconds)
        self._tokens += tokens
        self._prompts += prompts
        self._busy_seconds += seconds
        self._budget = budget
        if tokens >= budget * FULL:
            self._full_tokens = self._full_tokens * MEMORY + tokens
            self._full_seconds = self._full_seconds * MEMORY + seconds

    def figures(self) -> dict[str, float]:
        """For the registry; what is not known yet is missing."""
        figures: dict[str, float] = {
            "prompt_tokens_total": self._tokens,
            "prompts_total": self._prompts,
            "prefill_busy_seconds_total": round(self._busy_seconds, 6),
        }
        if self._budget:
            figures["prefill_step_tokens"] = self._budget
        if self._full_seconds > 0:
            figures["prefill_tokens_per_second"] = round(self._full_tokens / self._full_seconds, 1)
        return figures
