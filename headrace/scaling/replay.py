"""What became of the requests of a trace, simulated or measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from headrace.scaling.policy import ScaledTier, Targets
from headrace.scaling.trace import TraceRequest

PERCENTILES = (50, 90, 99)


@dataclass(eq=False, slots=True)
class Served:
    """One request's fate. Times are seconds of the trace; None where it did not come to that."""

    request: TraceRequest
    first_at: float | None = None
    ended_at: float | None = None

    @property
    def ttft(self) -> float | None:
        """Seconds to the first token."""
        return None if self.first_at is None else self.first_at - self.request.at

    @property
    def itl(self) -> float | None:
        """Mean seconds between tokens; None where there are not two."""
        if self.first_at is None or self.ended_at is None or self.request.output_tokens < 2:
            return None
        return (self.ended_at - self.first_at) / (self.request.output_tokens - 1)


@dataclass(frozen=True)
class Replay:
    """What a simulation gave."""

    served: list[Served]
    seconds: float
    """From the first request to the end of the last."""
    workers: list[tuple[float, dict[ScaledTier, int]]]
    """(when, how many from then on); a colocated worker counts in both tiers."""
    worker_seconds: float
    refused: int
    """Requests that no worker could ever hold."""

    def attainment(self, targets: Targets) -> float:
        """Share of all requests, refused ones too, that met both targets."""
        met = sum(
            s.ended_at is not None and (s.ttft or 0.0) <= targets.ttft and (s.itl or 0.0) <= targets.itl
            for s in self.served
        )
        return met / len(self.served)

    def percentiles(self, of: Literal["ttft", "itl"]) -> dict[int, float] | None:
        """Seconds, by percentile; None where there is nothing to tell."""
        values = [value for served in self.served if (value := getattr(served, of)) is not None]
        if not values:
            return None
        found = np.percentile(values, PERCENTILES)
        return {percent: float(value) for percent, value in zip(PERCENTILES, found, strict=True)}
