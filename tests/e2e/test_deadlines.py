"""A request whose deadline has passed ends at the worker that holds it, too."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from headrace.decode import step_runner
from headrace.decode import worker as decode_worker
from headrace.gateway.mesh_client import MeshClient
from tests.e2e.tiny_mesh import MODEL, tiny_mesh


async def test_a_decode_worker_lets_go_though_no_gateway_tells_it_to(
    redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gateway may be cut off: its cancellation is lost here."""
    steps = 0
    run_step = step_runner.run_step

    def slow_step(*arguments: Any) -> Any:
        nonlocal steps
        steps += 1
        time.sleep(0.05)
        return run_step(*arguments)

    monkeypatch.setattr(step_runner, "run_step", slow_step)
    monkeypatch.setattr(decode_worker, "REAP_SECONDS", 0.1)
    monkeypatch.setattr(MeshClient, "cancel", lambda *arguments: None)
    body = {"model": MODEL, "prompt": [1, 2, 3], "max_tokens": 90, "ignore_eos": True}
    async with tiny_mesh(redis_url, tmp_path, prefill_pages=[16], decode_pages=[16]) as mesh:
        async with (
            aiohttp.ClientSession() as http,
            http.post(f"{mesh.url}/v1/completions", json=body, headers={"X-Request-Timeout": "1"}) as response,
        ):
            assert response.status == 504
            assert (await response.json())["error"]["code"] == "deadline_exceeded"
        pool = mesh.engines["decode-0"].pool
        async with asyncio.timeout(20):
            while pool.num_in_use:  # noqa: ASYNC110 - it lets go by itself
                await asyncio.sleep(0.02)
    assert steps < 80
