"""Prometheus metrics: the gateway's own, and its and every live worker's figures as the registry carries them."""

from __future__ import annotations

import re
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from headrace.node import Node

METRIC_NAME = re.compile(r"[a-z_][a-z0-9_]*")


def _seconds(first: float, last: float, factor: float) -> list[float]:
    """Bucket bounds in a geometric row."""
    bounds = [first]
    while bounds[-1] < last:
        bounds.append(round(bounds[-1] * factor, 6))
    return bounds


class GatewayMetrics:
    """All that `/metrics` shows."""

    def __init__(self, node: Node) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "headrace_gateway_requests", "HTTP requests for answers", ["endpoint", "outcome"], registry=self._registry
        )
        self.prompt_tokens = Counter("headrace_gateway_prompt_tokens", "Tokens of prompts", registry=self._registry)
        self.output_tokens = Counter("headrace_gateway_output_tokens", "Tokens of answers", registry=self._registry)
        self.requeues = Counter(
            "headrace_gateway_requeues", "Answers queued anew after a failure", registry=self._registry
        )
        self.time_to_first_token = Histogram(
            "headrace_gateway_time_to_first_token_seconds",
            "From the request's admission to its first token",
            buckets=_seconds(0.005, 120, 1.3),
            registry=self._registry,
        )
        self.inter_token = Histogram(
            "headrace_gateway_inter_token_seconds",
            "Between tokens of one answer; tokens that come together share the time",
            buckets=_seconds(0.0005, 5, 1.25),
            registry=self._registry,
        )
        self._registry.register(_MeshCollector(node))

    def observe_tokens(self, count: int, created: float, before: float | None, now: float) -> None:
        """Count `count` tokens that came together at `now`; `before` is when the ones ahead of them came."""
        self.output_tokens.inc(count)
        if before is None:
            self.time_to_first_token.observe(now - created)
            return
        for _ in range(count):
            self.inter_token.observe((now - before) / count)

    def render(self) -> bytes:
        """Prometheus text format 0.0.4."""
        return generate_latest(self._registry)


class _MeshCollector:
    """Reads the registry and the mesh when it is scraped."""

    def __init__(self, node: Node) -> None:
        self._node = node

    def collect(self) -> Iterable[Metric]:
        refused = CounterMetricFamily(
            "headrace_gateway_refused_messages", "Messages from the mesh that broke the schema"
        )
        refused.add_metric([], self._node.mesh.refused)
        yield refused
        families: dict[str, GaugeMetricFamily | CounterMetricFamily] = {}
        registry = self._node.registry
        for member in [registry.me, *registry.tier("prefill"), *registry.tier("decode")]:
            for name, value in member.stats.items():
                if not METRIC_NAME.fullmatch(name):
                    continue
                family = families.setdefault(name, _family(name))
                family.add_metric([member.tier, member.id], value)
        yield from families.values()


def _family(name: str) -> GaugeMetricFamily | CounterMetricFamily:
    counts = name.endswith("_total") and name != "kv_pages_total"
    kind = CounterMetricFamily if counts else GaugeMetricFamily
    return kind(f"headrace_{name}", "A worker's own figure", labels=["tier", "worker"])
