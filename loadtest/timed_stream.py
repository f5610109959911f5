"""One streamed completion, timed by a client that costs the machine little: it parses events once they all are here."""

from __future__ import annotations

import json
import operator
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp


class StreamFailed(RuntimeError):
    """The server refused the request, by this HTTP status, or ended its stream with an error: the message."""

    def __init__(self, message: str, status: int = 200, retry_after: float = 0.0) -> None:
        """`retry_after`: seconds after which to ask again, where the server said so."""
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after


@dataclass
class TimedStream:
    """Times are seconds of `time.perf_counter`."""

    started: float
    text: str = ""
    event_times: list[float] = field(default_factory=list)
    """Of each event with text or tokens; the first is the first token's."""
    token_times: list[float] = field(default_factory=list)
    """Of each token, where log probabilities were asked for."""
    finish_reason: str = ""
    output_tokens: int = 0
    """As `usage` says, where it was asked for."""

    @property
    def ttft(self) -> float:
        """From the request to the first event."""
        return self.event_times[0] - self.started

    @property
    def itl(self) -> float:
        """Mean gap between tokens."""
        return (self.token_times[-1] - self.token_times[0]) / max(len(self.token_times) - 1, 1)

    @property
    def worst_pause(self) -> float:
        """The longest time between two events."""
        return max(map(operator.sub, self.event_times[1:], self.event_times), default=0.0)


async def timed_stream(
    session: aiohttp.ClientSession,
    body: dict[str, Any],
    headers: dict[str, str] | None = None,
    on_first: Callable[[], None] = lambda: None,
    url: str = "",
) -> TimedStream:
    """POST /v1/completions with `stream` set; `url` where the session has none.

    Raises `StreamFailed` and aiohttp's errors.
    """
    stream = TimedStream(time.perf_counter())
    events: list[bytes] = []
    async with session.post(f"{url}/v1/completions", json=body | {"stream": True}, headers=headers) as response:
        if response.status != 200:
            in_ms, in_seconds = (float(response.headers.get(f"Retry-After{unit}", 0)) for unit in ("-Ms", ""))
            retry_after = in_ms / 1000 or in_seconds
            raise StreamFailed(await response.text(), response.status, retry_after)
        left = b""
        async for data in response.content.iter_any():
            *whole, left = (left + data).split(b"\n\n")
            for event in whole:
                if event.startswith(b"data: {"):
                    stream.event_times.append(time.perf_counter())
                    events.append(event)
                    if len(events) == 1:
                        on_first()
    for at, event in zip(stream.event_times, events, strict=True):
        chunk = json.loads(event.removeprefix(b"data: "))
        if "error" in chunk:
            raise StreamFailed(chunk["error"]["message"])
        for choice in chunk["choices"]:
            stream.text += choice["text"]
            stream.finish_reason = choice.get("finish_reason") or stream.finish_reason
            stream.token_times += [at] * len((choice.get("logprobs") or {}).get("tokens", ()))
        if chunk.get("usage"):
            stream.output_tokens = chunk["usage"]["completion_tokens"]
    if not stream.finish_reason:
        raise StreamFailed("the stream ended without an end")
    return stream


def completion(model: str, prompt: Sequence[int], tokens: int) -> dict[str, Any]:
    """A body that asks for so many tokens after these token ids, whatever they are."""
    return {"model": model, "prompt": list(prompt), "max_tokens": tokens, "temperature": 0, "ignore_eos": True}


EACH_TOKEN = {"logprobs": 0}
"""Makes each token an event, also where its text waits for the next one's."""
