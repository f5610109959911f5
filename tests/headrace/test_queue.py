"""The request queue on a real server."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator

import pytest

from headrace.messages.request import QueueEntry, SamplingParams
from headrace.queue import DELIVERIES_PER_ATTEMPT, RequestQueue
from headrace.redis_client import Keys, connect


def entry(name: str, attempt: int = 0) -> QueueEntry:
    """A small request."""
    return QueueEntry(
        request_id=name,
        attempt=attempt,
        gateway="g",
        token_ids=[1, 2],
        sampling=SamplingParams(max_tokens=1),
        enqueued_at=0.0,
        deadline=1e12,
    )


@pytest.fixture
async def queue(redis_url: str) -> AsyncIterator[RequestQueue]:
    """A queue of its own for each test."""
    client = connect(redis_url)
    queue = RequestQueue(client, Keys(uuid.uuid4().hex))
    await queue.create()
    yield queue
    await client.aclose()


async def test_entries_come_in_order_and_once(queue: RequestQueue) -> None:
    """Each worker gets the next one."""
    for name in ("a", "b"):
        await queue.put(entry(name))
    (first,) = await queue.take("w1", 1, 100)
    (second,) = await queue.take("w2", 1, 100)
    assert (first.entry, second.entry) == (entry("a"), entry("b"))
    assert await queue.take("w1", 1, 1) == []


async def test_a_claimed_entry_has_the_next_attempt_number(queue: RequestQueue) -> None:
    """So that whatever the silent worker still sends is stale."""
    await queue.put(entry("a", attempt=DELIVERIES_PER_ATTEMPT))
    (taken,) = await queue.take("w1", 1, 100)
    (claimed,) = await queue.claim("w2", 1, 0)
    assert (taken.attempt, claimed.attempt) == (DELIVERIES_PER_ATTEMPT, DELIVERIES_PER_ATTEMPT + 1)
    assert not claimed.exhausted


async def test_an_entry_that_was_given_back_can_be_claimed_at_once(queue: RequestQueue) -> None:
    """With the same attempt number where nothing has been done for it; by nobody else's doing."""
    for is_untouched, attempt in ((True, 0), (False, 1)):
        await queue.put(entry("a"))
        (taken,) = await queue.take("w1", 1, 100)
        await queue.give_back("w2", taken, is_untouched)
        assert await queue.claim("w2", 1, 60_000) == []
        await queue.give_back("w1", taken, is_untouched)
        (claimed,) = await queue.claim("w2", 1, 60_000)
        assert (claimed.entry_id, claimed.attempt) == (taken.entry_id, attempt)
        await queue.remove(claimed.entry_id)
        await queue.give_back("w2", claimed, is_untouched)
        assert await queue.claim("w1", 1, 0) == []


async def test_an_entry_is_given_up_after_its_last_delivery(queue: RequestQueue) -> None:
    """A request that kills its workers does not go on for ever."""
    await queue.put(entry("a"))
    await queue.take("w", 1, 100)
    for _ in range(DELIVERIES_PER_ATTEMPT - 1):
        (claimed,) = await queue.claim("w", 1, 0)
    assert claimed.exhausted
    assert claimed.attempt == DELIVERIES_PER_ATTEMPT - 1


async def test_a_renewed_entry_cannot_be_claimed(queue: RequestQueue) -> None:
    """Its idle time starts again."""
    await queue.put(entry("a"))
    (taken,) = await queue.take("w1", 1, 100)
    await queue.renew("w1", [taken.entry_id])
    assert await queue.claim("w2", 1, 60_000) == []


async def test_a_removed_entry_is_gone_whoever_holds_it(queue: RequestQueue) -> None:
    """Cancelled before or after it was taken."""
    waiting, held = [await queue.put(entry(name)) for name in ("a", "b")]
    await queue.remove(waiting)
    (taken,) = await queue.take("w", 1, 100)
    assert taken.entry_id == held
    await queue.remove(held)
    assert await queue.claim("w2", 1, 0) == []
    assert await queue.depth() == 0


async def test_an_entry_that_was_passed_on_is_the_others_with_the_same_attempt_number(queue: RequestQueue) -> None:
    """Only its holder can pass it on; it is claimed from the other as if that one had taken it, should it be dead."""
    await queue.put(entry("a"))
    (taken,) = await queue.take("w1", 1, 100)
    assert taken.is_new
    assert not await queue.pass_on("w2", taken, "w3")
    assert await queue.pass_on("w1", taken, "dead")
    assert not await queue.pass_on("w1", taken, "w3")
    assert await queue.claim_from("w1", "w2", 0) is None
    claimed = await queue.claim_from("dead", "w2", 0)
    assert claimed is not None
    assert (claimed.attempt, claimed.is_new) == (taken.attempt + 1, False)


async def test_a_cancelled_entry_is_not_passed_on(queue: RequestQueue) -> None:
    """Nor one that the server forgot: whoever took it goes on with it."""
    entry_id = await queue.put(entry("a"))
    (taken,) = await queue.take("w1", 1, 100)
    await queue.remove(entry_id)
    assert not await queue.pass_on("w1", taken, "w2")
