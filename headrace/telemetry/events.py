"""What happens in a worker that metrics and traces tell of. Times are Unix time in seconds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from headrace.wire import TraceParent

Outcome = Literal["finished", "failed", "cancelled"]


@dataclass(frozen=True, slots=True)
class Attempt:
    """Whose event it is."""

    request_id: str
    attempt: int
    traceparent: TraceParent | None
    """None where the request is not traced."""


@dataclass(frozen=True, slots=True)
class HandoffTimes:
    """How the KV of one prompt left; a moment that never came is None."""

    receiver: str | None
    transport: str
    pages: int
    bytes: int
    offered_at: float
    granted_at: float | None
    acknowledged_at: float | None


@dataclass(frozen=True, slots=True)
class PrefillEnded:
    """A prefill worker is done with an attempt, from the queue to the decode worker's acknowledgement."""

    of: Attempt
    outcome: Outcome
    code: str
    """Why it failed, in a word; empty where it did not."""
    enqueued_at: float
    taken_at: float
    first_token_at: float | None
    """The prompt was computed."""
    ended_at: float
    prompt_tokens: int
    cached_tokens: int
    handoff: HandoffTimes | None


@dataclass(frozen=True, slots=True)
class DecodeEnded:
    """A decode worker is done with an attempt."""

    of: Attempt
    outcome: Outcome
    code: str
    """The finish reason, or why it failed."""
    started_at: float
    ended_at: float
    tokens: int
    """Made here, that of the prefill among them."""


@dataclass(frozen=True, slots=True)
class StepRan:
    """One decode step."""

    requests: int
    tokens: int
    seconds: float


Event = PrefillEnded | DecodeEnded | StepRan
