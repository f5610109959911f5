"""What has left a prefill worker, in figures for `/metrics`."""

from __future__ import annotations

import time
from collections import Counter, deque

from headrace.kvtransfer.handoff import Handoff, State

WINDOW_SECONDS = 10.0
MEMORY = 0.1
"""Weight of a new handoff in a moving mean."""


class TransferStats:
    """Totals over all handoffs that ended."""

    def __init__(self) -> None:
        self.handoffs: Counter[str] = Counter()
        """Acknowledged ones, by transport."""
        self.aborts: Counter[str] = Counter()
        """By cause."""
        self.pages = 0
        self.bytes = 0
        self.repeats = 0
        """How often pages that did not come were sent again."""
        self.grant_wait_seconds = 0.0
        """From the Offer to the Grant."""
        self.exposed_seconds = 0.0
        """From the first token to the Ack: what the handoff adds to time to first token."""
        self.exposed_mean = 0.0
        """The same of one handoff, a moving mean."""
        self.grant_wait_mean = 0.0
        self._recent: deque[tuple[float, int]] = deque(maxlen=4096)

    def count(self, handoff: Handoff) -> None:
        """Add one that has ended, well or not."""
        self.pages += handoff.sent_pages
        self.bytes += handoff.sent_bytes
        self.repeats += handoff.repeats
        timings = handoff.timings
        if timings.granted:
            waited = timings.granted - timings.offered
            self.grant_wait_seconds += waited
            self.grant_wait_mean += (MEMORY if self.grant_wait_mean else 1.0) * (waited - self.grant_wait_mean)
        if handoff.state is State.DONE:
            self.handoffs[handoff.transport] += 1
            exposed = timings.acknowledged - timings.computed
            self.exposed_seconds += exposed
            self.exposed_mean += (MEMORY if self.exposed_mean else 1.0) * (exposed - self.exposed_mean)
            self._recent.append((timings.acknowledged, handoff.sent_bytes))
        else:
            self.aborts[handoff.abort_cause or "other"] += 1

    def gigabytes_per_second(self) -> float:
        """Over the last ten seconds, idle time counted in."""
        since = time.monotonic() - WINDOW_SECONDS
        return sum(size for ended, size in self._recent if ended >= since) / WINDOW_SECONDS / 1e9

    def figures(self) -> dict[str, float]:
        """By metric name."""
        figures: dict[str, float] = {
            "handoff_bytes_total": self.bytes,
            "handoff_pages_total": self.pages,
            "handoff_repeats_total": self.repeats,
            "handoff_gigabytes_per_second": round(self.gigabytes_per_second(), 3),
            "handoff_grant_wait_seconds_total": round(self.grant_wait_seconds, 6),
            "handoff_exposed_seconds_total": round(self.exposed_seconds, 6),
        }
        figures |= {f"handoff_transport_{name}_total": count for name, count in self.handoffs.items()}
        figures |= {f"handoff_aborts_{cause}_total": count for cause, count in self.aborts.items()}
        return figures
