"""What decode steps take, for whoever scales the tier. Published through the registry."""

from __future__ import annotations

MEMORY = 0.05
"""Weight of a new measurement."""


class StepGauge:
    """The time between the ends of two decode steps: now, where one request runs alone, and in all."""

    def __init__(self) -> None:
        self._last: float | None = None
        self._gap = 0.0
        self._alone = 0.0
        self._steps = 0
        self._rows = 0
        self._seconds = 0.0

    def ended(self, now: float, rows: int) -> None:
        """A step of so many requests ended; `now` is seconds of any one clock."""
        if self._last is not None and rows:
            gap = now - self._last
            self._gap += (MEMORY if self._gap else 1.0) * (gap - self._gap)
            if rows == 1:
                self._alone += (MEMORY if self._alone else 1.0) * (gap - self._alone)
            self._steps += 1
            self._rows += rows
            self._seconds += gap
        self._last = now

    def rest(self) -> None:
        """There is nothing to decode: the next step follows none."""
        self._last = None
        self._gap = 0.0

    def stats(self) -> dict[str, float]:
        """By metric name; seconds are 0 where nothing runs, or never ran alone."""
        return {
            "inter_token_seconds": round(self._gap, 6),
            "inter_token_alone_seconds": round(self._alone, 6),
            "inter_token_steps_total": self._steps,
            "inter_token_step_requests_total": self._rows,
            "inter_token_step_seconds_total": round(self._seconds, 6),
        }
