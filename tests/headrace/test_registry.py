"""Joins, leaves and lost leases as the others hear of them, on a real server."""

from __future__ import annotations

import asyncio
import os
import signal
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

import pytest

from headrace.loadtest.redis_servers import RedisServer, redis_server
from headrace.redis_client import Keys, connect
from headrace.registry import Registry
from headrace.tasks import end_task
from tests.members import member

LEASE = 0.5
LONG_LEASE = 60.0
"""What is seen within a test with this one came by push."""


@dataclass
class Watched:
    """A registry that runs, and what it told."""

    registry: Registry
    running: asyncio.Task[None]
    told: list[str] = field(default_factory=list)

    async def until(self, what: Callable[[], bool], seconds: float = 5.0) -> None:
        """Wait until what it told fulfils this."""
        async with asyncio.timeout(seconds):
            while not what():  # noqa: ASYNC110 - there is no event for "has not happened"
                await asyncio.sleep(0.005)

    async def fall_silent(self) -> None:
        """As a process does that is stopped."""
        await end_task(self.running)

    def go_on(self) -> None:
        """As it does when it is continued."""
        self.running = asyncio.create_task(self.registry.run())


@asynccontextmanager
async def watched(url: str, space: str, name: str, lease: float = LEASE) -> AsyncIterator[Watched]:
    """One process's registry."""
    client = connect(url, patient=False)
    me = member(name, epoch=time.time_ns(), address="tcp://127.0.0.1:1", version="1", model="m", model_fingerprint="f")
    registry = Registry(client, Keys(space), me, lease)
    await registry.join()
    watched = Watched(registry, asyncio.create_task(registry.run()))
    registry.on_join.append(lambda member: watched.told.append(f"+{member.id}"))
    registry.on_leave.append(lambda member: watched.told.append(f"-{member.id}"))
    registry.on_buried.append(lambda: watched.told.append("buried"))
    registry.on_outage.append(lambda: watched.told.append("outage"))
    try:
        yield watched
    finally:
        await end_task(watched.running)
        await client.aclose()


@pytest.fixture
def space() -> str:
    """A namespace of its own for each test."""
    return uuid.uuid4().hex


async def test_joins_figures_drains_and_leaves_are_heard_at_once(redis_url: str, space: str) -> None:
    """Long before anybody would look again."""
    async with watched(redis_url, space, "a", LONG_LEASE) as a, watched(redis_url, space, "b", LONG_LEASE) as b:
        await a.until(lambda: "b" in a.registry.members)
        await b.registry.leave()
        await a.until(lambda: a.told == ["+b", "-b"])


async def test_changes_of_a_member_are_heard_within_an_eighth_of_a_lease(redis_url: str, space: str) -> None:
    """Figures and that it drains, in one message."""
    async with watched(redis_url, space, "a") as a, watched(redis_url, space, "b") as b:
        await a.until(lambda: "b" in a.registry.members)
        b.registry.update_stats({"kv_pages_in_use": 7.0})
        b.registry.drain()
        await a.until(lambda: a.registry.members["b"].draining)
        assert a.registry.members["b"].stats == {"kv_pages_in_use": 7.0}


async def test_a_silent_member_is_buried_when_its_lease_ends_and_registers_anew(redis_url: str, space: str) -> None:
    """All hear of it; when it wakes it lets go of everybody and comes back as another peer."""
    async with AsyncExitStack() as stack:
        a, b, c = [await stack.enter_async_context(watched(redis_url, space, name)) for name in "abc"]
        await a.until(lambda: len(a.registry.members) == len(b.registry.members) == len(c.registry.members) == 2)
        epoch = c.registry.me.epoch
        await c.fall_silent()
        silent_at = time.monotonic()
        await a.until(lambda: "-c" in a.told and "-c" in b.told)
        assert LEASE / 2 < time.monotonic() - silent_at < 2 * LEASE
        c.told.clear()
        c.go_on()
        await c.until(lambda: c.told.count("+a") == c.told.count("+b") == 1)
        assert c.told[0] == "buried"
        assert sorted(c.told[1:3]) == ["-a", "-b"]
        assert c.registry.me.epoch > epoch
        await a.until(lambda: a.registry.members["c"].epoch == c.registry.me.epoch)
        assert a.told == ["+b", "+c", "-c", "+c"]


async def test_an_epoch_that_is_over_is_never_a_member_again(redis_url: str, space: str) -> None:
    """Even where Redis has forgotten that it is."""
    async with watched(redis_url, space, "a") as a, watched(redis_url, space, "b") as b:
        await a.until(lambda: "b" in a.registry.members)
        await b.fall_silent()
        await a.until(lambda: "-b" in a.told)
        await b.registry._store._client.delete(Keys(space).mark("b", b.registry.me.epoch))
        b.go_on()
        await b.until(lambda: "buried" in b.told)
        await a.until(lambda: a.told == ["+b", "-b", "+b"])


@pytest.fixture
async def server() -> AsyncIterator[RedisServer]:
    """One that may be hurt."""
    async with redis_server() as server:
        yield server


@pytest.mark.parametrize("pause", [0.45, 1.5])
async def test_nobody_leaves_while_redis_is_stopped(server: RedisServer, space: str, pause: float) -> None:
    """Its keys have expired when it goes on, and that proves nothing."""
    async with watched(server.url, space, "a") as a, watched(server.url, space, "b") as b:
        await a.until(lambda: len(a.registry.members) == len(b.registry.members) == 1)
        server.process.send_signal(signal.SIGSTOP)
        await asyncio.sleep(pause)
        os.kill(server.process.pid, signal.SIGCONT)
        await asyncio.sleep(2 * LEASE)
        assert (a.told.count("-b"), b.told.count("-a")) == (0, 0)
        assert list(a.registry.members) == ["b"]


async def test_an_emptied_server_costs_no_member_and_is_told_of(server: RedisServer, space: str) -> None:
    """Everybody registers again within one lease; who does not has left."""
    async with watched(server.url, space, "a") as a, watched(server.url, space, "b") as b:
        await a.until(lambda: len(a.registry.members) == len(b.registry.members) == 1)
        await server.kill()
        await server.start()
        await a.until(lambda: "outage" in a.told and "outage" in b.told)
        await asyncio.sleep(2 * LEASE)
        assert (a.told.count("-b"), b.told.count("-a")) == (0, 0)
        await b.fall_silent()
        await a.until(lambda: "-b" in a.told)


async def test_figures_that_change_often_are_published_twice_an_interval_at_most(redis_url: str, space: str) -> None:
    """However often they change."""
    async with watched(redis_url, space, "a") as a:
        heard = 0

        client = connect(redis_url)
        pubsub = client.pubsub()
        await pubsub.subscribe(Keys(space).news)
        started = time.monotonic()
        while time.monotonic() - started < 1.0:
            a.registry.update_stats({"x": time.monotonic()})
            message = await pubsub.get_message(timeout=0.01)
            heard += message is not None and message["type"] == "message"
        await pubsub.aclose()
        await client.aclose()
        assert heard <= 1.0 / (LEASE / 8) + 2
