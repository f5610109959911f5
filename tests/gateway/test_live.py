"""What `/live` tells, and whom: snapshots of the mesh and time lines, over real sockets."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp

from headrace.gateway import live
from headrace.gateway.timeline import Timeline
from headrace.messages.stream import PrefillReport
from headrace.queue import Delivery
from tests.gateway.conftest import MODEL, Gateway, OpenGateway
from tests.gateway.workers import Workers

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}
PATIENCE = 10.0


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[tuple[str, Any]]:
    name = ""
    async for line in response.content:
        if line.startswith(b"event: "):
            name = line[7:].decode().strip()
        elif line.startswith(b"data: "):
            yield name, json.loads(line[6:])


async def _until(response: aiohttp.ClientResponse, wanted: str, condition: Any) -> Any:
    """The first event of a name that fulfils a condition."""
    async with asyncio.timeout(PATIENCE):
        async for name, data in _events(response):
            if name == wanted and condition(data):
                return data
    raise AssertionError("the stream ended")


def _watch(gateway: Gateway, **options: Any) -> Any:
    return gateway.http.get(gateway.url + "/live", **options)


async def test_a_viewer_sees_the_mesh_and_who_leaves_it(open_gateway: OpenGateway) -> None:
    """At once what is there, then changes; a worker that did not say goodbye has died."""
    async with open_gateway(decode=2) as gateway, _watch(gateway) as response:
        first = await _until(response, "mesh", lambda mesh: True)
        assert first["model"] == MODEL
        assert [(worker["id"], worker["tier"]) for worker in first["workers"]] == [
            ("p0", "prefill"),
            ("d0", "decode"),
            ("d1", "decode"),
        ]
        gateway.workers.decode[0].registry.update_stats(
            {"kv_pages_in_use": 3, "kv_pages_total": 8, "requests_running": 2}
        )
        full = await _until(response, "mesh", lambda mesh: mesh["workers"][1]["pages_in_use"] == 3)
        assert (full["workers"][1]["pages_total"], full["workers"][1]["running"]) == (8, 2)
        await gateway.workers.leave("d1")
        after = await _until(response, "mesh", lambda mesh: mesh["departed"])
    assert [(gone["id"], gone["died"]) for gone in after["departed"]] == [("d1", True)]
    assert [worker["id"] for worker in after["workers"]] == ["p0", "d0"]


async def test_nothing_is_sent_while_nothing_changes(open_gateway: OpenGateway) -> None:
    """A viewer of a mesh at rest hears nothing between two signs of life."""
    async with open_gateway() as gateway, _watch(gateway) as response:
        told: dict[str, Any] = {}
        async with asyncio.timeout(PATIENCE):
            async for name, data in _events(response):
                told[name] = data
                if len(told) == 2 and told["mesh"]["not_ready"] is None and told["mesh"]["queued"] == 0:
                    break
        assert await response.content.readline() == b"\n"
        try:
            async with asyncio.timeout(4 * live.INTERVAL_SECONDS):
                heard = await response.content.readline()
        except TimeoutError:
            heard = b""
    assert heard == b""


async def test_a_request_that_moves_has_a_time_line_of_two_attempts(open_gateway: OpenGateway) -> None:
    """Each with its workers and times; the first one says why it ended. Steps of several tokens count as drafts."""

    async def moving(workers: Workers, delivery: Delivery) -> None:
        ids, begin = workers.ids(), delivery.entry.generated
        if delivery.entry.attempt == 0:
            await workers.report(delivery, 0, queue_ms=4.0)
            await workers.tokens(delivery, 0, ids[:1])
            await workers.tokens(delivery, 1, ids[1:4])
            await workers.until_taken(delivery)
            await workers.leave("d0")
        else:
            await workers.report(delivery, 1)
            await workers.tokens(delivery, begin, ids[begin:], "length", decode=1)

    async with open_gateway(decode=2) as gateway, _watch(gateway) as response:
        gateway.workers.script = moving
        _, answer = await gateway.post("/v1/chat/completions", CHAT)
        count = len(gateway.workers.ids())
        rows = await _until(response, "requests", lambda rows: rows and rows[-1]["outcome"] == "ok")
    row = rows[-1]
    first, second = row["attempts"]
    assert (row["id"], row["output_tokens"]) == (answer["id"], count)
    assert (first["prefill_worker"], first["decode_worker"], first["queue_ms"]) == ("p0", "d0", 4.0)
    assert (first["tokens"], first["accepted"], first["failure"]) == (4, 2, "d0 left the mesh")
    assert (second["decode_worker"], second["tokens"]) == ("d1", count - 4)
    assert 0 <= first["first_token"] <= first["failed"] <= second["begun"] <= second["last_token"] <= row["elapsed"]
    accepted = first["accepted"] + second["accepted"]
    assert answer["usage"]["completion_tokens_details"] == {"accepted_prediction_tokens": accepted}


async def test_a_late_viewer_gets_the_requests_of_before_and_no_more_than_are_kept(
    open_gateway: OpenGateway, monkeypatch: Any
) -> None:
    """The oldest are forgotten."""
    monkeypatch.setattr(live, "MAX_REQUESTS", 3)
    async with open_gateway() as gateway:
        ids = [(await gateway.post("/v1/chat/completions", CHAT))[1]["id"] for _ in range(5)]
        async with _watch(gateway) as response:
            rows = await _until(response, "requests", lambda rows: True)
    assert [row["id"] for row in rows] == ids[-3:]


async def test_no_change_is_lost_and_many_make_few_events(open_gateway: OpenGateway) -> None:
    """A viewer is told a few times a second, of all that changed meanwhile."""
    outcomes: dict[str, str] = {}
    told = 0
    async with open_gateway(lease_seconds=5.0) as gateway, _watch(gateway) as response:
        begun = asyncio.get_running_loop().time()
        posts = asyncio.gather(*[gateway.post("/v1/chat/completions", CHAT) for _ in range(16)])
        async with asyncio.timeout(PATIENCE):
            async for name, data in _events(response):
                told += 1
                if name == "requests":
                    outcomes |= {row["id"]: row["outcome"] for row in data}
                if len(outcomes) == 16 and set(outcomes.values()) == {"ok"}:
                    break
        seconds = asyncio.get_running_loop().time() - begun
        assert set(outcomes) == {answer["id"] for _, answer in await posts}
    assert told <= 2 * (seconds / live.INTERVAL_SECONDS + 2)


async def test_viewers_are_bounded_and_must_bring_the_key(open_gateway: OpenGateway, monkeypatch: Any) -> None:
    """The page itself is open, as it asks for the key; one viewer too many is told to come later."""
    monkeypatch.setattr(live, "MAX_VIEWERS", 1)
    key = {"Authorization": "Bearer secret"}
    async with open_gateway(api_key="secret") as gateway:
        async with _watch(gateway) as refused, gateway.http.get(gateway.url + "/") as page:
            assert (refused.status, page.status) == (401, 200)
            assert "default-src 'none'" in page.headers["Content-Security-Policy"]
        async with _watch(gateway, headers=key) as first:
            await _until(first, "mesh", lambda mesh: True)
            async with _watch(gateway, headers=key) as second:
                assert (second.status, (await second.json())["error"]["code"]) == (503, "too_many_viewers")
        for path in ("/page/nothing.js", "/page/..%2Flive.py", "/page/"):
            async with gateway.http.get(gateway.url + path, headers=key) as missing:
                assert missing.status == 404


async def test_a_gateway_that_stops_sends_its_viewers_away(open_gateway: OpenGateway) -> None:
    """So that it need not wait for them."""
    async with aiohttp.ClientSession() as http:
        async with open_gateway() as gateway:
            response = await http.get(gateway.url + "/live")
            await _until(response, "mesh", lambda mesh: True)
        async with asyncio.timeout(PATIENCE):
            assert [data async for name, data in _events(response) if name == "requests" and data] == []


def test_an_entry_that_another_worker_claims_is_the_same_attempt_until_something_came_of_it() -> None:
    """A claim before the prefill is over shows as a redelivery, one after it as an attempt of its own."""
    timeline = Timeline()
    timeline.follow(1)
    assert [attempt.redeliveries for attempt in timeline.attempts] == [1]
    report = PrefillReport(
        request_id="r", attempt=1, decode_worker="d0", queue_ms=1, prefill_ms=2, handoff_ms=3, cached_tokens=4
    )
    timeline.prefilled(report, "p0")
    timeline.tokens(3, "d0")
    timeline.follow(2)
    assert [attempt.redeliveries for attempt in timeline.attempts] == [1, 2]
    assert timeline.attempts[0].failure == "another prefill worker claimed it"
    assert (timeline.attempts[1].prefill_worker, timeline.accepted) == (None, 2)
