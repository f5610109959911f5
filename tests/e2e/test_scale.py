"""A running mesh of synthetic engines grows and shrinks while it serves."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import aiohttp

from headrace.loadtest.local_mesh import local_mesh
from headrace.loadtest.timed_stream import completion, timed_stream
from headrace.scaling.step_costs import Cost, StepCosts

COSTS = StepCosts(machine="test", prefill=Cost([(1, 0.002)]), decode=Cost([(1, 0.02)]))
STREAMS, TOKENS = 24, 100


async def headrace(*words: str) -> str:
    """Run a command; returns what it says. Raises where it fails."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "headrace", *words), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    out, _ = await process.communicate()
    assert process.returncode == 0, out.decode()
    return out.decode()


async def test_a_mesh_is_scaled_under_load_and_no_stream_notices(tmp_path: Path) -> None:
    """All texts are the same, since a synthetic engine counts."""
    COSTS.write(tmp_path / "costs.json")
    flags = ("--load-format", "synthetic", "--step-costs", str(tmp_path / "costs.json"), "--decode", "2")
    async with local_mesh(*flags) as mesh, aiohttp.ClientSession(mesh.url) as session:
        port = mesh.url.rpartition(":")[2]
        streams = [
            asyncio.create_task(timed_stream(session, completion("smollm2", [1000 + number] * 20, TOKENS)))
            for number in range(STREAMS)
        ]
        said = await headrace("scale", "prefill=2", "decode=1", "--port", port)
        assert "prefill-1: serves" in said
        assert "decode-1: gone" in said
        texts = {stream.text for stream in await asyncio.gather(*streams)}
        assert len(texts) == 1
        await mesh.until_no_page_is_used()
        async with asyncio.timeout(10):  # figures come once a beat of their worker
            while True:
                if (await mesh.metrics("headrace_kv_pages_total")).keys() == {"prefill-0", "prefill-1", "decode-0"}:
                    break
                await asyncio.sleep(0.1)
