"""A small OTLP/HTTP collector on loopback that remembers what it was sent."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

from headrace.loadtest.loopback import serving


@dataclass(frozen=True)
class ReceivedSpan:
    """One span; ids in hexadecimal."""

    service: str
    name: str
    trace_id: str
    span_id: str
    parent_id: str
    start: int
    end: int
    events: list[str]
    links: list[str]
    attributes: dict[str, Any]
    failed: bool


@dataclass
class OtlpReceiver:
    """What came so far."""

    url: str = ""
    spans: list[ReceivedSpan] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)
    """Newest data by name."""

    async def traces(self, request: web.Request) -> web.Response:
        """POST /v1/traces."""
        export = ExportTraceServiceRequest.FromString(await request.read())
        for resource in export.resource_spans:
            service = _attributes(resource.resource.attributes)["service.name"]
            for scope in resource.scope_spans:
                self.spans += [_span(service, span) for span in scope.spans]
        return _reply(ExportTraceServiceResponse())

    async def push(self, request: web.Request) -> web.Response:
        """POST /v1/metrics."""
        export = ExportMetricsServiceRequest.FromString(await request.read())
        for resource in export.resource_metrics:
            for scope in resource.scope_metrics:
                self.metrics |= {metric.name: metric for metric in scope.metrics}
        return _reply(ExportMetricsServiceResponse())

    def orphans(self) -> list[ReceivedSpan]:
        """Spans whose parent did not come."""
        known = {span.span_id for span in self.spans}
        return [span for span in self.spans if span.parent_id and span.parent_id not in known]


def _reply(message: Any) -> web.Response:
    return web.Response(body=message.SerializeToString(), content_type="application/x-protobuf")


def _attributes(pairs: Any) -> dict[str, Any]:
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value") or "string_value") for pair in pairs}


def _span(service: str, span: Any) -> ReceivedSpan:
    return ReceivedSpan(
        service,
        span.name,
        span.trace_id.hex(),
        span.span_id.hex(),
        span.parent_span_id.hex(),
        span.start_time_unix_nano,
        span.end_time_unix_nano,
        [event.name for event in span.events],
        [link.span_id.hex() for link in span.links],
        _attributes(span.attributes),
        span.status.code == 2,
    )


@asynccontextmanager
async def otlp_receiver() -> AsyncIterator[OtlpReceiver]:
    """Listen inside the block."""
    receiver = OtlpReceiver()
    app = web.Application(client_max_size=2**26)
    app.add_routes([web.post("/v1/traces", receiver.traces), web.post("/v1/metrics", receiver.push)])
    async with serving(app) as receiver.url:
        yield receiver
