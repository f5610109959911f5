"""Workers that have hardly any pages, split and in one process."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from headrace.loadtest.client import StreamClient
from headrace.loadtest.timed_stream import TimedStream
from tests.e2e.tiny_mesh import MODEL, VOCABULARY, TinyMesh, tiny_mesh

REQUESTS = 500
AT_ONCE = 100


async def ask_all(mesh: TinyMesh, asked: Sequence[tuple[list[int], int]]) -> list[TimedStream]:
    """Prompts and how many tokens each wants, a hundred at a time."""
    room = asyncio.Semaphore(AT_ONCE)

    async def ask(prompt: list[int], tokens: int) -> TimedStream:
        async with room:
            return await client.complete(prompt, tokens)

    async with StreamClient(mesh.url, MODEL) as client:
        return await asyncio.gather(*[ask(prompt, tokens) for prompt, tokens in asked])


def questions() -> list[tuple[list[int], int]]:
    """The same ones every time; some need most of a pool of eight pages."""
    chance = random.Random(1)
    return [
        ([chance.randrange(VOCABULARY) for _ in range(chance.randrange(1, 70))], chance.choice([1, 2, 8, 20]))
        for _ in range(REQUESTS)
    ]


SPLIT = {"prefill_pages": [24, 24], "decode_pages": [8]}
COLOCATED = {"colocate_pages": [10]}
SHARED = {"colocate_pages": [10], "shares_passes": True}
MIXED = {"colocate_pages": [9], "prefill_pages": [24], "decode_pages": [8]}


@pytest.mark.parametrize("pages", [SPLIT, COLOCATED, SHARED, MIXED], ids=["split", "colocated", "shared", "mixed"])
async def test_500_requests_end_though_decoding_has_hardly_any_pages(
    pages: dict[str, Any], redis_url: str, tmp_path: Path
) -> None:
    """Many more wait at any time than fit, and each ends as it does undisturbed."""
    asked = questions()
    async with tiny_mesh(redis_url, tmp_path, **pages) as mesh:
        answers = await ask_all(mesh, asked)
        await mesh.until_no_page_is_used()
    assert [len(answer.token_times) for answer in answers] == [tokens for _, tokens in asked]
    async with tiny_mesh(redis_url, tmp_path, prefill_pages=[200], decode_pages=[400]) as mesh:
        undisturbed = await ask_all(mesh, asked[:50])
    assert [answer.text for answer in answers[:50]] == [answer.text for answer in undisturbed]


@pytest.mark.parametrize("drafts_itself", [False, True], ids=["ngram", "draft model"])
@pytest.mark.parametrize("pages", [SPLIT, COLOCATED], ids=["split", "colocated"])
async def test_drafts_change_no_text_though_there_are_hardly_any_pages(
    pages: dict[str, list[int]], drafts_itself: bool, redis_url: str, tmp_path: Path
) -> None:
    """They are cut to the pages that are left, requests are given up and begun again, and no page is lost."""
    asked = questions()[:90]
    async with tiny_mesh(redis_url, tmp_path, **pages, speculates=True, drafts_itself=drafts_itself) as mesh:
        answers = await ask_all(mesh, asked)
        await mesh.until_no_page_is_used()
        (speculator,) = mesh.speculators
        assert speculator.counters.total.drafted > speculator.counters.total.accepted > 50
        assert (speculator.counters.of["model"].accepted > 20) is drafts_itself
    async with tiny_mesh(redis_url, tmp_path, prefill_pages=[200], decode_pages=[400]) as mesh:
        undisturbed = await ask_all(mesh, asked)
    assert [answer.text for answer in answers] == [answer.text for answer in undisturbed]


async def test_clients_that_leave_a_colocated_worker_free_its_one_pool(redis_url: str, tmp_path: Path) -> None:
    """At any moment: in the queue, before a page is had, while a chunk runs, while tokens come."""
    chance = random.Random(2)
    async with tiny_mesh(redis_url, tmp_path, colocate_pages=[24]) as mesh, StreamClient(mesh.url, MODEL) as client:
        pool = mesh.engines["colocate-0"].pool
        for _ in range(6):
            load = [asyncio.create_task(client.complete(prompt, 20)) for prompt, _ in questions()[:40]]
            await asyncio.wait(load, timeout=chance.random())
            for task in load:
                task.cancel()
            await asyncio.wait(load)
            pool.check_integrity()
        async with asyncio.timeout(20):
            freed = asyncio.Event()
            pool.on_freed.append(freed.set)
            while pool.num_in_use:
                await freed.wait()
                freed.clear()


async def test_pages_that_a_step_writes_to_stay_taken_when_their_client_leaves(redis_url: str, tmp_path: Path) -> None:
    """In one pool, a request that is decoded could have them otherwise while the step still runs."""
    async with tiny_mesh(redis_url, tmp_path, colocate_pages=[24]) as mesh, StreamClient(mesh.url, MODEL) as client:
        engine = mesh.engines["colocate-0"]
        pool, compute = engine.pool, engine.prefill
        await client.complete([7], 2)  # the gateway's own first request is over, too
        loop, computing, freed, may_end = (
            asyncio.get_running_loop(),
            asyncio.Event(),
            asyncio.Event(),
            threading.Event(),
        )

        def slow(*arguments: Any) -> Any:
            loop.call_soon_threadsafe(computing.set)
            assert may_end.wait(20)
            return compute(*arguments)

        with mock.patch.object(engine, "prefill", slow):
            asking = asyncio.create_task(client.complete(list(range(70)), 20))
            await asyncio.wait_for(computing.wait(), 20)
            worker_tasks = [task for task in asyncio.all_tasks() if task.get_name().startswith("serve ")]
            asking.cancel()
            await asyncio.wait(worker_tasks, timeout=20)
            assert pool.num_in_use == pool.pages_for(70)
            pool.on_freed.append(freed.set)
            may_end.set()
            await asyncio.wait_for(freed.wait(), 20)
        assert pool.num_in_use == 0
