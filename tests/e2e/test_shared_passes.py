"""Prompts and decode steps in the same forward passes: requests join the pass that computes the end of their prompt."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any
from unittest import mock

from headrace.decode.worker import DecodeWorker
from headrace.kvtransfer.messages import Commit
from headrace.loadtest.client import StreamClient
from headrace.loadtest.timed_stream import TimedStream
from tests.e2e.tiny_mesh import MODEL, VOCABULARY, TinyMesh, tiny_mesh


def questions() -> list[tuple[list[int], int]]:
    """Prompts of one page, of many, and of just so many tokens."""
    chance = random.Random(2)
    lengths = [1, 2, 15, 16, 17, 32, 33, 48, 64, 70] * 3
    return [
        ([chance.randrange(VOCABULARY) for _ in range(length)], 1 + 3 * (n % 8)) for n, length in enumerate(lengths)
    ]


async def ask_all(mesh: TinyMesh) -> list[str]:
    """All at once, twice: the second time with prefixes that are there."""
    async with StreamClient(mesh.url, MODEL) as client:
        answers: list[TimedStream] = []
        for _ in range(2):
            answers += await asyncio.gather(*[client.complete(prompt, tokens) for prompt, tokens in questions()])
    assert [len(answer.token_times) for answer in answers] == [tokens for _, tokens in questions()] * 2
    return [answer.text for answer in answers]


async def test_requests_that_join_early_say_what_others_say(redis_url: str, tmp_path: Path) -> None:
    """Without a word of the prefill worker about their first token; the pages come back."""
    async with tiny_mesh(redis_url, tmp_path, prefill_pages=[200], decode_pages=[400]) as mesh:
        expected = await ask_all(mesh)
    joined: list[Commit] = []

    def join(worker: DecodeWorker, sender: str, commit: Commit) -> None:
        joined.append(commit)
        worker.receiver.handle(sender, commit)

    with mock.patch.object(DecodeWorker, "join", join):
        async with tiny_mesh(redis_url, tmp_path, colocate_pages=[300], shares_passes=True) as mesh:
            assert await ask_all(mesh) == expected
            engine: Any = mesh.engines["colocate-0"]
            await mesh.until_no_page_is_used()
            assert engine.graph_decoder.shared > 10
    assert len(joined) > 20
    assert all(commit.token_id is None for commit in joined)
