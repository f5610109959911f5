"""Prometheus metrics: the gateway's own, and its and every live worker's figures as the registry carries them."""

from __future__ import annotations

import time
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, Metric

from headrace.gateway.job import Kind
from headrace.node import Node
from headrace.registry import Member
from headrace.telemetry.exposition import MemberFigures, exemplar, geometric, render
from headrace.wire import TraceParent

OPERATIONS: dict[Kind, str] = {"chat": "chat", "completion": "text_completion"}
"""What OpenTelemetry's GenAI conventions call them."""


class GatewayMetrics:
    """All that `/metrics` shows."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self.own = CollectorRegistry()
        """Those of this process."""
        self._model = node.registry.me.model
        self.requests = Counter(
            "headrace_gateway_requests", "HTTP requests for answers", ["endpoint", "outcome"], registry=self.own
        )
        self.prompt_tokens = Counter("headrace_gateway_prompt_tokens", "Tokens of prompts", registry=self.own)
        self.output_tokens = Counter("headrace_gateway_output_tokens", "Tokens of answers", registry=self.own)
        self.requeues = Counter("headrace_gateway_requeues", "Answers queued anew after a failure", registry=self.own)
        self.time_to_first_token = self._histogram(
            "time_to_first_token_seconds", "From the request's admission to its first token", geometric(0.005, 120, 1.3)
        )
        self.inter_token = self._histogram(
            "inter_token_seconds",
            "Between tokens of one answer; tokens that come together share the time",
            geometric(0.0005, 5, 1.25),
        )
        self.end_to_end = Histogram(
            "headrace_gateway_e2e_request_latency_seconds",
            "From a request's admission to the end of its answer",
            ["model_name", "operation"],
            buckets=geometric(0.01, 600, 1.5),
            registry=self.own,
        )
        self.own.register(_Refused(node))
        ProcessCollector(registry=self.own)
        self._all = CollectorRegistry()
        """And the workers'."""
        self._all.register(self.own)
        self._all.register(MemberFigures(self._workers))
        self._tokens = 0
        self._finished = 0

    def _histogram(self, name: str, help: str, buckets: list[float]) -> Histogram:
        family = Histogram(f"headrace_gateway_{name}", help, ["model_name"], buckets=buckets, registry=self.own)
        return family.labels(self._model)

    def _workers(self) -> Iterable[Member]:
        return (member for member in self._node.registry.members.values() if member.tier != "gateway")

    def observe_tokens(
        self, count: int, created: float, before: float | None, now: float, trace: TraceParent | None = None
    ) -> None:
        """Count `count` tokens that came together at `now`; `before` is when the ones ahead of them came."""
        self._tokens += count
        self.output_tokens.inc(count)
        if before is None:
            self.time_to_first_token.observe(now - created, exemplar(trace))
            return
        for _ in range(count):
            self.inter_token.observe((now - before) / count, exemplar(trace))

    def observe_end(self, kind: Kind, created: float, trace: TraceParent | None = None) -> None:
        """Count an answer that is over, well or not."""
        self._finished += 1
        operation = OPERATIONS[kind]
        self.end_to_end.labels(self._model, operation).observe(time.monotonic() - created, exemplar(trace))

    def stats(self, running: int) -> dict[str, float]:
        """What this gateway publishes in the registry, while `running` answers are made."""
        return {
            "requests_running": running,
            "requests_finished_total": self._finished,
            "output_tokens_total": self._tokens,
        }

    def render(self, accept: str, whole_mesh: bool) -> tuple[bytes, str]:
        """The text and its Content-Type, for a request's `Accept` header; `whole_mesh`: with workers' figures."""
        return render(self._all if whole_mesh else self.own, accept)


class _Refused:
    """Reads the mesh when it is scraped."""

    def __init__(self, node: Node) -> None:
        self._node = node

    def collect(self) -> Iterable[Metric]:
        refused = CounterMetricFamily(
            "headrace_gateway_refused_messages", "Messages from the mesh that broke the schema"
        )
        refused.add_metric([], self._node.mesh.refused)
        yield refused
