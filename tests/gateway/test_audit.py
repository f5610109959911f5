"""Answers that have come to a halt: entries that Redis forgot, last tokens that were lost, a gateway given up."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from headrace.gateway import audit
from headrace.messages.control import Repeat
from headrace.messages.stream import TokenBatch, TokenEvent
from headrace.queue import DELIVERIES_PER_ATTEMPT, Delivery
from headrace.registry import Left
from headrace.wire import encode
from tests.gateway.conftest import MODEL, OpenGateway
from tests.gateway.workers import TEXT, Workers, answer, keep_silent

PATH = "/v1/chat/completions"
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOOK_SECONDS", "SECOND_LOOK_SECONDS", "TICK_SECONDS"):
        monkeypatch.setattr(audit, name, 0.05)


def _said(reply: tuple[int, Any]) -> Any:
    status, body = reply
    return body["choices"][0]["message"]["content"] if status == 200 else body


async def test_an_entry_that_redis_forgot_is_queued_again(open_gateway: OpenGateway) -> None:
    """Under the next attempt number, since a worker may have taken the first."""

    async def forgetful(workers: Workers, delivery: Delivery) -> None:
        if delivery.entry.attempt == 0:
            await workers.prefill.queue.remove(delivery.entry_id)
        else:
            await answer(workers, delivery)

    async with open_gateway() as gateway:
        gateway.workers.script = forgetful
        assert _said(await gateway.post(PATH, CHAT)) == TEXT
        assert [d.entry.attempt for d in gateway.workers.client_deliveries()] == [0, DELIVERIES_PER_ATTEMPT]


async def test_an_entry_that_waits_is_left_alone(open_gateway: OpenGateway) -> None:
    """However long."""
    async with open_gateway() as gateway:
        gateway.workers.script = keep_silent
        asking = asyncio.create_task(gateway.post(PATH, CHAT))
        await gateway.workers.until(lambda: bool(gateway.workers.client_deliveries()))
        await asyncio.sleep(0.5)
        (delivery,) = gateway.workers.client_deliveries()
        await answer(gateway.workers, delivery)
        assert _said(await asking) == TEXT


async def test_a_silent_worker_is_asked_to_repeat_the_tokens_that_are_missing(open_gateway: OpenGateway) -> None:
    """From the first that the gateway lacks on."""

    async def stops_short(workers: Workers, delivery: Delivery) -> None:
        await workers.report(delivery)
        await workers.tokens(delivery, 0, workers.ids()[:4])

    async with open_gateway() as gateway:
        gateway.workers.script = stops_short
        asking = asyncio.create_task(gateway.post(PATH, CHAT))
        await gateway.workers.until(lambda: any(isinstance(m, Repeat) for m in gateway.workers.cancels))
        repeat = next(m for m in gateway.workers.cancels if isinstance(m, Repeat))
        (delivery,) = gateway.workers.client_deliveries()
        assert repeat == Repeat(request_id=delivery.entry.request_id, attempt=0, position=4)
        event = TokenEvent(repeat.request_id, 0, 4, gateway.workers.ids()[4:], None, "length")
        await gateway.workers.decode[0].mesh.send(gateway.node.id, TokenBatch(events=[event]))
        assert _said(await asking) == TEXT


async def test_a_gateway_that_was_given_up_queues_everything_again(open_gateway: OpenGateway) -> None:
    """The workers have dropped what they held for it."""

    async def once(workers: Workers, delivery: Delivery) -> None:
        if delivery.entry.attempt:
            await answer(workers, delivery)

    async with open_gateway() as gateway:
        gateway.workers.script = once
        asking = asyncio.create_task(gateway.post(PATH, CHAT))
        await gateway.workers.until(lambda: bool(gateway.workers.client_deliveries()))
        registry = gateway.node.registry
        left = Left(id=registry.me.id, epoch=registry.me.epoch)
        await registry._store.bury(left.id, left.epoch, encode(left), only_if_silent=False)
        assert _said(await asking) == TEXT
