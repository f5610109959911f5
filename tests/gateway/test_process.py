"""The gateway among others: without Redis, beside another mesh, as a process from start to stop."""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from headrace.gateway.main import serving
from headrace.node import join_mesh
from headrace.queue import Delivery
from headrace.redis_client import Keys, RedisError
from headrace.settings import SettingsError
from tests.gateway.conftest import IDENTITY, MODEL, OpenGateway, start_redis
from tests.gateway.workers import TEXT, Workers, answer, keep_silent

PATH = "/v1/chat/completions"
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}


async def test_streams_go_on_without_redis_and_new_requests_get_a_503(
    open_gateway: OpenGateway, tmp_path: Path
) -> None:
    """The restarted server is empty, and still nobody is declared dead."""
    socket = tmp_path / "redis.sock"
    server = start_redis(socket)
    begun, away, back = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def slow(workers: Workers, delivery: Delivery) -> None:
        ids = workers.ids()
        await workers.report(delivery)
        await workers.tokens(delivery, 0, ids[:4])
        begun.set()
        await away.wait()
        await workers.tokens(delivery, 4, ids[4:6])
        await back.wait()
        await workers.tokens(delivery, 6, ids[6:], "length")

    try:
        async with open_gateway(redis=f"unix://{socket}") as gateway:
            gateway.workers.script = slow
            running = asyncio.create_task(gateway.post(PATH, CHAT))
            await begun.wait()
            server.kill()
            server.wait()
            socket.unlink()
            async with gateway.http.post(gateway.url + PATH, json=CHAT) as response:
                assert response.status == 503
                assert int(response.headers["Retry-After"]) > 0
            away.set()
            server = start_redis(socket)
            while b"gateway" not in b"".join(await _members(gateway)):  # noqa: ASYNC110 - it registers by itself
                await asyncio.sleep(0.05)
            back.set()
            status, answer = await running
            assert (status, answer["choices"][0]["message"]["content"]) == (200, TEXT)
            assert "recomputed_tokens" not in answer["usage"]["prompt_tokens_details"]
    finally:
        server.kill()
        server.wait()


async def test_a_request_waits_while_redis_is_stopped(open_gateway: OpenGateway, tmp_path: Path) -> None:
    """For longer than leases last; the stream that runs and all workers stay."""
    socket = tmp_path / "redis.sock"
    server = start_redis(socket)
    begun, resumed = asyncio.Event(), asyncio.Event()

    async def slow(workers: Workers, delivery: Delivery) -> None:
        ids = workers.ids()
        await workers.report(delivery)
        await workers.tokens(delivery, 0, ids[:4])
        begun.set()
        await resumed.wait()
        await workers.tokens(delivery, 4, ids[4:], "length")

    try:
        async with open_gateway(redis=f"unix://{socket}", lease_seconds=0.8) as gateway:
            gateway.workers.script = slow
            running = asyncio.create_task(gateway.post(PATH, CHAT))
            await begun.wait()
            server.send_signal(signal.SIGSTOP)
            waiting = asyncio.create_task(gateway.post(PATH, CHAT))
            done, _ = await asyncio.wait([running, waiting], timeout=3 * gateway.settings.lease_seconds)
            assert not done
            server.send_signal(signal.SIGCONT)
            resumed.set()
            for status, answer in await asyncio.gather(running, waiting):
                assert (status, answer["choices"][0]["message"]["content"]) == (200, TEXT)
                assert "recomputed_tokens" not in answer["usage"]["prompt_tokens_details"]
    finally:
        server.kill()
        server.wait()


async def _members(gateway: Any) -> list[bytes]:
    client = gateway.node.queue._client
    try:
        return list(await client.smembers(Keys(gateway.settings.namespace).members))
    except RedisError:
        return []


async def test_the_gateway_process_serves_before_workers_exist_and_exits_cleanly(redis_url: str) -> None:
    """From the command line to SIGTERM."""
    command = [
        sys.executable,
        "-m",
        "headrace",
        "gateway",
        "--redis",
        redis_url,
        "--port",
        "0",
        "--namespace",
        "process",
    ]
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(30):
            while b"the gateway serves" not in (line := await process.stdout.readline()):
                assert line, "it ended"
        url = line.decode().split(" on ")[1].strip().removesuffix("/v1")
        async with aiohttp.ClientSession() as http, http.get(f"{url}/ready") as response:
            assert response.status == 503
            assert "prefill" in (await response.json())["reason"]
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(10):
            assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def test_a_port_that_is_taken_is_named(open_gateway: OpenGateway) -> None:
    """Instead of a traceback."""
    async with open_gateway(prefill=False, decode=0) as gateway:
        port = int(gateway.url.rpartition(":")[2])
        with pytest.raises(SettingsError, match=f"--port {port}"):
            async with open_gateway(prefill=False, decode=0, port=port):
                pass


async def test_a_namespace_of_its_own_keeps_meshes_apart(open_gateway: OpenGateway) -> None:
    """Two gateways on one Redis with their own workers don't see each other's."""
    async with open_gateway() as first, open_gateway() as second:
        first.workers.text, second.workers.text = "One.", "Two."
        answers = await asyncio.gather(first.post(PATH, CHAT), second.post(PATH, CHAT))
    assert [answer["choices"][0]["message"]["content"] for _, answer in answers] == ["One.", "Two."]


async def test_gateways_share_a_port_and_each_answers_its_own_requests(open_gateway: OpenGateway) -> None:
    """Connections are spread by the kernel; both gateways get some."""
    async with (
        open_gateway(reuse_port=True) as gateway,
        join_mesh(gateway.settings, "gateway", IDENTITY) as node,
    ):
        settings = gateway.settings.model_copy(update={"port": int(gateway.url.rpartition(":")[2])})
        async with serving(settings, MODEL, gateway.workers.tokenizer, node) as url:
            assert url == gateway.url
            await gateway.workers.until_seen_by(node, 3)
            while len({delivery.entry.gateway for delivery in gateway.workers.client_deliveries()}) < 2:
                async with aiohttp.ClientSession() as http, http.post(url + PATH, json=CHAT) as response:
                    assert (await response.json())["choices"][0]["message"]["content"] == TEXT


async def test_what_was_accepted_waits_out_an_outage_of_redis(open_gateway: OpenGateway, tmp_path: Path) -> None:
    """It waits in the gateway until the server, which comes back empty, can take it."""
    socket = tmp_path / "redis.sock"
    server = start_redis(socket)
    body = {"model": MODEL, "prompt": [5] * 200, "max_tokens": 100}
    try:
        async with open_gateway(redis=f"unix://{socket}") as gateway:
            gateway.workers.script = keep_silent
            running = [asyncio.create_task(gateway.post("/v1/completions", body)) for _ in range(10)]
            while True:
                queued = gateway.node.registry.me.stats
                if queued.get("requests_queued", 0) + len(gateway.workers.client_deliveries()) == 10:
                    break
                await asyncio.sleep(0.01)
            assert queued["requests_queued"] >= 3
            server.kill()
            server.wait()
            socket.unlink()
            gateway.workers.script = answer
            for delivery in gateway.workers.client_deliveries():
                await gateway.workers.tokens(delivery, 0, gateway.workers.ids(), "length")
            server = start_redis(socket)
            answers = await asyncio.gather(*running)
    finally:
        server.kill()
        server.wait()
    assert [(status, body["choices"][0]["text"]) for status, body in answers] == [(200, TEXT)] * 10
