"""The proxy's faults, each on a real connection."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import pytest

from headrace.loadtest.fault_proxy import FaultProxy
from headrace.loadtest.loopback import free_port

ELSEWHERE = "127.0.0.2"


@pytest.fixture
async def proxy() -> AsyncIterator[FaultProxy]:
    """In front of a server that repeats what it hears."""

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(100):
                writer.write(data)
        except ConnectionError:
            pass
        finally:
            writer.close()

    port = free_port()
    async with await asyncio.start_server(echo, "127.0.0.1", port), FaultProxy(ELSEWHERE, port, "127.0.0.1") as proxy:
        yield proxy


class Line:
    """A connection through the proxy."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def to(cls, proxy: FaultProxy) -> Line:
        """Open one."""
        return cls(*await asyncio.open_connection(*proxy.address))

    async def echo(self, seconds: float = 5.0) -> bytes:
        """Send and receive. Raises `TimeoutError`; returns nothing where the connection was broken."""
        self.writer.write(b"hello")
        try:
            return await asyncio.wait_for(self.reader.read(100), seconds)
        except ConnectionError:
            return b""


async def test_a_dropped_connection_ends_and_a_new_one_works(proxy: FaultProxy) -> None:
    """As after a reset."""
    line = await Line.to(proxy)
    assert await line.echo() == b"hello"
    proxy.drop()
    assert await line.echo() == b""
    line.writer.close()
    line = await Line.to(proxy)
    assert await line.echo() == b"hello"
    line.writer.close()


async def test_delayed_bytes_arrive_later(proxy: FaultProxy) -> None:
    """Both ways."""
    line = await Line.to(proxy)
    proxy.delay_seconds = 0.05
    started = time.monotonic()
    assert await line.echo() == b"hello"
    assert time.monotonic() - started >= 0.1
    line.writer.close()


async def test_nothing_passes_a_partition_and_all_of_it_arrives_afterwards(proxy: FaultProxy) -> None:
    """On old connections and new ones."""
    old = await Line.to(proxy)
    assert await old.echo() == b"hello"
    proxy.part()
    new = await Line.to(proxy)
    for line in (old, new):
        with pytest.raises(TimeoutError):
            await line.echo(0.05)
    proxy.heal()
    for line in (old, new):
        assert await asyncio.wait_for(line.reader.readexactly(5), 5) == b"hello"
        line.writer.close()


async def test_a_forgotten_connection_is_silent_for_ever_and_a_new_one_works(proxy: FaultProxy) -> None:
    """Neither end hears of it."""
    old = await Line.to(proxy)
    assert await old.echo() == b"hello"
    proxy.forget()
    with pytest.raises(TimeoutError):
        await old.echo(0.1)
    new = await Line.to(proxy)
    assert await new.echo() == b"hello"
    for line in (old, new):
        line.writer.close()
