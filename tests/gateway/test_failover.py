"""Tokens lost, doubled or out of order, workers that fail or leave, clients that go: over a real mesh."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
import pytest

from headrace.messages.control import Cancel
from headrace.messages.stream import Moved, TokenBatch, TokenEvent
from headrace.queue import DELIVERIES_PER_ATTEMPT, Delivery
from tests.gateway.conftest import MODEL, Gateway, OpenGateway
from tests.gateway.workers import TEXT, Workers, answer, keep_silent

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "stream": True}
PATH = "/v1/chat/completions"


async def _stream(gateway: Gateway, **fields: Any) -> list[Any]:
    async with gateway.http.post(gateway.url + PATH, json={**CHAT, **fields}) as response:
        assert response.status == 200
        lines = [line async for line in response.content if line.startswith(b"data: ")]
    assert lines[-1] == b"data: [DONE]\n"
    return [json.loads(line.removeprefix(b"data: ")) for line in lines[:-1]]


def _text(events: list[Any]) -> str:
    return "".join(choice["delta"].get("content") or "" for event in events for choice in event["choices"])


async def _first_attempt_then_answer(workers: Workers, delivery: Delivery, first: Any) -> None:
    """Do `first` with the first delivery and answer well later ones."""
    if delivery.entry.attempt == 0:
        await first(workers, delivery)
    else:
        await answer(workers, delivery)


def _script(first: Any) -> Any:
    async def script(workers: Workers, delivery: Delivery) -> None:
        await _first_attempt_then_answer(workers, delivery, first)

    return script


async def _go_on_elsewhere(workers: Workers, delivery: Delivery) -> None:
    """Begin at one decode worker, which leaves, and end at another."""
    ids, begin = workers.ids(), delivery.entry.generated
    if delivery.entry.attempt == 0:
        await workers.report(delivery, 0)
        await workers.tokens(delivery, 0, ids[:4])
        await workers.until_taken(delivery)
        await workers.leave("d0")
    else:
        await workers.report(delivery, 1)
        await workers.tokens(delivery, begin, ids[begin:], "length", decode=1)


async def test_a_decode_worker_that_leaves_is_a_pause_in_the_stream(open_gateway: OpenGateway) -> None:
    """Prompt and tokens so far are queued anew; no token twice, none missing."""
    async with open_gateway(decode=2) as gateway:
        gateway.workers.script = _go_on_elsewhere
        events = await _stream(gateway, stream_options={"include_usage": True})
        second = gateway.workers.client_deliveries()[1].entry
        ids = gateway.workers.ids()
    assert _text(events) == TEXT
    assert (second.attempt, second.generated, second.token_ids[-4:]) == (DELIVERIES_PER_ATTEMPT, 4, ids[:4])
    assert events[-1]["usage"]["prompt_tokens_details"]["recomputed_tokens"] > 0


@pytest.mark.parametrize(
    ("path", "fields", "delta"),
    [
        ("/v1/messages", {"messages": CHAT["messages"], "max_tokens": 100}, "content_block_delta"),
        ("/v1/responses", {"input": "Hi"}, "response.output_text.delta"),
    ],
)
async def test_it_is_one_in_the_streams_of_the_other_apis_too(
    open_gateway: OpenGateway, path: str, fields: dict[str, Any], delta: str
) -> None:
    """They are the same answers in other words."""
    async with open_gateway(decode=2) as gateway:
        gateway.workers.script = _go_on_elsewhere
        body = {"model": MODEL, "stream": True, **fields}
        async with gateway.http.post(gateway.url + path, json=body) as response:
            lines = [line async for line in response.content if line.startswith(b"data: ")]
    told = [json.loads(line.removeprefix(b"data: ")) for line in lines]
    deltas = [event["delta"] for event in told if event["type"] == delta]
    assert "".join(each if isinstance(each, str) else each["text"] for each in deltas) == TEXT


async def test_a_worker_that_leaves_after_its_request_has_moved_is_not_missed(open_gateway: OpenGateway) -> None:
    """Though nothing has come from the new worker yet: the gateway knows of the move before it says that it knows."""

    async def moves(workers: Workers, delivery: Delivery) -> None:
        ids, entry, leaving = workers.ids(), delivery.entry, workers.decode[0].mesh
        await workers.report(delivery, 0)
        await workers.tokens(delivery, 0, ids[:4])
        moved = Moved(request_id=entry.request_id, attempt=delivery.attempt, decode_worker="d1")
        await leaving.send(entry.gateway, moved)
        await workers.until_taken(delivery)
        await workers.leave("d0")
        await workers.tokens(delivery, 3, ids[3:], "length", decode=1)

    async with open_gateway(decode=2) as gateway:
        gateway.workers.script = moves
        events = await _stream(gateway, stream_options={"include_usage": True})
        assert len(gateway.workers.client_deliveries()) == 1
    assert _text(events) == TEXT
    assert "recomputed_tokens" not in events[-1]["usage"]["prompt_tokens_details"]


async def test_a_request_that_moved_to_a_worker_that_is_gone_is_tried_again(open_gateway: OpenGateway) -> None:
    """Nobody will send its tokens."""

    async def moves_away(workers: Workers, delivery: Delivery) -> None:
        moved = Moved(request_id=delivery.entry.request_id, attempt=delivery.attempt, decode_worker="d9")
        await workers.report(delivery, 0)
        await workers.decode[0].mesh.send(delivery.entry.gateway, moved)

    async with open_gateway(decode=1) as gateway:
        gateway.workers.script = _script(moves_away)
        assert _text(await _stream(gateway)) == TEXT
        assert len(gateway.workers.client_deliveries()) == 2


async def test_a_gap_is_filled_by_another_attempt(open_gateway: OpenGateway) -> None:
    """And the attempt that lost tokens is cancelled."""

    async def lossy(workers: Workers, delivery: Delivery) -> None:
        await workers.report(delivery)
        await workers.tokens(delivery, 0, workers.ids()[:2])
        await workers.tokens(delivery, 5, workers.ids()[5:6])

    async with open_gateway() as gateway:
        gateway.workers.script = _script(lossy)
        assert _text(await _stream(gateway)) == TEXT
        await gateway.workers.until(
            lambda: any(c.attempt == DELIVERIES_PER_ATTEMPT - 1 for c in gateway.workers.cancels)
        )


async def test_duplicates_and_overlaps_are_dropped(open_gateway: OpenGateway) -> None:
    """By position, whatever the grouping."""

    async def repeating(workers: Workers, delivery: Delivery) -> None:
        ids = workers.ids()
        await workers.report(delivery)
        for start, end in ((0, 3), (0, 3), (1, 5), (4, 5), (3, len(ids))):
            await workers.tokens(delivery, start, ids[start:end], "length" if end == len(ids) else None)

    async with open_gateway() as gateway:
        gateway.workers.script = repeating
        events = await _stream(gateway, stream_options={"include_usage": True})
        assert events[-1]["usage"]["completion_tokens"] == len(gateway.workers.ids())
    assert _text(events) == TEXT


async def test_a_redelivery_takes_over_and_the_older_attempt_is_stale(open_gateway: OpenGateway) -> None:
    """Tokens of the older attempt no longer count, and its worker is told to stop."""

    async def contested(workers: Workers, delivery: Delivery) -> None:
        ids = workers.ids()
        await workers.report(delivery)
        await workers.tokens(delivery, 0, ids[:3])
        await workers.tokens(delivery, 0, ids[:4], attempt=1)
        await workers.tokens(delivery, 4, [7, 7, 7], attempt=0)
        await workers.tokens(delivery, 4, ids[4:], "length", attempt=1)

    async with open_gateway() as gateway:
        gateway.workers.script = contested
        assert _text(await _stream(gateway)) == TEXT
        await gateway.workers.until(lambda: any(c.attempt == 0 for c in gateway.workers.cancels))
        assert len(gateway.workers.client_deliveries()) == 1


async def test_a_retryable_failure_is_tried_again(open_gateway: OpenGateway) -> None:
    """The client sees nothing of it."""

    async def overloaded(workers: Workers, delivery: Delivery) -> None:
        await workers.fail(delivery, "overloaded", retryable=True)

    async with open_gateway() as gateway:
        gateway.workers.script = _script(overloaded)
        assert _text(await _stream(gateway)) == TEXT


async def test_trying_again_has_an_end(open_gateway: OpenGateway) -> None:
    """After five requeues the client is told."""

    async def failing(workers: Workers, delivery: Delivery) -> None:
        await workers.fail(delivery, "worker_error", retryable=True)

    async with open_gateway() as gateway:
        gateway.workers.script = failing
        status, body = await gateway.post(PATH, CHAT)
        assert (status, body["error"]["code"]) == (500, "worker_error")
        assert [d.entry.attempt for d in gateway.workers.client_deliveries()] == [16 * n for n in range(6)]


@pytest.mark.parametrize(
    ("code", "status"), [("invalid_request", 400), ("overloaded", 503), ("deadline", 504), ("worker_error", 500)]
)
async def test_a_final_failure_before_the_first_token_is_an_http_error(
    open_gateway: OpenGateway, code: Any, status: int
) -> None:
    """Streamed or not."""

    async def failing(workers: Workers, delivery: Delivery) -> None:
        await workers.fail(delivery, code, retryable=False)

    async with open_gateway() as gateway:
        gateway.workers.script = failing
        for stream in (True, False):
            found, body = await gateway.post(PATH, {**CHAT, "stream": stream})
            assert (found, body["error"]["message"]) == (status, f"test: {code}")


async def test_a_failure_inside_a_stream_is_its_last_event(open_gateway: OpenGateway) -> None:
    """The status has been sent by then; [DONE] still comes."""

    async def failing(workers: Workers, delivery: Delivery) -> None:
        await workers.report(delivery)
        await workers.tokens(delivery, 0, workers.ids()[:2])
        await asyncio.sleep(0.05)
        await workers.fail(delivery, "worker_error", retryable=False)

    async with open_gateway() as gateway:
        gateway.workers.script = failing
        events = await _stream(gateway)
    assert events[-1]["error"]["code"] == "worker_error"


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_is_cancelled_in_both_tiers(open_gateway: OpenGateway, stream: bool) -> None:
    """And its entry leaves the queue."""
    async with open_gateway() as gateway:
        gateway.workers.script = keep_silent
        asking = asyncio.create_task(gateway.post(PATH, {**CHAT, "stream": stream}))
        await gateway.workers.until(lambda: bool(gateway.workers.client_deliveries()))
        asking.cancel()
        request_id = gateway.workers.client_deliveries()[0].entry.request_id
        await gateway.workers.until(lambda: [c.request_id for c in gateway.workers.cancels].count(request_id) == 2)
        assert await _eventually(lambda: gateway.node.queue.depth(), 0)


async def _eventually(ask: Callable[[], Awaitable[Any]], expected: Any) -> bool:
    """Ask until the answer is the expected one."""
    for _ in range(500):
        if await ask() == expected:
            return True
        await asyncio.sleep(0.01)
    return False


async def test_a_client_that_leaves_inside_a_stream_is_cancelled(open_gateway: OpenGateway) -> None:
    """With tokens already on their way."""

    async def endless(workers: Workers, delivery: Delivery) -> None:
        await workers.report(delivery)
        for position in range(400):
            if any(cancel.request_id == delivery.entry.request_id for cancel in workers.cancels):
                return
            await workers.tokens(delivery, position, workers.ids()[:1])
            await asyncio.sleep(0.01)

    async with open_gateway() as gateway:
        gateway.workers.script = endless
        async with gateway.http.post(gateway.url + PATH, json=CHAT) as response:
            await response.content.readuntil(b"\n\n")
            response.close()
        await gateway.workers.until(lambda: len(gateway.workers.cancels) >= 2)


async def test_tokens_that_nobody_waits_for_are_answered_with_a_cancellation(open_gateway: OpenGateway) -> None:
    """A worker that missed the first one, or answers for a gateway's earlier life."""
    async with open_gateway() as gateway:
        event = TokenEvent(request_id="gone.0", attempt=3, position=0, token_ids=[5])
        for _ in range(2):
            await gateway.workers.decode[0].mesh.send(gateway.node.id, TokenBatch(events=[event]))
        await gateway.workers.until(
            lambda: any(c.request_id == "gone.0" and c.attempt == 3 for c in gateway.workers.cancels)
        )


async def test_messages_that_break_the_schema_are_refused_and_counted(open_gateway: OpenGateway) -> None:
    """The gateway goes on."""
    async with open_gateway() as gateway:
        await gateway.workers.decode[0].mesh.send(gateway.node.id, Cancel(request_id="x", attempt=0))
        assert _text(await _stream(gateway)) == TEXT
        assert gateway.node.mesh.refused == 1


async def test_a_gateway_that_stops_ends_its_streams_with_an_error(open_gateway: OpenGateway) -> None:
    """Nobody is left hanging, and the workers are told."""
    async with aiohttp.ClientSession() as http:
        async with open_gateway() as gateway:
            gateway.workers.script = keep_silent
            asking = asyncio.create_task(_status(http, gateway.url))
            await gateway.workers.until(lambda: bool(gateway.workers.client_deliveries()))
        assert await asking == 503


async def _status(http: aiohttp.ClientSession, url: str) -> int:
    async with http.post(url + PATH, json={**CHAT, "stream": False}) as response:
        await response.read()
        return response.status
