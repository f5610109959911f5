"""Two prefill workers and conversations: the second turn is computed where the first one was."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import pytest

from headrace.gateway import audit
from headrace.loadtest.client import StreamClient
from headrace.loadtest.prompts import unique_tokens
from headrace.prefill.steering import Steering
from headrace.prefill.worker import PrefillWorker
from tests.e2e import tiny_mesh as tiny
from tests.e2e.tiny_mesh import MODEL, TinyMesh, tiny_mesh

CONVERSATIONS, TURNS = 11, 4
FIRST, MORE = 32, 16
"""Prompt tokens of a first turn, and how many each further one adds; 16 are a page."""


def turns(number: int) -> list[list[int]]:
    """The prompts of a conversation; each begins with the one before."""
    prompt = unique_tokens(FIRST + MORE * (TURNS - 1), number)
    return [prompt[: FIRST + MORE * turn] for turn in range(TURNS)]


async def converse(mesh: TinyMesh, numbers: range) -> list[str]:
    """Conversations at once; the texts of all of their turns."""

    async def one(client: StreamClient, number: int) -> list[str]:
        return [(await client.complete(turn, 4)).text for turn in turns(number)]

    async with StreamClient(mesh.url, MODEL) as client:
        return [text for texts in await asyncio.gather(*[one(client, number) for number in numbers]) for text in texts]


async def converse_in_turns(mesh: TinyMesh, numbers: range) -> None:
    """One request at a time, so that nobody is ever busy: the first turns of all, the second ones, and so on."""
    async with StreamClient(mesh.url, MODEL) as client:
        for turn in range(TURNS):
            for number in numbers:
                await client.complete(turns(number)[turn], 4)


def prefills(mesh: TinyMesh) -> list[PrefillWorker]:
    """The mesh's prefill workers."""
    return [worker for worker in mesh.workers.values() if isinstance(worker, PrefillWorker)]


def hits(mesh: TinyMesh) -> float:
    """Prompt tokens found in the prefix caches."""
    return sum(worker._node.registry.me.stats["prefix_cache_hits_total"] for worker in prefills(mesh))


async def test_turns_of_a_conversation_follow_their_prefix(redis_url: str, tmp_path: Path) -> None:
    """All of the turn before is found; unsteered, what chance leaves."""
    async with tiny_mesh(redis_url, tmp_path, prefill_pages=[400, 400], decode_pages=[400]) as mesh:
        await converse_in_turns(mesh, range(CONVERSATIONS))
        steered = hits(mesh)
        assert sum(worker._steering.steered for worker in prefills(mesh)) > 0
        with mock.patch.object(Steering, "better", return_value=None):
            await converse_in_turns(mesh, range(100, 100 + CONVERSATIONS))
        unsteered = hits(mesh) - steered
        texts = await converse(mesh, range(CONVERSATIONS))
        assert await converse(mesh, range(CONVERSATIONS)) == texts
    most = CONVERSATIONS * sum(FIRST + MORE * turn for turn in range(TURNS - 1))
    assert steered >= 0.9 * most
    assert unsteered < 0.75 * steered


async def test_a_worker_that_never_hears_of_what_it_was_passed_loses_nothing(
    redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that dies at that moment: the entry is claimed from it, and answered as it would have been."""
    monkeypatch.setattr(tiny, "LEASE_SECONDS", 1.0)
    async with tiny_mesh(redis_url, tmp_path, prefill_pages=[400, 400], decode_pages=[400]) as mesh:
        texts = await converse(mesh, range(4))
        with mock.patch.object(PrefillWorker, "_take_passed") as lost:
            assert await converse(mesh, range(4)) == texts
            assert lost.called
        assert sum(worker._service.recomputed for worker in prefills(mesh)) == lost.call_count


async def test_what_there_is_no_room_for_goes_back_to_the_queue(redis_url: str, tmp_path: Path) -> None:
    """Untouched, and is passed on to nobody again."""
    async with tiny_mesh(redis_url, tmp_path, prefill_pages=[400, 400], decode_pages=[400]) as mesh:
        texts = await converse(mesh, range(4))
        with ExitStack() as full:
            for worker in prefills(mesh):
                full.enter_context(mock.patch.object(worker._room_for_passed, "locked", return_value=True))
            assert await converse(mesh, range(4)) == texts
        assert sum(worker._steering.steered for worker in prefills(mesh)) > 0
        assert sum(worker._service.recomputed for worker in prefills(mesh)) == 0


async def test_an_emptied_redis_and_a_worker_that_stops_change_no_text(
    redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Entries that were passed on are given back like others, and a new worker holds nothing of the old one's."""
    for name in ("LOOK_SECONDS", "SECOND_LOOK_SECONDS", "TICK_SECONDS"):
        monkeypatch.setattr(audit, name, 0.3)
    async with tiny_mesh(redis_url, tmp_path, prefill_pages=[400, 400], decode_pages=[400]) as mesh:
        texts = await converse(mesh, range(CONVERSATIONS))
        asking = asyncio.create_task(converse(mesh, range(CONVERSATIONS)))
        queue = prefills(mesh)[0]._node.queue
        await queue._client.delete(queue._stream)
        await mesh.stop("prefill-0")
        assert await asking == texts
        assert await converse(mesh, range(CONVERSATIONS)) == texts
