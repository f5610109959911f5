"""Workers that have hardly any pages, split and in one process."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from headrace.loadtest.client import Answer, StreamClient
from tests.e2e.tiny_mesh import MODEL, VOCABULARY, TinyMesh, tiny_mesh

REQUESTS = 500
AT_ONCE = 100


async def ask_all(mesh: TinyMesh, asked: Sequence[tuple[list[int], int]]) -> list[Answer]:
    """Prompts and how many tokens each wants, a hundred at a time."""
    room = asyncio.Semaphore(AT_ONCE)

    async def ask(prompt: list[int], tokens: int) -> Answer:
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
MIXED = {"colocate_pages": [9], "prefill_pages": [24], "decode_pages": [8]}


@pytest.mark.parametrize("pages", [SPLIT, COLOCATED, MIXED], ids=["split", "colocated", "mixed"])
async def test_500_requests_end_though_decoding_has_hardly_any_pages(
    pages: dict[str, list[int]], redis_url: str, tmp_path: Path
) -> None:
    """Many more wait at any time than fit, and each ends as it does undisturbed."""
    asked = questions()
    async with tiny_mesh(redis_url, tmp_path, **pages) as mesh:
        answers = await ask_all(mesh, asked)
        for engine in mesh.engines.values():
            engine.pool.check_integrity()
            assert engine.pool.num_in_use == 0
    assert [len(answer.token_times) for answer in answers] == [tokens for _, tokens in asked]
    async with tiny_mesh(redis_url, tmp_path, prefill_pages=[200], decode_pages=[400]) as mesh:
        undisturbed = await ask_all(mesh, asked[:50])
    assert [answer.text for answer in answers[:50]] == [answer.text for answer in undisturbed]


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
