"""Metrics as text: Prometheus' own format, or OpenMetrics with exemplars for who accepts it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder

from headrace.registry import Member
from headrace.telemetry.figures import describe, is_counter
from headrace.wire import TraceParent

INFO = "headrace_worker_info"
INFO_HELP = "Always 1: joins a worker's figures with what it serves"
INFO_LABELS = ["tier", "worker", "model_name", "version"]


def render(registry: CollectorRegistry, accept: str) -> tuple[bytes, str]:
    """The text and its Content-Type, for a request's `Accept` header."""
    encode, content_type = choose_encoder(accept)
    return encode(registry), content_type


def geometric(first: float, last: float, factor: float) -> list[float]:
    """Bucket bounds in a geometric row."""
    bounds = [first]
    while bounds[-1] < last:
        bounds.append(round(bounds[-1] * factor, 6))
    return bounds


def exemplar(traceparent: TraceParent | None) -> dict[str, str] | None:
    """What leads from a histogram's bucket to a trace."""
    return None if traceparent is None else {"trace_id": traceparent[3:35], "span_id": traceparent[36:52]}


class MemberFigures:
    """A collector of what workers publish in the registry, labelled with each one's tier and id."""

    def __init__(self, members: Callable[[], Iterable[Member]]) -> None:
        """`members` gives those to be shown, whenever metrics are asked for."""
        self._members = members

    def collect(self) -> Iterable[Metric]:
        """See `prometheus_client.registry.Collector`."""
        families: dict[str, GaugeMetricFamily | CounterMetricFamily] = {}
        info = GaugeMetricFamily(INFO, INFO_HELP, labels=INFO_LABELS)
        for member in self._members():
            info.add_metric([member.tier, member.id, member.model, member.version], 1)
            for name, value in member.stats.items():
                if (help := describe(name)) is None:
                    continue
                kind = CounterMetricFamily if is_counter(name) else GaugeMetricFamily
                family = families.setdefault(name, kind(f"headrace_{name}", help, labels=["tier", "worker"]))
                family.add_metric([member.tier, member.id], value)
        yield info
        yield from families.values()
