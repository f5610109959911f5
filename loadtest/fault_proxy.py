"""A TCP proxy that does to connections what networks do: breaks, delays, parts and forgets them."""

from __future__ import annotations

import asyncio
from typing import Self

from headrace.tasks import end_task

CHUNK_BYTES = 65536
QUEUED_CHUNKS = 1024
"""On their way in one direction of a connection; then its sender waits."""


class FaultProxy:
    """Listens on `host:port` and forwards to `target_host:port`."""

    def __init__(self, host: str, port: int, target_host: str) -> None:
        self.delay_seconds = 0.0
        self._open = asyncio.Event()
        """Cleared while nothing gets through."""
        self._open.set()
        self.address = (host, port)
        self._target = (target_host, port)
        self._connections: set[_Connection] = set()
        self._serving: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, *self.address)
        return self

    async def __aexit__(self, *failure: object) -> None:
        assert self._server is not None
        self._server.close()
        for task in list(self._serving):
            await end_task(task)
        await self._server.wait_closed()

    def drop(self) -> None:
        """Break all connections; what was on its way is lost."""
        for connection in self._connections:
            connection.abort()

    def forget(self) -> None:
        """Leave all connections half open: neither end hears anything of the other again. New ones work."""
        for connection in self._connections:
            connection.is_forgotten.set()

    def part(self) -> None:
        """Let nothing through, on old and new connections, until `heal`."""
        self._open.clear()

    def heal(self) -> None:
        """Undo `part`."""
        self._open.set()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = _Connection(writer)
        self._connections.add(connection)
        task = asyncio.current_task()
        assert task is not None
        self._serving.add(task)
        try:
            await self._open.wait()
            there_reader, there_writer = await asyncio.open_connection(*self._target)
            connection.writers.append(there_writer)
            pipes = [self._pipe(connection, reader, there_writer), self._pipe(connection, there_reader, writer)]
            async with asyncio.TaskGroup() as group:  # whichever ends takes the other with it
                for pipe in pipes:
                    group.create_task(pipe)
        except* (OSError, asyncio.CancelledError):  # asyncio.Server would report a task that was cancelled
            pass
        finally:
            connection.abort()
            self._connections.discard(connection)
            self._serving.discard(task)

    async def _pipe(self, connection: _Connection, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        loop = asyncio.get_running_loop()
        chunks: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(QUEUED_CHUNKS)

        async def deliver() -> None:
            while True:
                due, data = await chunks.get()
                await asyncio.sleep(max(due - loop.time(), 0))
                await self._open.wait()
                if connection.is_forgotten.is_set():
                    continue
                if not data:
                    raise ConnectionError("closed")
                writer.write(data)
                await writer.drain()

        delivering = asyncio.create_task(deliver())
        try:
            while not delivering.done():
                data = await reader.read(CHUNK_BYTES)
                await chunks.put((loop.time() + self.delay_seconds, data))
                if not data:
                    break
            await delivering
        finally:
            delivering.cancel()
            await asyncio.wait([delivering])


class _Connection:
    """Both ends of one connection."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self.writers = [writer]
        self.is_forgotten = asyncio.Event()

    def abort(self) -> None:
        for writer in self.writers:
            writer.transport.abort()
