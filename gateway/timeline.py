"""Where the time of one answer went, attempt by attempt: what the live page draws as a waterfall.

All times are milliseconds since the answer was asked for. Queue, prefill and handoff are told by the prefill worker
once they are over.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from headrace.messages.stream import PrefillReport
from headrace.queue import DELIVERIES_PER_ATTEMPT


@dataclass
class AttemptSpan:
    """One way through the mesh, from the queue to the last token that it made."""

    begun: float
    redeliveries: int = 0
    """How often another prefill worker claimed the queue entry."""
    prefill_worker: str | None = None
    decode_worker: str | None = None
    queue_ms: float | None = None
    prefill_ms: float | None = None
    handoff_ms: float | None = None
    cached_tokens: int = 0
    first_token: float | None = None
    last_token: float | None = None
    tokens: int = 0
    accepted: int = 0
    """Those of `tokens` that were drafted."""
    failure: str | None = None
    """Why the answer had to go on elsewhere."""
    failed: float | None = None


@dataclass
class Timeline:
    """All attempts of one choice, the newest last. Their number is bounded as deliveries and requeues are."""

    created: float = field(default_factory=time.monotonic)
    attempts: list[AttemptSpan] = field(default_factory=lambda: [AttemptSpan(0.0)])

    @property
    def now(self) -> float:
        """Milliseconds since the answer was asked for."""
        return round((time.monotonic() - self.created) * 1000, 1)

    @property
    def accepted(self) -> int:
        """Tokens of all attempts that were drafted."""
        return sum(attempt.accepted for attempt in self.attempts)

    def follow(self, attempt: int) -> None:
        """A newer delivery of the entry took over."""
        if self.attempts[-1].queue_ms is not None:
            self.retry("another prefill worker claimed it")
        self.attempts[-1].redeliveries = attempt % DELIVERIES_PER_ATTEMPT

    def prefilled(self, report: PrefillReport, sender: str) -> None:
        """The prompt is computed, and handed over if there is anything to decode."""
        attempt = self.attempts[-1]
        attempt.prefill_worker, attempt.decode_worker = sender, report.decode_worker
        attempt.queue_ms, attempt.prefill_ms = round(report.queue_ms, 1), round(report.prefill_ms, 1)
        attempt.handoff_ms, attempt.cached_tokens = round(report.handoff_ms, 1), report.cached_tokens

    def tokens(self, count: int, decode_worker: str | None) -> None:
        """`count` new tokens came together: those of one step, whose last token is never a drafted one."""
        attempt = self.attempts[-1]
        attempt.decode_worker = decode_worker or attempt.decode_worker
        attempt.last_token = self.now
        if attempt.first_token is None:
            attempt.first_token = attempt.last_token
        attempt.tokens += count
        attempt.accepted += count - 1

    def retry(self, failure: str) -> None:
        """The attempt failed and another begins."""
        self.attempts[-1].failure, self.attempts[-1].failed = failure, self.now
        self.attempts.append(AttemptSpan(self.now))
