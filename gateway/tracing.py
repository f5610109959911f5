"""The gateway's spans: one a request, under it one an attempt of each choice, and one for the stream to the client.

The attempt's span goes with the queue entry, and what workers do for it comes under it. A failover begins a new attempt
in the same trace, linked to the one that failed.
"""

from __future__ import annotations

import asyncio
import time
from contextvars import ContextVar
from typing import TYPE_CHECKING

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from headrace.gateway.errors import ApiError
from headrace.wire import TraceParent

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.trace import Span, Tracer
    from opentelemetry.util.types import AttributeValue

    from headrace.gateway.answer import Answer
    from headrace.gateway.choice import Choice

TRACED_PATHS = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "text_completion",
    "/v1/messages": "chat",
    "/v1/responses": "chat",
}
"""And what OpenTelemetry's GenAI conventions call the operation."""
PROVIDER = "headrace"
CANCELLED = "cancelled"

current: ContextVar[RequestTrace | None] = ContextVar("trace", default=None)
"""Of the request that the current task serves; None where it is not traced."""


def tracing(tracer: Tracer) -> Middleware:
    """A span for each request that is sampled, under the client's own if it sent a `traceparent`."""
    from opentelemetry.trace import SpanKind
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    propagator = TraceContextTextMapPropagator()

    @web.middleware
    async def traced(request: web.Request, handler: Handler) -> web.StreamResponse:
        operation = TRACED_PATHS.get(request.path)
        if operation is None:
            return await handler(request)
        parent = propagator.extract(request.headers)
        span = tracer.start_span(operation, parent, SpanKind.SERVER, {"gen_ai.operation.name": operation})
        if not span.is_recording():
            return await handler(request)
        trace = RequestTrace(tracer, span, operation)
        current.set(trace)
        span.set_attributes({"http.request.method": request.method, "url.path": request.path})
        try:
            response = await handler(request)
        except BaseException as error:
            trace.end(*_failure(error))
            raise
        trace.end(response.status)
        return response

    return traced


def _failure(error: BaseException) -> tuple[int | None, str]:
    if isinstance(error, ApiError):
        return error.status, error.code or error.type
    gone = isinstance(error, asyncio.CancelledError | ConnectionResetError)
    return None, CANCELLED if gone else type(error).__name__


class RequestTrace:
    """One request's spans."""

    def __init__(self, tracer: Tracer, span: Span, operation: str) -> None:
        from opentelemetry.trace import set_span_in_context

        self.trace_id = format(span.get_span_context().trace_id, "032x")
        self._tracer = tracer
        self._span = span
        self._operation = operation
        self._context = set_span_in_context(span)
        self._choices: list[ChoiceTrace] = []
        self._first_token_at: float | None = None

    def follow(self, answer: Answer, model: str) -> None:
        """The request is admitted."""
        sampling = answer.job.sampling
        self._span.update_name(f"{self._operation} {model}")
        attributes: dict[str, AttributeValue] = {
            "gen_ai.provider.name": PROVIDER,
            "gen_ai.request.model": model,
            "gen_ai.request.choice.count": len(answer.choices),
            "gen_ai.request.max_tokens": answer.choices[0].sampling.max_tokens,
            "gen_ai.request.temperature": sampling.temperature,
            "gen_ai.request.top_p": sampling.top_p,
            "gen_ai.request.top_k": sampling.top_k,
            "gen_ai.request.frequency_penalty": sampling.frequency_penalty,
            "gen_ai.request.presence_penalty": sampling.presence_penalty,
            "gen_ai.request.stop_sequences": list(answer.job.stop),
            "gen_ai.request.stream": answer.job.stream,
            "gen_ai.response.id": answer.id,
            "gen_ai.response.model": model,
        }
        self._span.set_attributes(attributes)
        for choice in answer.choices:
            choice.trace = ChoiceTrace(self._tracer, self._context)
            self._choices.append(choice.trace)

    def answered(self, answer: Answer) -> None:
        """The answer is over, well or not."""
        cached = sum(choice.report.cached_tokens for choice in answer.choices if choice.report is not None)
        reasons = [choice.finish_reason or choice.state for choice in answer.choices]
        attributes: dict[str, AttributeValue] = {
            "gen_ai.usage.input_tokens": sum(len(prompt.token_ids) for prompt in answer.job.prompts),
            "gen_ai.usage.output_tokens": sum(len(choice.token_ids) for choice in answer.choices),
            "gen_ai.usage.cache_read.input_tokens": cached,
            "gen_ai.response.finish_reasons": reasons,
            "headrace.requeues": sum(choice.requeues for choice in answer.choices),
        }
        firsts = [choice.first_token_at for choice in answer.choices if choice.first_token_at is not None]
        if firsts:
            self._first_token_at = _to_unix(min(firsts))
            waited = min(firsts) - answer.choices[0].created
            attributes["gen_ai.response.time_to_first_chunk"] = waited
            self._stream()
        self._span.set_attributes(attributes)
        for choice in answer.choices:
            if choice.trace is not None:
                choice.trace.end(choice)
        if answer.outcome != "ok":
            self._fail(answer.outcome)

    def _stream(self) -> None:
        """The time in which the client was sent tokens."""
        assert self._first_token_at is not None, "the caller looked"
        span = self._tracer.start_span("stream", self._context, start_time=_nanoseconds(self._first_token_at))
        span.end()

    def _fail(self, code: str) -> None:
        from opentelemetry.trace import Status, StatusCode

        self._span.set_attribute("error.type", code)
        self._span.set_status(Status(StatusCode.ERROR, code))

    def end(self, status: int | None, failure: str = "") -> None:
        """The response is complete, or will not be."""
        if status is not None:
            self._span.set_attribute("http.response.status_code", status)
        if failure:
            self._fail(failure)
        self._span.end()


class ChoiceTrace:
    """One choice's attempts, one span each; the newest is that which workers' spans come under."""

    def __init__(self, tracer: Tracer, request: Context) -> None:
        self.traceparent: TraceParent | None = None
        self._tracer = tracer
        self._request = request
        self._span: Span | None = None

    def begin_attempt(self, choice: Choice) -> TraceParent:
        """The choice is about to be queued."""
        from opentelemetry.trace import Link, SpanKind

        attributes: dict[str, AttributeValue] = {
            "headrace.request_id": choice.request_id,
            "headrace.attempt": choice.entry_attempt,
            "headrace.generated": len(choice.token_ids),
        }
        before = [Link(self._span.get_span_context())] if self._span is not None else None
        self.attempt_failed("queued again")
        self._span = self._tracer.start_span("attempt", self._request, SpanKind.PRODUCER, attributes, before)
        self._span.add_event("queued")
        context = self._span.get_span_context()
        self.traceparent = f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}"
        return self.traceparent

    def attempt_failed(self, reason: str) -> None:
        """The newest attempt is over, and another may come."""
        from opentelemetry.trace import Status, StatusCode

        if self._span is not None and self._span.is_recording():
            self._span.add_event("failed", {"headrace.reason": reason})
            self._span.set_status(Status(StatusCode.ERROR, reason))
            self._span.end()

    def end(self, choice: Choice) -> None:
        """The choice is over."""
        if self._span is None or not self._span.is_recording():
            return
        if choice.first_token_at is not None and choice.requeues == 0:
            self._span.add_event("first_token", timestamp=_nanoseconds(_to_unix(choice.first_token_at)))
        if choice.error is not None:
            self.attempt_failed(choice.error.message)
            return
        state = choice.state if choice.ended else CANCELLED
        self._span.add_event(state)
        if choice.prefill_worker is not None:
            self._span.set_attribute("headrace.prefill_worker", choice.prefill_worker)
        if choice.decode_worker is not None:
            self._span.set_attribute("headrace.decode_worker", choice.decode_worker[0])
        self._span.end()


def _to_unix(monotonic: float) -> float:
    return time.time() - (time.monotonic() - monotonic)


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)
