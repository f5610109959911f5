"""A decode worker that is to stop hands its requests over: clients see what they would have seen without."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from headrace.decode.worker import DecodeWorker
from headrace.loadtest.client import Answer, StreamClient
from headrace.prefill.worker import PrefillWorker
from tests.e2e.tiny_mesh import MAX_MODEL_LEN, MODEL, VOCABULARY, TinyMesh, tiny_mesh

TOKENS = 70


def prompts(count: int) -> list[list[int]]:
    """Short ones, so that there is much to decode; lengths on both sides of a page's end."""
    chance = random.Random(3)
    longest = MAX_MODEL_LEN - TOKENS
    return [[chance.randrange(VOCABULARY) for _ in range(1 + n % longest)] for n in range(12, 12 + count)]


async def ask_all(mesh: TinyMesh, asked: list[list[int]]) -> list[Answer]:
    """All at once."""
    async with StreamClient(mesh.url, MODEL) as client:
        return await asyncio.gather(*[client.complete(prompt, TOKENS) for prompt in asked])


async def until_running(mesh: TinyMesh, name: str, count: int) -> None:
    """Wait until a decode worker has so many requests in its batch and some tokens of each."""
    worker = mesh.workers[name]
    assert isinstance(worker, DecodeWorker)
    async with asyncio.timeout(30):
        while True:
            running = worker._scheduler.batch()
            if len(running) >= count and min(sequence.generated for sequence in running) > 2:
                return
            await asyncio.sleep(0)


def assert_nothing_is_held(mesh: TinyMesh) -> None:
    """Of any worker, those that left among them."""
    for engine in mesh.engines.values():
        engine.pool.check_integrity()
        assert engine.pool.num_in_use == 0


def moved_to(mesh: TinyMesh, name: str) -> int:
    """Requests that came from another decode worker."""
    worker = mesh.workers[name]
    assert isinstance(worker, DecodeWorker)
    return worker._moved_here


def recomputed(mesh: TinyMesh) -> float:
    """Prompts that the prefill worker computed again."""
    worker = mesh.workers["prefill-0"]
    assert isinstance(worker, PrefillWorker)
    return worker._recomputed


@pytest.mark.parametrize("speculates", [False, True], ids=["plain", "drafts"])
async def test_running_requests_move_and_no_prompt_is_computed_again(
    speculates: bool, redis_url: str, tmp_path: Path
) -> None:
    """The worker leaves while all its streams run; another has them all, and each text is as it is undisturbed."""
    asked = prompts(6)
    async with tiny_mesh(redis_url, tmp_path, prefill_pages=[60], decode_pages=[60]) as mesh:
        undisturbed = await ask_all(mesh, asked)
    async with tiny_mesh(redis_url, tmp_path, prefill_pages=[60], decode_pages=[60, 60], speculates=speculates) as mesh:
        asking = asyncio.create_task(ask_all(mesh, asked))
        await until_running(mesh, "decode-0", 1)
        await mesh.stop("decode-0")
        assert not asking.done()
        answers = await asking
        assert moved_to(mesh, "decode-1") > 0
        assert recomputed(mesh) == 0
        assert_nothing_is_held(mesh)
    assert [len(answer.token_times) for answer in answers] == [TOKENS] * len(asked)
    assert [answer.text for answer in answers] == [answer.text for answer in undisturbed]
