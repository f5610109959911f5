"""Pushes what `/metrics` shows to an OTLP collector, so that there is one set of metrics and not two.

`headrace_handoff_seconds` becomes `headrace.handoff` in `s`, as a collector that writes Prometheus text turns it back;
those for which OpenTelemetry's GenAI conventions have a name get that.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric as Family
from prometheus_client.core import Sample

from headrace import __version__
from headrace.registry import Tier
from headrace.tasks import end_task
from headrace.telemetry import otel

if TYPE_CHECKING:
    from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
    from opentelemetry.sdk.metrics.export import Gauge, Histogram, HistogramDataPoint, Metric, MetricsData, Sum
    from opentelemetry.sdk.resources import Resource

log = logging.getLogger(__name__)

GEN_AI_NAMES = {
    "headrace_gateway_time_to_first_token_seconds": "gen_ai.server.time_to_first_token",
    "headrace_gateway_inter_token_seconds": "gen_ai.server.time_per_output_token",
    "headrace_gateway_e2e_request_latency_seconds": "gen_ai.server.request.duration",
}
GEN_AI_LABELS = {"model_name": "gen_ai.request.model", "operation": "gen_ai.operation.name"}
DEFAULT_INTERVAL_MS = 60_000

Labels = tuple[tuple[str, str], ...]


@asynccontextmanager
async def pushing_metrics(registry: CollectorRegistry, tier: Tier, namespace: str) -> AsyncIterator[None]:
    """Push inside the block, every `OTEL_METRIC_EXPORT_INTERVAL` milliseconds and at its end, if OTLP is asked for.

    Raises `TelemetryError`.
    """
    if not otel.is_on("metrics"):
        yield
        return
    from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter

    interval = float(os.environ.get("OTEL_METRIC_EXPORT_INTERVAL") or DEFAULT_INTERVAL_MS) / 1000
    exporter = OTLPMetricExporter()
    source = otel.resource(tier, f"{socket.gethostname()}:{os.getpid()}", namespace)
    started = time.time_ns()
    pushing = asyncio.create_task(_push(registry, exporter, source, started, interval), name="metrics push")
    try:
        yield
    finally:
        await end_task(pushing)
        last = metrics_data(registry, source, started)

        def push_and_shut_down() -> None:
            exporter.export(last)
            exporter.shutdown()

        await otel.close(push_and_shut_down)


async def _push(
    registry: CollectorRegistry, exporter: OTLPMetricExporter, source: Resource, started: int, interval: float
) -> None:
    while True:
        await asyncio.sleep(interval)
        data = metrics_data(registry, source, started)
        try:
            await asyncio.to_thread(exporter.export, data)
        except Exception:  # whatever a collector does must not end a worker
            log.warning("metrics could not be pushed", exc_info=True)


def metrics_data(registry: CollectorRegistry, source: Resource, started: int) -> MetricsData:
    """All of a registry as it is now; `started` is when its counters were 0, in nanoseconds of Unix time."""
    from opentelemetry.sdk.metrics.export import Metric, MetricsData, ResourceMetrics, ScopeMetrics
    from opentelemetry.sdk.util.instrumentation import InstrumentationScope

    now = time.time_ns()
    metrics: list[Metric] = []
    for family in registry.collect():
        data = _data(family, started, now)
        if data is not None and data.data_points:
            name, unit = otlp_name(family.name)
            metrics.append(Metric(name, family.documentation, unit, data))
    scope = ScopeMetrics(InstrumentationScope("headrace", __version__), metrics, "")
    return MetricsData([ResourceMetrics(source, [scope], "")])


def otlp_name(family: str) -> tuple[str, str]:
    """Name and unit of a family of `/metrics`."""
    if family in GEN_AI_NAMES:
        return GEN_AI_NAMES[family], "s"
    name = family.replace("headrace_", "headrace.", 1)
    return (name.removesuffix("_seconds"), "s") if name.endswith("_seconds") else (name, "1")


def _data(family: Family, started: int, now: int) -> Sum | Gauge | Histogram | None:
    from opentelemetry.sdk.metrics.export import AggregationTemporality, Gauge, Histogram, NumberDataPoint, Sum

    if family.type == "histogram":
        points = list(_histogram_points(family, started, now))
        return Histogram(points, AggregationTemporality.CUMULATIVE)
    ends = "_total" if family.type == "counter" else ""
    values = [
        NumberDataPoint(_attributes(sample.labels), started if ends else 0, now, sample.value)
        for sample in family.samples
        if sample.name == family.name + ends
    ]
    if family.type == "counter":
        return Sum(values, AggregationTemporality.CUMULATIVE, is_monotonic=True)
    return Gauge(values) if family.type == "gauge" else None


def _attributes(labels: dict[str, str]) -> dict[str, str]:
    return {GEN_AI_LABELS.get(name, name): value for name, value in labels.items()}


def _histogram_points(family: Family, started: int, now: int) -> Iterator[HistogramDataPoint]:
    """One for each set of labels. Prometheus' buckets are cumulative, OpenTelemetry's are not."""
    from opentelemetry.sdk.metrics.export import HistogramDataPoint

    buckets: defaultdict[Labels, list[Sample]] = defaultdict(list)
    sums: dict[Labels, float] = {}
    for sample in family.samples:
        key = tuple((name, value) for name, value in sample.labels.items() if name != "le")
        if sample.name.endswith("_bucket"):
            buckets[key].append(sample)
        elif sample.name.endswith("_sum"):
            sums[key] = sample.value
    for key, samples in buckets.items():
        counts = [int(sample.value) for sample in samples]
        apart = [count - before for count, before in zip(counts, [0, *counts], strict=False)]
        bounds = [float(sample.labels["le"]) for sample in samples[:-1]]
        total, attributes = sums.get(key, 0.0), _attributes(dict(key))
        yield HistogramDataPoint(attributes, started, now, counts[-1], total, apart, bounds, 0.0, 0.0)
