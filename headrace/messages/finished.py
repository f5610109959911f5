"""Gateway -> Redis -> `headrace top` and the live page: requests that are over."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from headrace.wire import Count, MeshId, Message, Milliseconds, Record

MAX_FINISHED = 64
"""That a gateway remembers."""


class FinishedRequest(Record, frozen=True, kw_only=True):
    """One HTTP request from its arrival to its end; where it has several choices, times are the first one's.

    Its time line is `queue_ms`, `prefill_ms`, `handoff_ms`, `first_ms`, `decode_ms`, one after the other; what was not
    reached is 0.
    """

    id: Annotated[str, msgspec.Meta(max_length=128)]
    kind: Literal["chat", "completion"]
    outcome: Annotated[str, msgspec.Meta(max_length=64)]
    """`ok`, `cancelled` or an error's code."""
    started_at: float
    """Unix time in seconds."""
    queue_ms: Milliseconds = 0.0
    """Until a prefill worker took it."""
    prefill_ms: Milliseconds = 0.0
    """Until the first token was known."""
    handoff_ms: Milliseconds = 0.0
    """Until the decode worker had acknowledged."""
    first_ms: Milliseconds = 0.0
    """What was left until the gateway had the first token."""
    decode_ms: Milliseconds = 0.0
    """From the first token to the last."""
    prefill_worker: MeshId | None = None
    decode_worker: MeshId | None = None
    prompt_tokens: Count = 0
    cached_tokens: Count = 0
    output_tokens: Count = 0
    choices: Count = 1
    requeues: Count = 0
    """Times that the rest of an answer was queued anew."""
    trace_id: Annotated[str, msgspec.Meta(max_length=32)] = ""
    """Of the OpenTelemetry trace, where the request is sampled."""


class FinishedRequests(Message, frozen=True, kw_only=True):
    """A gateway's newest, oldest first."""

    requests: Annotated[list[FinishedRequest], msgspec.Meta(max_length=MAX_FINISHED)]
