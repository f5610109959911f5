"""A prefill worker that is to stop: what it has begun it hands over, all else another worker computes at once."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any
from unittest import mock

from headrace.loadtest.client import StreamClient
from headrace.prefill.worker import PrefillWorker
from tests.e2e.tiny_mesh import LEASE_SECONDS, MODEL, TinyMesh, tiny_mesh


def prefill(mesh: TinyMesh, name: str) -> PrefillWorker:
    """One of the mesh's."""
    worker = mesh.workers[name]
    assert isinstance(worker, PrefillWorker)
    return worker


async def test_entries_that_have_not_begun_go_back_to_the_queue_at_once(redis_url: str, tmp_path: Path) -> None:
    """While one or two prompts are computed, others wait; they are served elsewhere in the same attempt, as if new."""
    prompts = [[number] * 40 for number in range(1, 7)]
    async with (
        tiny_mesh(redis_url, tmp_path, prefill_pages=[60], decode_pages=[60]) as mesh,
        StreamClient(mesh.url, MODEL) as client,
    ):
        undisturbed = [(await client.complete(prompt, 8)).text for prompt in prompts]
    async with (
        tiny_mesh(redis_url, tmp_path, prefill_pages=[60, 60], decode_pages=[60]) as mesh,
        StreamClient(mesh.url, MODEL) as client,
    ):
        staying, engine = prefill(mesh, "prefill-1"), mesh.engines["prefill-0"]
        loop, computing, may_end = asyncio.get_running_loop(), asyncio.Event(), threading.Event()
        is_at_gate, gate = asyncio.Event(), asyncio.Event()
        compute, take = engine.prefill, staying._intake._claim_or_take

        def slow(*arguments: Any) -> Any:
            loop.call_soon_threadsafe(computing.set)
            assert may_end.wait(20)
            return compute(*arguments)

        async def take_later() -> Any:
            is_at_gate.set()
            await gate.wait()
            return await take()

        with (
            mock.patch.object(engine, "prefill", slow),
            mock.patch.object(staying._intake, "_claim_or_take", take_later),
        ):
            await is_at_gate.wait()
            asking = asyncio.gather(*[client.complete(prompt, 8) for prompt in prompts])
            await computing.wait()
            await until_held(prefill(mesh, "prefill-0"), len(prompts))
            stopping = asyncio.create_task(mesh.stop("prefill-0"))
            gate.set()
            async with asyncio.timeout(LEASE_SECONDS / 2):
                await until_held(staying, len(prompts) - 2)
            may_end.set()
            answers = await asking
            await stopping
        assert [answer.text for answer in answers] == undisturbed
        assert staying._service.recomputed == 0
        for each in mesh.engines.values():
            each.pool.check_integrity()
            assert each.pool.num_in_use == 0


async def until_held(worker: PrefillWorker, count: int) -> None:
    """Wait until a worker has taken so many entries."""
    while len(worker._tasks) < count:  # noqa: ASYNC110 (the worker tells nobody)
        await asyncio.sleep(0)
