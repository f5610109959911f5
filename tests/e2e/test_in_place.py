"""Decode workers that compute prompts themselves: every text is as where prompts are handed over."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from headrace.decode.worker import DecodeWorker
from headrace.engine.engine import Engine
from headrace.loadtest.client import StreamClient
from headrace.loadtest.prompts import unique_tokens
from headrace.prefill import in_place
from tests.e2e.tiny_mesh import MODEL, TinyMesh, tiny_mesh

PROMPTS = [unique_tokens(length, number) for number, length in enumerate([1, 16, 17, 32, 40, 64, 65, 80] * 2)]
TOKENS = 8


async def ask(mesh: TinyMesh) -> list[str]:
    """All prompts at once; the texts."""
    async with StreamClient(mesh.url, MODEL) as client:
        answers = await asyncio.gather(*[client.complete(prompt, TOKENS) for prompt in PROMPTS])
    assert [len(answer.token_times) for answer in answers] == [TOKENS] * len(PROMPTS)
    return [answer.text for answer in answers]


def figure(mesh: TinyMesh, name: str) -> float:
    """The sum of what the decode workers publish."""
    workers = [worker for worker in mesh.workers.values() if isinstance(worker, DecodeWorker)]
    return sum(worker._prompts.figures().get(name, 0.0) for worker in workers)


def assert_no_page_is_used(mesh: TinyMesh) -> None:
    """Nor lost."""
    for engine in mesh.engines.values():
        engine.pool.check_integrity()
        assert engine.pool.num_in_use == 0


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place wherever a decode worker takes the prompt."""
    monkeypatch.setattr(in_place, "SURE", 1e9)


async def handed_over(redis_url: str, folder: Path, **options: Any) -> list[str]:
    """The texts of a mesh that computes no prompt in place."""
    async with tiny_mesh(redis_url, folder, prefill_pages=[400], decode_pages=[400], **options) as mesh:
        return await ask(mesh)


@pytest.mark.parametrize("speculates", [False, True])
async def test_texts_are_the_same_in_place(
    redis_url: str, tmp_path: Path, always: None, speculates: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Prompts longer than a pass are handed over; what was computed once is found again."""
    caplog.set_level("INFO")
    expected = await handed_over(redis_url, tmp_path, speculates=speculates)
    assert "kv=in-place" not in caplog.text
    options: dict[str, Any] = {"decode_pages": [400, 400], "most_prompt_tokens": 64, "speculates": speculates}
    async with tiny_mesh(redis_url, tmp_path, prefill_pages=[400], **options) as mesh:
        assert await ask(mesh) == expected  # the first prompts are computed by the prefill worker, for the cost of it
        assert await ask(mesh) == expected
        tokens = figure(mesh, "in_place_prompt_tokens_total")
        assert figure(mesh, "in_place_prompts_total") >= len(PROMPTS) / 2
        assert await ask(mesh) == expected
        assert figure(mesh, "in_place_prompt_tokens_total") - tokens < sum(map(len, PROMPTS)) / 2
        assert "kv=in-place" in caplog.text
        assert_no_page_is_used(mesh)


async def test_a_pass_that_fails_costs_a_second_attempt(redis_url: str, tmp_path: Path, always: None) -> None:
    """Which is handed over."""
    expected = await handed_over(redis_url, tmp_path)
    async with tiny_mesh(redis_url, tmp_path, prefill_pages=[400], decode_pages=[400], most_prompt_tokens=128) as mesh:
        await ask(mesh)
        whole, decode = Engine.prefill, mesh.engines["decode-0"]

        def prefill(self: Engine, *arguments: Any) -> Any:
            if self is decode:
                raise RuntimeError("out of order")
            return whole(self, *arguments)

        with mock.patch.object(Engine, "prefill", prefill):
            assert await ask(mesh) == expected
        assert await ask(mesh) == expected
        assert_no_page_is_used(mesh)


async def test_a_client_that_leaves_meanwhile_leaves_no_page_behind(
    redis_url: str, tmp_path: Path, always: None
) -> None:
    """Whether its prompt waits there or is computed."""
    async with tiny_mesh(redis_url, tmp_path, prefill_pages=[400], decode_pages=[400], most_prompt_tokens=128) as mesh:
        expected = await ask(mesh)
        for delay in range(8):
            asking = asyncio.create_task(ask(mesh))
            await asyncio.sleep(delay / 100)
            asking.cancel()
            await asyncio.wait([asking])
        assert await ask(mesh) == expected
    assert_no_page_is_used(mesh)


async def test_workers_that_stop_lose_none(redis_url: str, tmp_path: Path, always: None) -> None:
    """A prefill worker that had prompts computed in place, and the decode worker that computes them."""
    options: dict[str, Any] = {"prefill_pages": [400, 400], "decode_pages": [400, 400], "most_prompt_tokens": 128}
    expected = await handed_over(redis_url, tmp_path)
    async with tiny_mesh(redis_url, tmp_path, **options) as mesh:
        await ask(mesh)
        for name in ("prefill-0", "decode-0"):
            asking = asyncio.create_task(ask(mesh))
            await asyncio.sleep(0.02)
            await mesh.stop(name)
            assert await asking == expected
        assert_no_page_is_used(mesh)
