"""One worker that is both tiers: what a client sees is what two workers give, and pages change owner in it."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator

import pytest

from headrace.loadtest.client import StreamClient
from headrace.loadtest.local_mesh import LocalMesh, local_mesh
from headrace.loadtest.prompts import unique_tokens
from headrace.processes import end_process

MODEL = "smollm2"
FLAGS = ("--dtype", "float32", "--max-num-seqs", "32")
ASKED = [(unique_tokens(length, length), 12) for length in (1, 15, 16, 17, 100, 300, 33, 64)]


@pytest.fixture(scope="module")
async def colocated() -> AsyncIterator[LocalMesh]:
    """As `headrace up --colocate` starts it."""
    async with local_mesh(*FLAGS, "--colocate") as running:
        yield running


async def texts(mesh: LocalMesh) -> list[str]:
    """All at once; later prompts are computed in chunks, while the first are decoded."""
    async with StreamClient(mesh.url, MODEL) as client:
        answers = await asyncio.gather(*[client.complete(prompt, tokens) for prompt, tokens in ASKED])
    assert [len(answer.token_times) for answer in answers] == [tokens for _, tokens in ASKED]
    return [answer.text for answer in answers]


async def test_greedy_streams_are_those_of_split_tiers(mesh: LocalMesh, colocated: LocalMesh) -> None:
    """Twice, the second time with prefixes that both tiers hold; afterwards no page is in use."""
    expected = await texts(mesh)
    assert [await texts(colocated), await texts(colocated)] == [expected, expected]
    await colocated.until_no_page_is_used()
    handed_over = await colocated.metrics("headrace_handoff_transport_local_total")
    assert handed_over["prefill-0"] >= 2 * len(ASKED)


async def test_clients_that_leave_free_all_pages(colocated: LocalMesh) -> None:
    """While their prompts are computed, and while they are decoded."""
    async with StreamClient(colocated.url, MODEL) as client:
        load = [asyncio.create_task(client.complete(unique_tokens(400, 1000 + n), 200)) for n in range(12)]
        await colocated.until_pages_are_used("decode-0")
        for task in load:
            task.cancel()
        await asyncio.wait(load)
    await colocated.until_no_page_is_used()


async def test_a_killed_worker_comes_back_with_all_its_requests(colocated: LocalMesh) -> None:
    """Both tiers die at once; the gateway queues the rest of each stream, which another process goes on with."""
    expected = await texts(colocated)
    serving = asyncio.create_task(texts(colocated))
    await colocated.until_pages_are_used("decode-0")
    colocated.kill("colocate-0")
    assert await serving == expected
    await colocated.until_no_page_is_used()


async def test_a_separate_prefill_worker_may_join(redis_url: str) -> None:
    """It hands over to the colocated worker as to any other, while that one's own prompts stay where they are."""
    settings = ("--redis", redis_url, "--namespace", "mixed", *FLAGS, "--cpu-threads", "1")
    async with local_mesh(*settings, "--colocate") as mesh:
        expected = await texts(mesh)
        command = [sys.executable, "-m", "headrace", "prefill", "--worker-id", "prefill-apart", *settings]
        process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.DEVNULL)
        try:
            async with asyncio.timeout(90):
                while not (await mesh.metrics("headrace_handoff_transport_shm_total")).get("prefill-apart"):
                    assert await texts(mesh) == expected
            await mesh.until_no_page_is_used()
        finally:
            await end_process(process, 15, 20.0)
