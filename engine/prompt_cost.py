"""What prompts cost on a device: seconds of a pass by its prompt tokens, as a line through what was measured."""

from __future__ import annotations

from dataclasses import dataclass

MEMORY = 0.95
"""What a pass's weight is worth at the next one."""
SPREAD = 0.01
"""Variance of the tokens over their mean's square, below which passes are too much alike to tell base from slope."""


@dataclass(frozen=True)
class CostLine:
    """Seconds of a pass: `base`, and `per_token` more for each of its tokens."""

    base: float
    per_token: float

    def seconds(self, tokens: float) -> float:
        """Of a pass of so many tokens."""
        return self.base + self.per_token * tokens


class PromptCost:
    """Least squares, of which old passes count less and less."""

    def __init__(self) -> None:
        self._weight = 0.0
        self._tokens = 0.0
        self._seconds = 0.0
        self._tokens_squared = 0.0
        self._tokens_seconds = 0.0

    def observe(self, tokens: int, seconds: float) -> None:
        """A pass computed so many prompt tokens in so many seconds."""
        self._weight = self._weight * MEMORY + 1.0
        self._tokens = self._tokens * MEMORY + tokens
        self._seconds = self._seconds * MEMORY + seconds
        self._tokens_squared = self._tokens_squared * MEMORY + tokens * tokens
        self._tokens_seconds = self._tokens_seconds * MEMORY + tokens * seconds

    def line(self) -> CostLine | None:
        """None while nothing was measured. Neither of its parts is negative."""
        if not self._weight:
            return None
        tokens, seconds = self._tokens / self._weight, self._seconds / self._weight
        variance = self._tokens_squared / self._weight - tokens * tokens
        slope = seconds / tokens
        if variance > SPREAD * tokens * tokens:
            measured = (self._tokens_seconds / self._weight - tokens * seconds) / variance
            slope = min(max(measured, 0.0), slope)
        return CostLine(max(seconds - slope * tokens, 0.0), slope)
