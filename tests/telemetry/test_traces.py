"""One request is one trace, over all tiers, as a collector gets it."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from headrace.telemetry.otel import TelemetryError, is_on
from tests.e2e.tiny_mesh import MODEL
from tests.telemetry.dying_mesh import DyingMesh, dying_mesh
from tests.telemetry.otlp_receiver import OtlpReceiver, ReceivedSpan, otlp_receiver

PATH = "/v1/completions"
BODY = {"model": MODEL, "prompt": list(range(100, 140)), "max_tokens": 24, "temperature": 0, "stream": True}
CLIENT_TRACE, CLIENT_SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture
async def collector(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[OtlpReceiver]:
    """A collector, and the variables that send everything there."""
    async with otlp_receiver() as receiver:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.url)
        yield receiver


async def until_ready(url: str, http: aiohttp.ClientSession, members: int) -> None:
    """Wait until the gateway is, and knows that many workers' figures."""
    async with asyncio.timeout(30):
        while True:
            async with http.get(url + "/ready") as response, http.get(url + "/metrics") as metrics:
                text = await metrics.text()
                if response.status == 200 and text.count("headrace_kv_pages_total{") == members:
                    return
            await asyncio.sleep(0.02)


async def stream(
    mesh: DyingMesh, http: aiohttp.ClientSession, kill: bool = False, headers: dict[str, str] | None = None
) -> list[Any]:
    """All events of one answer; `kill`: the worker dies that has stalled after the first tokens."""
    events = []
    async with http.post(mesh.url + PATH, json=BODY, headers=headers) as response:
        assert response.status == 200
        async for line in response.content:
            if not line.startswith(b"data: {"):
                continue
            events.append(json.loads(line.removeprefix(b"data: ")))
            if len(events) == 1 and kill:
                await mesh.has_stalled.wait()
                await mesh.kill(mesh.stalled)
    return events


def _one(spans: list[ReceivedSpan], name: str) -> ReceivedSpan:
    found = [span for span in spans if span.name == name]
    assert len(found) == 1, (name, found)
    return found[0]


def _of_clients(collector: OtlpReceiver) -> list[ReceivedSpan]:
    """All spans: the gateway's own warm-up is not traced."""
    assert {span.trace_id for span in collector.spans} == {collector.spans[0].trace_id}
    assert collector.orphans() == []
    return collector.spans


async def test_a_request_is_one_trace_over_all_tiers(collector: OtlpReceiver, redis_url: str, tmp_path: Path) -> None:
    """Each tier's spans come under the gateway's attempt, in the order of the request's states."""
    async with dying_mesh(redis_url, tmp_path) as mesh, aiohttp.ClientSession() as http:
        await until_ready(mesh.url, http, 2)
        answer = await stream(mesh, http)
        async with http.get(mesh.url + "/metrics", headers={"Accept": "application/openmetrics-text"}) as response:
            openmetrics = await response.text()
        endpoint = mesh.endpoints["prefill-0"].address
        accept = {"Accept": "application/openmetrics-text"}
        async with http.get(f"http://{endpoint}/metrics", headers=accept) as response:
            of_worker = await response.text()
    spans = _of_clients(collector)
    root, attempt = _one(spans, f"text_completion {MODEL}"), _one(spans, "attempt")
    assert {span.service for span in spans} == {"headrace-gateway", "headrace-prefill", "headrace-decode"}
    assert root.parent_id == ""
    assert root.attributes["gen_ai.operation.name"] == "text_completion"
    assert (root.attributes["gen_ai.usage.input_tokens"], root.attributes["gen_ai.usage.output_tokens"]) == (40, 24)
    assert root.attributes["gen_ai.response.id"] == answer[0]["id"]
    assert root.attributes["http.response.status_code"] == 200
    assert attempt.parent_id == _one(spans, "stream").parent_id == root.span_id
    stages = [_one(spans, name) for name in ("queue", "prefill", "handoff", "decode")]
    assert [stage.parent_id for stage in stages] == [attempt.span_id] * 4
    assert [stage.service for stage in stages] == ["headrace-prefill"] * 3 + ["headrace-decode"]
    assert all(stage.start <= stage.end for stage in stages)
    states = [attempt.events[0], *(stage.events[0] for stage in stages[1:]), stages[-1].events[-1]]
    assert states == ["queued", "prefilling", "handing_off", "decoding", "finished"]
    assert attempt.events[-1] == "finished"
    assert f'trace_id="{root.trace_id}"' in _exemplars(openmetrics, "headrace_gateway_time_to_first_token_seconds")
    assert f'trace_id="{root.trace_id}"' in _exemplars(of_worker, "headrace_request_prefill_time_seconds")


def _exemplars(text: str, family: str) -> str:
    return "\n".join(line for line in text.splitlines() if line.startswith(family) and " # " in line)


async def test_a_failover_stays_in_its_trace(collector: OtlpReceiver, redis_url: str, tmp_path: Path) -> None:
    """The decode worker dies in the middle of the stream: a second attempt, linked to the first, and no orphan."""
    async with (
        dying_mesh(redis_url, tmp_path, decode=2, stalls=True) as mesh,
        aiohttp.ClientSession() as http,
    ):
        await until_ready(mesh.url, http, 3)
        mesh.armed = True
        headers = {"traceparent": f"00-{CLIENT_TRACE}-{CLIENT_SPAN}-01"}
        answer = await stream(mesh, http, kill=True, headers=headers)
    assert answer[-1]["choices"][0]["finish_reason"] == "length"
    known = {span.span_id for span in collector.spans}
    assert [s.parent_id for s in collector.spans if s.parent_id not in known] == [CLIENT_SPAN]  # the client's own
    assert {span.trace_id for span in collector.spans} == {CLIENT_TRACE}
    root = _one(collector.spans, f"text_completion {MODEL}")
    first, second = sorted((s for s in collector.spans if s.name == "attempt"), key=lambda span: span.start)
    assert (first.parent_id, second.parent_id) == (root.span_id, root.span_id)
    assert (first.failed, second.failed, second.links) == (True, False, [first.span_id])
    assert first.events[-1] == "failed"
    under_second = {s.name for s in collector.spans if s.parent_id == second.span_id}
    assert under_second == {"queue", "prefill", "handoff", "decode"}
    assert {s.name for s in collector.spans if s.parent_id == first.span_id} >= {"queue", "prefill", "handoff"}
    assert root.attributes["headrace.requeues"] == 1


async def test_what_is_not_sampled_leaves_no_span(
    collector: OtlpReceiver, redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The standard variables choose; metrics are pushed all the same, under the conventions' names."""
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_traceidratio")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "0")
    async with dying_mesh(redis_url, tmp_path) as mesh, aiohttp.ClientSession() as http:
        await until_ready(mesh.url, http, 2)
        await stream(mesh, http)
    assert collector.spans == []
    first_token = collector.metrics["gen_ai.server.time_to_first_token"]
    assert first_token.unit == "s"
    assert first_token.histogram.data_points[0].count >= 1
    assert sum(first_token.histogram.data_points[0].bucket_counts) == first_token.histogram.data_points[0].count
    assert collector.metrics["headrace.handoff"].histogram.data_points[0].count >= 1
    assert collector.metrics["headrace.generation_tokens"].sum.is_monotonic


def test_without_an_endpoint_the_sdk_is_not_even_imported() -> None:
    """Who does not use it need not pay for it. (What redis-py finds installed, it imports by itself.)"""
    block = "import sys; sys.modules['opentelemetry'] = None; "
    code = block + "import headrace.gateway.main, headrace.prefill.main, headrace.decode.main"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_can_not_be_exported_is_said_at_the_start() -> None:
    """The protocol gRPC is another protocol; switching off by the standard's own variables works."""
    endpoint = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4317"}
    with pytest.raises(TelemetryError, match="http/protobuf"):
        is_on("traces", endpoint | {"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"})
    assert is_on("traces", endpoint)
    assert not is_on("traces", {})
    assert not is_on("traces", endpoint | {"OTEL_SDK_DISABLED": "true"})
    assert not is_on("metrics", endpoint | {"OTEL_METRICS_EXPORTER": "none"})


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Instead of a traceback."""
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http", None)
    with pytest.raises(TelemetryError, match=r"headrace\[telemetry\]"):
        is_on("traces", {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318"})
