"""Server-sent events: how they are written, and the response that they leave in."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from aiohttp import web

CLIENT_PATIENCE_SECONDS = 60.0
"""How long a client may read nothing before it counts as gone."""
KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"
SSE_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}

encode_json = msgspec.json.Encoder().encode


def event(body: dict[str, Any]) -> bytes:
    """One event without a name."""
    return b"data: " + encode_json(body) + b"\n\n"


def named_event(body: dict[str, Any]) -> bytes:
    """One event that bears its body's `type` as its name."""
    return b"event: %b\ndata: %b\n\n" % (body["type"].encode(), encode_json(body))


class EventStream:
    """An SSE response whose headers leave with its first event."""

    def __init__(self, request: web.Request) -> None:
        self.response = web.StreamResponse(headers=SSE_HEADERS)
        self.begun = False
        self._request = request

    async def write(self, data: bytes) -> None:
        """Raises `ConnectionResetError` where the client has gone or reads nothing for a minute."""
        if not data:
            return
        transport = self._request.transport
        if self.begun and transport is not None and not transport.get_write_buffer_size():
            await self.response.write(data)  # the client has read all else: it waits for nothing
            return
        try:
            async with asyncio.timeout(CLIENT_PATIENCE_SECONDS):
                if not self.begun:
                    self.begun = True
                    await self.response.prepare(self._request)
                await self.response.write(data)
        except TimeoutError:
            if self._request.transport is not None:
                self._request.transport.abort()
            raise ConnectionResetError("the client reads nothing") from None

    async def end(self) -> None:
        """Say that nothing more comes."""
        await self.response.write_eof()
