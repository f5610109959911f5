"""Two prefill workers and one decode worker that has hardly any pages."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from pathlib import Path

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


async def test_500_requests_end_though_the_decode_worker_has_eight_pages(redis_url: str, tmp_path: Path) -> None:
    """Many more wait at any time than fit, a long one needs most of the pool, and each ends as it does undisturbed."""
    chance = random.Random(1)
    asked = [
        ([chance.randrange(VOCABULARY) for _ in range(chance.randrange(1, 70))], chance.choice([1, 2, 8, 20]))
        for _ in range(REQUESTS)
    ]
    async with tiny_mesh(redis_url, tmp_path, prefill_pages=[24, 24], decode_pages=[8]) as mesh:
        answers = await ask_all(mesh, asked)
        for engine in mesh.engines.values():
            engine.pool.check_integrity()
            assert engine.pool.num_in_use == 0
    assert [len(answer.token_times) for answer in answers] == [tokens for _, tokens in asked]
    async with tiny_mesh(redis_url, tmp_path, prefill_pages=[200], decode_pages=[400]) as mesh:
        undisturbed = await ask_all(mesh, asked[:100])
    assert [answer.text for answer in answers[:100]] == [answer.text for answer in undisturbed]
