"""A retry with the same `Idempotency-Key` is answered, and computed once."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from headrace.gateway import idempotency
from headrace.gateway.main import serving
from headrace.node import join_mesh
from headrace.queue import Delivery
from tests.gateway.conftest import IDENTITY, MODEL, Gateway, OpenGateway
from tests.gateway.workers import TEXT, Workers, answer, keep_silent

PATH = "/v1/chat/completions"
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}
KEY = {"Idempotency-Key": "one"}


async def _ask(gateway: Gateway, url: str | None = None, body: Any = CHAT, key: Any = KEY) -> tuple[int, Any]:
    async with gateway.http.post((url or gateway.url) + PATH, json=body, headers=key) as response:
        return response.status, await response.json()


async def test_a_retry_gets_the_finished_answer(open_gateway: OpenGateway) -> None:
    """Word for word; another key is another request, and another body under this key an error."""
    async with open_gateway() as gateway:
        first, again = await _ask(gateway), await _ask(gateway)
        assert len(gateway.workers.client_deliveries()) == 1
        other = await _ask(gateway, key={"Idempotency-Key": "two"})
        reused = await _ask(gateway, body={**CHAT, "n": 2})
        bad = await _ask(gateway, key={"Idempotency-Key": "two words"})
    assert first == again
    assert first[1]["choices"][0]["message"]["content"] == TEXT
    assert other[1]["id"] != first[1]["id"]
    assert (reused[0], reused[1]["error"]["code"]) == (422, "idempotency_key_reused")
    assert (bad[0], bad[1]["error"]["param"]) == (400, "Idempotency-Key")


async def test_the_answer_is_made_though_its_client_has_gone(open_gateway: OpenGateway) -> None:
    """Which is when clients try again, at this gateway or at another."""
    go_on = asyncio.Event()

    async def slow(workers: Workers, delivery: Delivery) -> None:
        await go_on.wait()
        await answer(workers, delivery)

    async with (
        open_gateway() as gateway,
        join_mesh(gateway.settings, "gateway", IDENTITY) as node,
        serving(gateway.settings, MODEL, gateway.workers.tokenizer, node) as other_url,
    ):
        await gateway.workers.until_seen_by(node, 3)
        gateway.workers.script = slow
        first = asyncio.create_task(_ask(gateway))
        await gateway.workers.until(lambda: len(gateway.workers.client_deliveries()) == 1)
        first.cancel()
        retries = [asyncio.create_task(_ask(gateway, url)) for url in (gateway.url, other_url)]
        await asyncio.wait(retries, timeout=0.5)
        go_on.set()
        answers = [await retry for retry in retries]
        assert len(gateway.workers.client_deliveries()) == 1
        assert not gateway.workers.cancels
    assert answers[0] == answers[1]
    assert answers[0][0] == 200


async def test_a_failure_is_not_kept(open_gateway: OpenGateway) -> None:
    """The retry has a chance of its own."""

    async def fail(workers: Workers, delivery: Delivery) -> None:
        await workers.fail(delivery, "worker_error", retryable=False)

    async with open_gateway() as gateway:
        gateway.workers.script = fail
        assert (await _ask(gateway))[0] == 500
        gateway.workers.script = answer
        assert (await _ask(gateway))[0] == 200


async def test_what_a_dead_gateway_had_begun_is_begun_anew(open_gateway: OpenGateway) -> None:
    """A claim counts as long as its owner is in the mesh."""
    async with open_gateway() as gateway:
        async with (
            join_mesh(gateway.settings, "gateway", IDENTITY) as node,
            serving(gateway.settings, MODEL, gateway.workers.tokenizer, node) as url,
        ):
            await gateway.workers.until_seen_by(node, 3)
            await node.registry.refresh()
            gateway.workers.script = keep_silent
            first = asyncio.create_task(_ask(gateway, url))
            await gateway.workers.until(lambda: len(gateway.workers.client_deliveries()) == 1)
            name = await _only_claim(gateway)
            claim = await node.redis.get(name)
        await asyncio.gather(first, return_exceptions=True)
        await gateway.node.redis.set(name, claim)  # as if that gateway had been killed
        await gateway.node.registry.refresh()
        gateway.workers.script = answer
        assert (await _ask(gateway))[0] == 200


async def _only_claim(gateway: Gateway) -> bytes:
    (name,) = [key async for key in gateway.node.redis.scan_iter(gateway.node.keys.outcome("*"))]
    return bytes(name)


async def test_a_stream_with_a_key_runs_once_at_a_time(open_gateway: OpenGateway) -> None:
    """Then it may be asked for again."""
    body = {**CHAT, "stream": True}
    async with open_gateway() as gateway:
        gateway.workers.script = keep_silent
        first = asyncio.create_task(_ask(gateway, body=body))
        await gateway.workers.until(lambda: len(gateway.workers.client_deliveries()) == 1)
        status, refused = await _ask(gateway, body=body)
        assert (status, refused["error"]["code"]) == (409, "idempotency_conflict")
        first.cancel()
        await gateway.workers.until(lambda: len(gateway.workers.cancels) >= 2)
        gateway.workers.script = answer
        async with asyncio.timeout(10):
            while True:
                async with gateway.http.post(gateway.url + PATH, json=body, headers=KEY) as response:
                    if response.status == 200:
                        assert b"[DONE]" in await response.read()
                        break


async def test_a_large_answer_is_computed_again(open_gateway: OpenGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """Redis is no place for it."""
    monkeypatch.setattr(idempotency, "MAX_KEPT_BYTES", 10)
    async with open_gateway() as gateway:
        assert (await _ask(gateway))[0] == (await _ask(gateway))[0] == 200
        assert len(gateway.workers.client_deliveries()) == 2
