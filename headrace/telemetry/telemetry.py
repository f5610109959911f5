"""One member's telemetry: takes events and gives each to whatever is on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from headrace.registry import Tier
from headrace.telemetry import otel
from headrace.telemetry.events import Event
from headrace.telemetry.worker_metrics import WorkerHistograms, WorkerMetrics

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer

    from headrace.telemetry.spans import WorkerSpans


class Telemetry:
    """Metrics always, spans where OpenTelemetry is asked for. Raises `TelemetryError`."""

    def __init__(self, tier: Tier, member: str, namespace: str, model: str, histograms: WorkerHistograms) -> None:
        self._metrics = WorkerMetrics(histograms, tier, member, model)
        self._provider = otel.tracer_provider(tier, member, namespace) if otel.is_on("traces") else None
        self.tracer: Tracer | None = None
        """For spans that are made while they run; None where nothing is traced."""
        self._spans: WorkerSpans | None = None
        if self._provider is not None:
            from headrace.telemetry.spans import WorkerSpans

            self.tracer = self._provider.get_tracer("headrace")
            self._spans = WorkerSpans(self.tracer, member)

    def emit(self, event: Event) -> None:
        """Tell of an event. To be called on the event loop; returns at once."""
        self._metrics.on(event)
        if self._spans is not None:
            self._spans.on(event)

    def stats(self) -> dict[str, float]:
        """The counters, for the registry."""
        return self._metrics.stats()

    async def close(self) -> None:
        """Send what is left, for a moment."""
        if self._provider is not None:
            await otel.close(self._provider.shutdown)
