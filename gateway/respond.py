"""Writes an answer to its client: whole, or as server-sent events while it grows."""

from __future__ import annotations

from aiohttp import web

from headrace.gateway.answer import Answer
from headrace.gateway.errors import ApiError
from headrace.gateway.shape import Shape
from headrace.gateway.sse import EventStream, encode_json

KEEP_ALIVE_SECONDS = 15.0


async def whole_body(answer: Answer, shape: Shape) -> bytes:
    """Wait for the last token; the answer as one object."""
    await answer.complete()
    body = shape.whole()
    answer.outcome = "ok"
    return encode_json(body)


async def respond_streaming(request: web.Request, answer: Answer, shape: Shape) -> web.StreamResponse:
    """Send what is new whenever something is.

    A slow client gets fewer and larger events, never a longer queue. An error before the first event is raised, so that
    it becomes a plain HTTP error; later ones become an event.
    """
    stream = EventStream(request)
    try:
        while not shape.told:
            answer.check()
            if not (answer.ended or await answer.wait_for_news(KEEP_ALIVE_SECONDS)):
                await stream.write(shape.keep_alive)
                continue
            if answer.ended:
                await answer.wait_for_reports()
            await stream.write(shape.events())
        await stream.write(shape.last())
    except ApiError as error:
        if not stream.begun:
            raise
        await stream.write(shape.failed(error))
        answer.outcome = error.code
    else:
        answer.outcome = "ok"
    await stream.end()
    return stream.response
