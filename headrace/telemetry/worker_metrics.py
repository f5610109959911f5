"""Events -> counters, which travel in the registry, and histograms, which the worker's own `/metrics` shows."""

from __future__ import annotations

from collections import Counter as Tally

from prometheus_client import CollectorRegistry, Histogram

from headrace.registry import Tier
from headrace.telemetry.events import DecodeEnded, Event, PrefillEnded, StepRan
from headrace.telemetry.exposition import exemplar, geometric
from headrace.telemetry.step_histogram import StepHistogram

LABELS = ("tier", "worker", "model_name")


class WorkerHistograms:
    """Those of one process; where two workers share it, they share these."""

    def __init__(self, registry: CollectorRegistry) -> None:
        seconds = geometric(0.001, 120, 1.6)

        def histogram(name: str, help: str, buckets: list[float], *labels: str) -> Histogram:
            return Histogram(f"headrace_{name}", help, (*LABELS, *labels), buckets=buckets, registry=registry)

        self.queue_time = histogram("request_queue_time_seconds", "From the queue's append to a worker's take", seconds)
        self.prefill_time = histogram("request_prefill_time_seconds", "From the take to the first token", seconds)
        self.decode_time = histogram("request_decode_time_seconds", "From the handoff to the last token", seconds)
        self.handoff_time = histogram(
            "handoff_seconds",
            "From the offer to the acknowledgement, most of it beside the computation",
            seconds,
            "transport",
        )
        self.handoff_exposed = histogram(
            "handoff_exposed_seconds",
            "From the first token to the acknowledgement: what the handoff adds to time to first token",
            geometric(0.0001, 10, 1.8),
            "transport",
        )
        self.batch_size = StepHistogram(
            "headrace_decode_batch_size", "Requests of a decode step", LABELS, geometric(1, 1024, 2)
        )
        self.step_time = StepHistogram(
            "headrace_decode_step_seconds", "One decode step", LABELS, geometric(0.0005, 5, 1.5)
        )
        registry.register(self.batch_size)
        registry.register(self.step_time)


class WorkerMetrics:
    """One worker's."""

    def __init__(self, histograms: WorkerHistograms, tier: Tier, worker: str, model: str) -> None:
        self._histograms = histograms
        self._labels = (tier, worker, model)
        self._counts: Tally[str] = Tally()
        if tier == "decode":  # looked up once: a step is short
            self._decode_time = histograms.decode_time.labels(*self._labels)
            self._batch_size = histograms.batch_size.labels(*self._labels)
            self._step_time = histograms.step_time.labels(*self._labels)

    def stats(self) -> dict[str, float]:
        """The counters, for the registry; see `figures.py`."""
        return dict(self._counts)

    def on(self, event: Event) -> None:
        """Take one event."""
        match event:
            case StepRan():
                self._counts["decode_steps_total"] += 1
                self._counts["decode_step_requests_total"] += event.requests
                self._counts["generation_tokens_total"] += event.tokens
                self._batch_size.observe(event.requests)
                self._step_time.observe(event.seconds)
            case PrefillEnded():
                self._count_end(event)
                self._prefill_ended(event)
            case DecodeEnded():
                self._count_end(event)
                self._counts["preemptions_total"] += event.code == "preempted"
                if event.outcome == "finished":
                    seconds = event.ended_at - event.started_at
                    self._decode_time.observe(seconds, exemplar(event.of.traceparent))

    def _count_end(self, event: PrefillEnded | DecodeEnded) -> None:
        self._counts[f"requests_{event.outcome}_total"] += 1

    def _prefill_ended(self, event: PrefillEnded) -> None:
        histograms, trace = self._histograms, exemplar(event.of.traceparent)
        histograms.queue_time.labels(*self._labels).observe(max(event.taken_at - event.enqueued_at, 0.0), trace)
        if event.first_token_at is None:
            return
        self._counts["prefix_cache_queries_total"] += event.prompt_tokens
        self._counts["prefix_cache_hits_total"] += event.cached_tokens
        histograms.prefill_time.labels(*self._labels).observe(event.first_token_at - event.taken_at, trace)
        handoff = event.handoff
        if handoff is None or handoff.acknowledged_at is None:
            return
        labels = (*self._labels, handoff.transport)
        histograms.handoff_time.labels(*labels).observe(handoff.acknowledged_at - handoff.offered_at, trace)
        exposed = max(handoff.acknowledged_at - event.first_token_at, 0.0)
        histograms.handoff_exposed.labels(*labels).observe(exposed, trace)
