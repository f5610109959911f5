"""What the two endpoints' answers have in common on the wire."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from headrace import __version__
from headrace.gateway.answer import Answer
from headrace.gateway.text import Delta
from headrace.gateway.vocabulary import Vocabulary
from headrace.messages.stream import TokenLogprobs

LOWEST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON has no word for; OpenAI's value."""


class Shape(Protocol):
    """How one endpoint writes choices. One object serves one answer."""

    def chunk(self, index: int, delta: Delta, finish_reason: str | None) -> dict[str, Any] | None:
        """A choice in a streamed chunk, or None where there is nothing to say."""

    def whole(self, index: int, delta: Delta, finish_reason: str | None) -> dict[str, Any]:
        """A choice in a whole answer."""

    def envelope(self, choices: Sequence[dict[str, Any]], streamed: bool) -> dict[str, Any]:
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
