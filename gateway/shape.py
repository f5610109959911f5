"""How answers look on the wire: what each endpoint's shape can do, and what those with choices have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

from headrace import __version__
from headrace.gateway.answer import Answer
from headrace.gateway.errors import ApiError, error_body
from headrace.gateway.sse import DONE, KEEP_ALIVE, event
from headrace.gateway.text import Delta
from headrace.gateway.vocabulary import Vocabulary
from headrace.messages.stream import TokenLogprobs

LOWEST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON has no word for; OpenAI's value."""


class Shape(Protocol):
    """How one endpoint writes an answer, whole or as events. One object serves one answer."""

    keep_alive: bytes
    """What a stream says while there is nothing to say."""

    @property
    def told(self) -> bool:
        """Whether all of the answer has been written."""

    def whole(self) -> dict[str, Any]:
        """The complete answer as one object."""

    def events(self) -> bytes:
        """All that is new."""

    def last(self) -> bytes:
        """What ends the stream of an answer that was told."""

    def failed(self, error: ApiError) -> bytes:
        """What ends a stream that had begun and can't go on."""


class ChoicesShape(ABC):
    """A `Shape` of chunks, each with some choices, and of objects with all of them."""

    keep_alive = KEEP_ALIVE

    def __init__(self, answer: Answer, model: str) -> None:
        self._answer = answer
        self._model = model
        self._told = [False] * len(answer.choices)
        """Which choices' last chunks are written."""

    @property
    def told(self) -> bool:
        return all(self._told)

    def whole(self) -> dict[str, Any]:
        choices = [
            self._whole(index, choice.take(), choice.finish_reason) for index, choice in enumerate(self._answer.choices)
        ]
        return self._envelope(choices, streamed=False) | {"usage": self._answer.usage()}

    def events(self) -> bytes:
        events = []
        job = self._answer.job
        usage = {"usage": self._answer.usage() if job.continuous_usage else None} if job.include_usage else {}
        for index, choice in enumerate(self._answer.choices):
            if self._told[index]:
                continue
            delta = choice.take()
            done = choice.state == "finished" and not choice.waits_for_report
            self._told[index] = done
            chunk = self._chunk(index, delta, choice.finish_reason if done else None)
            if chunk is not None:
                events.append(event(self._envelope([chunk], streamed=True) | usage))
        return b"".join(events)

    def last(self) -> bytes:
        if not self._answer.job.include_usage:
            return DONE
        return event(self._envelope([], streamed=True) | {"usage": self._answer.usage()}) + DONE

    def failed(self, error: ApiError) -> bytes:
        return event(error_body(error)) + DONE

    @abstractmethod
    def _chunk(self, index: int, delta: Delta, finish_reason: str | None) -> dict[str, Any] | None:
        """A choice in a streamed chunk, or None where there is nothing to say."""

    @abstractmethod
    def _whole(self, index: int, delta: Delta, finish_reason: str | None) -> dict[str, Any]:
        """A choice in a whole answer."""

    @abstractmethod
    def _envelope(self, choices: Sequence[dict[str, Any]], streamed: bool) -> dict[str, Any]:
        """The object around choices."""


def header(answer: Answer, model: str, kind: str) -> dict[str, Any]:
    """Fields that every object of an answer carries."""
    fields = {
        "id": answer.id,
        "object": kind,
        "created": answer.created,
        "model": model,
        "system_fingerprint": f"headrace-{__version__}",
    }
    if answer.job.service_tier is not None:
        fields["service_tier"] = answer.job.service_tier
    return fields


def top_tokens(scores: TokenLogprobs, count: int) -> list[tuple[int, float]]:
    """The `count` likeliest tokens with JSON-safe log probabilities."""
    return [(token_id, safe(logprob)) for token_id, logprob in scores.top[:count]]


def safe(logprob: float) -> float:
    """A log probability that JSON can hold."""
    return max(LOWEST_LOGPROB, logprob)  # in this order, which also catches NaN


def token_fields(vocabulary: Vocabulary, token_id: int, logprob: float) -> dict[str, Any]:
    """A token as the chat endpoint shows it."""
    raw = vocabulary.bytes_of(token_id)
    return {"token": vocabulary.name_of(token_id), "logprob": safe(logprob), "bytes": list(raw)}
