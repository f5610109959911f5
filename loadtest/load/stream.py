"""A client that costs little: stamps each piece of a body as it comes and reads nothing of it before the end."""

from __future__ import annotations

import asyncio
import ssl
import time
from dataclasses import dataclass, field
from typing import cast

import httptools

CONNECT_SECONDS = 30.0
MAX_IDLE = 4096
"""Connections kept for later requests."""


class StreamFailed(Exception):
    """A request got no whole answer; the message says why, in words that are the same for all of its kind."""


@dataclass
class Response:
    """A whole HTTP response. `pieces` are (`time.perf_counter`, bytes)."""

    status: int = 0
    pieces: list[tuple[float, bytes]] = field(default_factory=list)


class _Connection(asyncio.Protocol):
    """One connection, with one request at a time. `on_*` are called by the parser."""

    def __init__(self, pool: ConnectionPool) -> None:
        self.is_new = True
        self._pool = pool
        self._transport: asyncio.Transport | None = None
        self._answer: asyncio.Future[Response] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are no subclasses

    async def ask(self, request: bytes) -> Response:
        """Send a request and wait for all of its response. Raises `StreamFailed` and `ConnectionResetError`."""
        assert self._transport is not None
        if self._transport.is_closing():
            raise ConnectionResetError
        self._response = Response()
        self._parser = httptools.HttpResponseParser(self)
        self._ends_with_connection = True
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        try:
            return await self._answer
        except asyncio.CancelledError:
            self._transport.abort()
            raise

    def data_received(self, data: bytes) -> None:
        self._now = time.perf_counter()
        if self._answer is None or self._answer.done():
            self.close()  # nobody asked
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(StreamFailed(f"not HTTP: {error}"))
            self.close()

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() in (b"content-length", b"transfer-encoding"):
            self._ends_with_connection = False

    def on_headers_complete(self) -> None:
        self._response.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        self._response.pieces.append((self._now, body))
        self._pool.pieces += 1

    def on_message_complete(self) -> None:
        assert self._answer is not None
        self.is_new = False
        if self._parser.should_keep_alive():
            self._pool.give_back(self)
        else:
            self.close()
        if not self._answer.done():
            self._answer.set_result(self._response)

    def connection_lost(self, error: Exception | None) -> None:
        self._pool.forget(self)
        if self._answer is None or self._answer.done():
            return
        if not self._response.status:
            self._fail(ConnectionResetError())
        elif self._ends_with_connection and error is None:
            self._answer.set_result(self._response)
        else:
            self._fail(StreamFailed("the connection broke in mid-stream"))

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def _fail(self, error: Exception) -> None:
        assert self._answer is not None
        if not self._answer.done():
            self._answer.set_exception(error)


class ConnectionPool:
    """Connections to one server, as many as there are requests at once."""

    def __init__(self, host: str, port: int, tls: bool) -> None:
        self.pieces = 0
        """Pieces of bodies that came so far."""
        self._address = (host, port)
        self._tls = ssl.create_default_context() if tls else None
        self._idle: list[_Connection] = []

    async def ask(self, request: bytes) -> Response:
        """Send one request, again where an idle connection turns out to be closed. Raises `StreamFailed`."""
        while self._idle:
            try:
                return await self._idle.pop().ask(request)
            except ConnectionResetError:
                continue
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                loop = asyncio.get_running_loop()
                _, connection = await loop.create_connection(lambda: _Connection(self), *self._address, ssl=self._tls)
        except TimeoutError as error:
            raise StreamFailed("no connection in time") from error
        except OSError as error:
            raise StreamFailed(f"can't connect: {error.strerror or type(error).__name__}") from error
        try:
            return await connection.ask(request)
        except ConnectionResetError as error:
            raise StreamFailed("the server closed the connection without an answer") from error

    def give_back(self, connection: _Connection) -> None:
        """Keep a connection for the next request."""
        if len(self._idle) < MAX_IDLE:
            self._idle.append(connection)
        else:
            connection.close()

    def forget(self, connection: _Connection) -> None:
        """It was closed."""
        if connection in self._idle:
            self._idle.remove(connection)

    def close(self) -> None:
        """Close what is idle."""
        for connection in list(self._idle):
            connection.close()
