"""One streamed completion, timed by a client that costs the machine little: it parses events once they all are here."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp


class StreamFailed(RuntimeError):
    """The server refused the request or ended its stream with an error, which is the message."""


@dataclass
class TimedStream:
    """Times are seconds of `time.perf_counter`."""

    started: float
    text: str = ""
    event_times: list[float] = field(default_factory=list)
    """Of each event with text or tokens; the first is the first token's."""

    @property
    def ttft(self) -> float:
        """From the request to the first event."""
        return self.event_times[0] - self.started


async def timed_stream(
    session: aiohttp.ClientSession,
    body: dict[str, Any],
    headers: dict[str, str] | None = None,
    on_first: Callable[[], None] = lambda: None,
) -> TimedStream:
    """POST /v1/completions with `stream` set. Raises `StreamFailed` and aiohttp's errors."""
    stream = TimedStream(time.perf_counter())
    events: list[bytes] = []
    async with session.post("/v1/completions", json=body | {"stream": True}, headers=headers) as response:
        if response.status != 200:
            raise StreamFailed(await response.text())
        left = b""
        async for data in response.content.iter_any():
            *whole, left = (left + data).split(b"\n\n")
            for event in whole:
                if event.startswith(b"data: {"):
                    stream.event_times.append(time.perf_counter())
                    events.append(event)
                    if len(events) == 1:
                        on_first()
    for event in events:
        chunk = json.loads(event.removeprefix(b"data: "))
        if "error" in chunk:
            raise StreamFailed(chunk["error"]["message"])
        stream.text += chunk["choices"][0]["text"]
    if not events:
        raise StreamFailed("the stream ended without a token")
    return stream


def completion(model: str, prompt: Sequence[int], tokens: int) -> dict[str, Any]:
    """A body that asks for so many tokens after these token ids, whatever they are."""
    return {"model": model, "prompt": list(prompt), "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
