"""What drafts of a worker came to."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass
class DrafterCounters:
    """Of one drafter, since the worker started."""

    drafted: int = 0
    """Tokens that were verified."""
    accepted: int = 0
    """Those of them that stood and were sent."""
    drafts: int = 0
    """Drafts that were verified, of at least one token."""


@dataclass
class Counters:
    """Since the worker started."""

    of: dict[str, DrafterCounters] = field(default_factory=lambda: defaultdict(DrafterCounters))
    """By drafter."""
    steps: int = 0
    steps_without_drafts: int = 0
    drafting_seconds: float = 0.0
    """Of what guesses before a step."""
    head_seconds: float = 0.0
    controlling_seconds: float = 0.0
    """Estimates and the choice of lengths."""
    verification_seconds: float = 0.0
    """All of the steps that verified drafts."""

    @property
    def total(self) -> DrafterCounters:
        """Of all drafters."""
        each = self.of.values()
        return DrafterCounters(
            sum(one.drafted for one in each), sum(one.accepted for one in each), sum(one.drafts for one in each)
        )

    def stats(self, drafters: Iterable[str]) -> dict[str, float]:
        """As metrics of a worker with these drafters."""
        stats = dict[str, float]()
        for name in drafters:
            one = self.of[name]
            stats |= {
                f"speculation_{name}_drafted_total": one.drafted,
                f"speculation_{name}_accepted_total": one.accepted,
                f"speculation_{name}_mean_accepted_length": one.accepted / max(one.drafts, 1),
            }
        return stats | {
            "speculation_steps_total": self.steps,
            "speculation_steps_without_drafts_total": self.steps_without_drafts,
            "speculation_drafting_seconds_total": self.drafting_seconds + self.head_seconds + self.controlling_seconds,
            "speculation_verification_seconds_total": self.verification_seconds,
        }
