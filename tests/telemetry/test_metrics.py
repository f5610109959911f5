"""What processes show at `/metrics`, and that docs/metrics.md tells all of it."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families

from headrace.settings import Settings, SettingsError
from headrace.telemetry.endpoint import worker_endpoint
from headrace.telemetry.figures import UNKNOWN, describe
from tests.docs.test_docs import script
from tests.e2e.tiny_mesh import MODEL, tiny_mesh
from tests.telemetry.dying_mesh import dying_mesh
from tests.telemetry.test_traces import stream, until_ready

ROOT = Path(__file__).parents[2]


def test_the_documented_table_is_the_code_s() -> None:
    """Run `python docs/metrics_table.py` where this fails."""
    table = script("metrics_table")
    assert table.PAGE.read_text() == table.page()
    assert [name for name in table.ELSEWHERE if f"`{name}`" not in table.page()] == []


async def test_all_that_a_mesh_shows_is_documented(redis_url: str, tmp_path: Path) -> None:
    """Drafts and both tiers: a new figure needs a line in `figures.py`."""
    async with (
        tiny_mesh(redis_url, tmp_path, prefill_pages=[12], decode_pages=[12], speculates=True) as mesh,
        aiohttp.ClientSession() as http,
    ):
        body = {"model": MODEL, "prompt": [5, 6, 7] * 8, "max_tokens": 12, "temperature": 0}
        await until_ready(mesh.url, http, 2)
        async with http.post(mesh.url + "/v1/completions", json=body) as response:
            assert response.status == 200
        found = await _samples(http, f"{mesh.url}/metrics", until="headrace_speculation_steps_total")
        own = await _samples(http, f"{mesh.url}/metrics?scope=process")
    documented = (ROOT / "docs/metrics.md").read_text()
    names = re.findall(r"^\| `(.*?)(?:_total)?` \|", documented, re.MULTILINE)
    patterns = [re.sub("<.*?>", "[a-z_0-9]+", name) for name in names]
    named = re.compile(f"({'|'.join(patterns)})(_total|_bucket|_sum|_count|_created)?")
    assert [name for name, _, _ in found if not named.fullmatch(name) and not name.startswith("process_")] == []
    workers = [name for name, labels, _ in found if set(labels) == {"tier", "worker"}]
    served = [labels["model_name"] for name, labels, _ in found if name == "headrace_worker_info"]
    assert served == [MODEL] * 2
    assert [name for name in workers if describe(name.removeprefix("headrace_")) == UNKNOWN] == []
    assert workers
    assert not [name for name, labels, _ in own if "worker" in labels]


async def _samples(http: aiohttp.ClientSession, url: str, until: str = "") -> list[tuple[str, dict[str, str], float]]:
    while True:
        async with http.get(url) as response:
            text = await response.text()
        await asyncio.sleep(0.02)
        if until in text:
            return [
                (s.name, s.labels, s.value) for family in text_string_to_metric_families(text) for s in family.samples
            ]


async def test_a_worker_shows_its_own_metrics_and_whether_it_is_ready(redis_url: str, tmp_path: Path) -> None:
    """Histograms live where the work is done; the registry tells where."""
    async with dying_mesh(redis_url, tmp_path) as mesh, aiohttp.ClientSession() as http:
        await until_ready(mesh.url, http, 2)
        await stream(mesh, http)
        prefill, decode = (f"http://{mesh.endpoints[name].address}" for name in ("prefill-0", "decode-0"))
        for url in (prefill, decode):
            async with http.get(url + "/health") as health, http.get(url + "/ready") as ready:
                assert (health.status, ready.status) == (200, 200)
        of_prefill, of_decode = await _samples(http, prefill + "/metrics"), await _samples(http, decode + "/metrics")
    labels = {"tier": "prefill", "worker": "prefill-0", "model_name": MODEL}
    counts = {name: value for name, found, value in of_prefill if found.items() >= labels.items()}
    assert counts["headrace_request_queue_time_seconds_count"] >= 1
    assert counts["headrace_handoff_exposed_seconds_count"] == counts["headrace_handoff_seconds_count"] >= 1
    steps = {name: value for name, found, value in of_decode if found.get("worker") == "decode-0"}
    assert steps["headrace_decode_batch_size_count"] >= 23
    assert steps["headrace_request_decode_time_seconds_count"] >= 1
    assert steps["headrace_kv_pages_total"] == 12


async def test_a_worker_that_loads_is_alive_and_not_ready() -> None:
    """Probes of Kubernetes tell a slow start from a dead process."""
    async with (
        worker_endpoint(Settings(), "decode") as endpoint,
        aiohttp.ClientSession(f"http://{endpoint.address}") as http,
        http.get("/health") as health,
        http.get("/ready") as ready,
    ):
        assert (health.status, ready.status) == (200, 503)
        assert "loaded" in (await ready.json())["reason"]


async def test_a_metrics_port_that_is_taken_is_named() -> None:
    """Instead of a traceback."""
    async with worker_endpoint(Settings(), "decode") as endpoint:
        port = int(endpoint.address.rpartition(":")[2])
        with pytest.raises(SettingsError, match=f"--metrics-port {port}"):
            async with worker_endpoint(Settings(metrics_port=port), "decode"):
                pass
