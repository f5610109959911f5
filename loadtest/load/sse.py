"""Reads a finished event stream: which pieces brought text, and when."""

from __future__ import annotations

from typing import Any

import msgspec


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: Any = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None

    @property
    def has_text(self) -> bool:
        delta = self.delta
        return bool(
            self.text or (delta and (delta.content or delta.reasoning_content or delta.reasoning or delta.tool_calls))
        )


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


class Reply(msgspec.Struct):
    """What a stream said. `times` are those of the pieces in which events with text ended."""

    times: list[float] = []
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    failure: str = ""


_decode = msgspec.json.Decoder(_Event).decode


def read_stream(pieces: list[tuple[float, bytes]]) -> Reply:
    """`pieces` are (time, bytes of the body) as they came."""
    reply = Reply(times=[])
    rest = b""
    is_done = False
    for at, piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if not line.startswith(b"data:"):
                continue
            data = line[5:].strip()
            if data == b"[DONE]":
                is_done = True
                continue
            try:
                event = _decode(data)
            except msgspec.MsgspecError as error:
                reply.failure = f"an event can't be read: {error}"
                return reply
            if event.error is not None:
                reply.failure = f"error in the stream: {error_text(event.error)}"
                return reply
            if any(choice.has_text for choice in event.choices):
                reply.times.append(at)
            if event.usage is not None:
                reply.prompt_tokens, reply.output_tokens = event.usage.prompt_tokens, event.usage.completion_tokens
    if not is_done:
        reply.failure = "the stream ended without [DONE]"
    elif not reply.times:
        reply.failure = "an answer without text"
    return reply


def error_text(error: Any) -> str:
    """The message of an error in OpenAI's shape, or what there is instead."""
    if isinstance(error, dict):
        error = error.get("error", error)
    if isinstance(error, dict):
        error = error.get("message", error)
    return " ".join(str(error).split())[:200]
