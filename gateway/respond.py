"""Writes an answer to its client: whole, or as server-sent events while it grows."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from aiohttp import web

from headrace.gateway.answer import Answer
from headrace.gateway.errors import ApiError, error_body
from headrace.gateway.shape import Shape

KEEP_ALIVE_SECONDS = 15.0
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


async def whole_body(answer: Answer, shape: Shape) -> bytes:
    """Wait for the last token; the answer as one object."""
    await answer.complete()
    choices = [shape.whole(index, choice.take(), choice.finish_reason) for index, choice in enumerate(answer.choices)]
    body = shape.envelope(choices, streamed=False) | {"usage": answer.usage()}
    answer.outcome = "ok"
    return encode_json(body)


async def respond_streaming(request: web.Request, answer: Answer, shape: Shape) -> web.StreamResponse:
    """Send what is new whenever something is.

    A slow client gets fewer and larger events, never a longer queue. An error before the first event is raised, so that
    it becomes a plain HTTP error; later ones become an event.
    """
    stream = EventStream(request)
    told = [False] * len(answer.choices)
    try:
        while not all(told):
            answer.check()
            if not (answer.ended or await answer.wait_for_news(KEEP_ALIVE_SECONDS)):
                await stream.write(KEEP_ALIVE)
                continue
            if answer.ended:
                await answer.wait_for_reports()
            await stream.write(_events(answer, shape, told))
        if answer.job.include_usage:
            await stream.write(_event(shape.envelope([], streamed=True) | {"usage": answer.usage()}))
    except ApiError as error:
        if not stream.begun:
            raise
        await stream.write(_event(error_body(error)))
        answer.outcome = error.code
    else:
        answer.outcome = "ok"
    await stream.end()
    return stream.response


def _events(answer: Answer, shape: Shape, told: list[bool]) -> bytes:
    """Everything that choices have to tell; `told` marks those whose last chunk is among it."""
    events = []
    job = answer.job
    usage = {"usage": answer.usage() if job.continuous_usage else None} if job.include_usage else {}
    for index, choice in enumerate(answer.choices):
        if told[index]:
            continue
        delta = choice.take()
        done = choice.state == "finished" and not choice.waits_for_report
        told[index] = done
        chunk = shape.chunk(index, delta, choice.finish_reason if done else None)
        if chunk is not None:
            events.append(_event(shape.envelope([chunk], streamed=True) | usage))
    return b"".join(events)


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + encode_json(body) + b"\n\n"


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
        await self.write(DONE)
        await self.response.write_eof()
