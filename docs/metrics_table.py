"""Makes docs/metrics.md from the code: `python docs/metrics_table.py`. A test fails where the two differ."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from prometheus_client import CollectorRegistry

from headrace.gateway.metrics import GatewayMetrics
from headrace.telemetry.exposition import INFO, INFO_HELP, INFO_LABELS
from headrace.telemetry.figures import FIGURES, is_counter
from headrace.telemetry.otlp_metrics import otlp_name
from headrace.telemetry.worker_metrics import WorkerHistograms

PAGE = Path(__file__).with_name("metrics.md")
ELSEWHERE = {
    "headrace_gateway_requests_total": "vllm:request_success_total",
    "headrace_gateway_time_to_first_token_seconds": "vllm:time_to_first_token_seconds",
    "headrace_gateway_inter_token_seconds": "vllm:inter_token_latency_seconds",
    "headrace_gateway_e2e_request_latency_seconds": "vllm:e2e_request_latency_seconds",
    "headrace_request_queue_time_seconds": "vllm:request_queue_time_seconds",
    "headrace_request_prefill_time_seconds": "vllm:request_prefill_time_seconds",
    "headrace_request_decode_time_seconds": "vllm:request_decode_time_seconds",
    "headrace_requests_running": "vllm:num_requests_running",
    "headrace_requests_waiting": "vllm:num_requests_waiting",
    "headrace_preemptions_total": "vllm:num_preemptions_total",
    "headrace_prompt_tokens_total": "vllm:prompt_tokens_total",
    "headrace_generation_tokens_total": "vllm:generation_tokens_total",
    "headrace_prefix_cache_queries_total": "vllm:prefix_cache_queries_total",
    "headrace_prefix_cache_hits_total": "vllm:prefix_cache_hits_total",
    "headrace_speculation_<drafter>_drafted_total": "vllm:spec_decode_num_draft_tokens_total",
    "headrace_speculation_<drafter>_accepted_total": "vllm:spec_decode_num_accepted_tokens_total",
}
"""Which metric of vLLM says the same, for dashboards that are to be moved."""
HEAD = """# Metrics

<!-- made from the code by docs/metrics_table.py: change that, or the code, not this -->

Every process shows its metrics at `/metrics`: a gateway at its HTTP port, a worker at `--metrics-port` (a free port on
loopback unless you say otherwise; `headrace status` tells which). Who asks for OpenMetrics gets the trace ids of
sampled requests with the histograms (exemplars). Where `OTEL_EXPORTER_OTLP_ENDPOINT` is set, the same metrics are
pushed to it every `OTEL_METRIC_EXPORT_INTERVAL` milliseconds, under the names of the last column.

A gateway also shows the figures that workers publish in the registry (the third table), so that one target is enough
for a small mesh. Where workers are scraped as well, scrape gateways with `/metrics?scope=process`, or aggregate with
`max by (tier, worker)`. Memory, processor time and open files of each process are there under Prometheus' own names
(`process_resident_memory_bytes` and so on).
"""
COLUMNS = "| metric | type | labels | meaning | elsewhere | over OTLP |\n| --- | --- | --- | --- | --- | --- |"


def page() -> str:
    """All of docs/metrics.md."""
    gateway = GatewayMetrics(_no_node())
    registry = CollectorRegistry()
    WorkerHistograms(registry)
    parts = [HEAD, "## Gateway\n", COLUMNS, *_rows(gateway.own), ""]
    parts += ["## Workers: times and sizes\n", COLUMNS, *_rows(registry), ""]
    parts += ["## Workers: figures in the registry\n", COLUMNS, *_figures(), ""]
    return "\n".join(parts)


def _no_node() -> Any:
    return SimpleNamespace(
        registry=SimpleNamespace(me=SimpleNamespace(model=""), members={}), mesh=SimpleNamespace(refused=0)
    )


def _rows(registry: CollectorRegistry) -> Iterator[str]:
    for collector in registry._collector_to_names:
        for family in collector.collect():
            if family.name.startswith("process_"):
                continue
            labels = getattr(collector, "_labelnames", None) or getattr(family, "_labelnames", ())
            name = family.name + ("_total" if family.type == "counter" else "")
            yield _row(name, family.type, labels, family.documentation, otlp_name(family.name))


def _figures() -> Iterator[str]:
    yield _row(INFO, "gauge", tuple(INFO_LABELS), INFO_HELP, otlp_name(INFO))
    for figure, help in FIGURES.items():
        kind = "counter" if is_counter(figure) else "gauge"
        name = f"headrace_{figure}"
        family = name.removesuffix("_total") if kind == "counter" else name
        yield _row(name, kind, ("tier", "worker"), help, otlp_name(family))


def _row(name: str, kind: str, labels: tuple[str, ...], help: str, otlp: tuple[str, str]) -> str:
    elsewhere = f"`{ELSEWHERE[name]}`" if name in ELSEWHERE else ""
    shown = ", ".join(labels)
    return f"| `{name}` | {kind} | {shown} | {help} | {elsewhere} | `{otlp[0]}` ({otlp[1]}) |"


if __name__ == "__main__":
    PAGE.write_text(page())
