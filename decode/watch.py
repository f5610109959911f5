"""Tells telemetry of requests that are over in a decode worker."""

from __future__ import annotations

import time

from headrace.decode.sequence import Sequence
from headrace.telemetry.events import Attempt, DecodeEnded, Outcome
from headrace.telemetry.telemetry import Telemetry


def ended(telemetry: Telemetry, sequence: Sequence, outcome: Outcome, code: str) -> None:
    """`code` is the finish reason, or why it failed."""
    offer = sequence.offer
    of = Attempt(offer.request_id, offer.attempt, offer.traceparent)
    tokens = sequence.generated - offer.generated
    telemetry.emit(DecodeEnded(of, outcome, code, sequence.started_at, time.time(), tokens))
