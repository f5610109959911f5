"""Events -> OpenTelemetry spans of the request that they belong to.

Each is made once it is over, with its times, as a child of the gateway's span of the attempt. So no span has a parent
in a worker, which may die before it has exported it, and a trace has no orphan whatever fails but the gateway.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from opentelemetry import trace
from opentelemetry.trace import NonRecordingSpan, SpanContext, SpanKind, Status, StatusCode, TraceFlags

from headrace.telemetry.events import Attempt, DecodeEnded, Event, HandoffTimes, PrefillEnded
from headrace.wire import TraceParent

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.util.types import AttributeValue

Moments = list[tuple[str, float | None]]
"""Names of span events and when they were; one that never was is left out."""


class WorkerSpans:
    """Of one worker."""

    def __init__(self, tracer: trace.Tracer, worker: str) -> None:
        self._tracer = tracer
        self._worker = worker

    def on(self, event: Event) -> None:
        """Take one event; those of requests that are not traced cost a comparison."""
        if isinstance(event, PrefillEnded | DecodeEnded) and event.of.traceparent is not None:
            if isinstance(event, PrefillEnded):
                self._prefill_ended(event)
            else:
                self._decode_ended(event)

    def _prefill_ended(self, event: PrefillEnded) -> None:
        self._add(event.of, "queue", event.enqueued_at, event.taken_at, kind=SpanKind.CONSUMER)
        handoff, computed_at = event.handoff, event.first_token_at
        tokens = {"headrace.prompt_tokens": event.prompt_tokens, "headrace.cached_tokens": event.cached_tokens}
        moments: Moments = [("prefilling", event.taken_at), ("first_token", computed_at)]
        failed = event.outcome if computed_at is None else "finished"
        self._add(
            event.of, "prefill", event.taken_at, computed_at or event.ended_at, moments, tokens, failed, event.code
        )
        if handoff is not None:
            self._handoff(event, handoff)

    def _handoff(self, event: PrefillEnded, handoff: HandoffTimes) -> None:
        attributes: dict[str, AttributeValue] = {
            "headrace.handoff.transport": handoff.transport,
            "headrace.handoff.pages": handoff.pages,
            "headrace.handoff.bytes": handoff.bytes,
        }
        if handoff.receiver is not None:
            attributes["headrace.decode_worker"] = handoff.receiver
        if handoff.acknowledged_at is not None and event.first_token_at is not None:
            attributes["headrace.handoff.exposed_seconds"] = max(handoff.acknowledged_at - event.first_token_at, 0.0)
        moments: Moments = [
            ("handing_off", handoff.offered_at),
            ("granted", handoff.granted_at),
            ("acknowledged", handoff.acknowledged_at),
        ]
        outcome = event.outcome if handoff.acknowledged_at is None else "finished"
        end = handoff.acknowledged_at or event.ended_at
        self._add(event.of, "handoff", handoff.offered_at, end, moments, attributes, outcome, event.code)

    def _decode_ended(self, event: DecodeEnded) -> None:
        moments: Moments = [("decoding", event.started_at), (event.outcome, event.ended_at)]
        attributes: dict[str, AttributeValue] = {"gen_ai.usage.output_tokens": event.tokens}
        if event.outcome == "finished":
            attributes["gen_ai.response.finish_reasons"] = [event.code]
        self._add(event.of, "decode", event.started_at, event.ended_at, moments, attributes, event.outcome, event.code)

    def _add(
        self,
        of: Attempt,
        name: str,
        start: float,
        end: float,
        moments: Moments | None = None,
        attributes: Mapping[str, AttributeValue] | None = None,
        outcome: str = "finished",
        code: str = "",
        kind: SpanKind = SpanKind.INTERNAL,
    ) -> None:
        assert of.traceparent is not None, "the caller looked"
        common: dict[str, AttributeValue] = {
            "headrace.request_id": of.request_id,
            "headrace.attempt": of.attempt,
            "headrace.worker": self._worker,
        }
        span = self._tracer.start_span(
            name,
            remote_parent(of.traceparent),
            kind,
            {**common, **(attributes or {})},
            start_time=nanoseconds(start),
        )
        for moment, at in moments or []:
            if at is not None:
                span.add_event(moment, timestamp=nanoseconds(at))
        if outcome != "finished":
            span.set_attribute("error.type", code or outcome)
            span.set_status(Status(StatusCode.ERROR, code or outcome))
        span.end(nanoseconds(max(start, end)))


def remote_parent(traceparent: TraceParent) -> Context:
    """The context in which to start a child of another process's span."""
    _, trace_id, span_id, flags = traceparent.split("-")
    span = SpanContext(int(trace_id, 16), int(span_id, 16), is_remote=True, trace_flags=TraceFlags(int(flags, 16)))
    return trace.set_span_in_context(NonRecordingSpan(span))


def nanoseconds(seconds: float) -> int:
    """Unix time as OpenTelemetry has it."""
    return int(seconds * 1e9)
