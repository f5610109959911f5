"""Answers of /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from headrace.gateway.answer import Answer
from headrace.gateway.shape import ChoicesShape, header, token_fields, top_tokens
from headrace.gateway.text import Delta, ScoredToken
from headrace.gateway.tools import CallReader, joined, read_part


class ChatShape(ChoicesShape):
    """`chat.completion` and `chat.completion.chunk`."""

    def __init__(self, answer: Answer, model: str) -> None:
        super().__init__(answer, model)
        self._begun: set[int] = set()
        self._readers: dict[int, CallReader] = {}

    def _chunk(self, index: int, delta: Delta, finish_reason: str | None) -> dict[str, Any] | None:
        """The first chunk of a choice carries the role."""
        if not delta and finish_reason is None:
            return None
        message: dict[str, Any] = {} if index in self._begun else {"role": "assistant", "content": ""}
        self._begun.add(index)
        text, calls, finish_reason = self._read(index, delta.text, finish_reason)
        if text or (delta.tokens and not calls):
            message["content"] = text
        if calls:
            message["tool_calls"] = calls
        return {"index": index, "delta": message, "logprobs": self._logprobs(delta), "finish_reason": finish_reason}

    def _whole(self, index: int, delta: Delta, finish_reason: str | None) -> dict[str, Any]:
        text, calls, finish_reason = self._read(index, delta.text, finish_reason)
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if calls:
            message |= {"content": text or None, "tool_calls": joined(calls)}
        logprobs = self._logprobs(delta) or (
            {"content": [], "refusal": None} if self._answer.job.show_logprobs else None
        )
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": finish_reason}

    def _envelope(self, choices: Sequence[dict[str, Any]], streamed: bool) -> dict[str, Any]:
        kind = "chat.completion.chunk" if streamed else "chat.completion"
        return {**header(self._answer, self._model, kind), "choices": choices}

    def _read(self, index: int, text: str, finish_reason: str | None) -> tuple[str, list[dict[str, Any]], str | None]:
        """What of a choice's new text is content, what calls of tools, and why it ended, if it has."""
        use = self._answer.job.tool_use
        if use is None:
            return text, [], finish_reason
        reader = self._readers.setdefault(index, CallReader(use.most_calls))
        read, finish_reason = read_part(reader, text, finish_reason)
        return read.content, read.calls, finish_reason

    def _logprobs(self, delta: Delta) -> dict[str, Any] | None:
        if not delta.tokens:
            return None
        return {"content": [self._token(token) for token in delta.tokens], "refusal": None}

    def _token(self, token: ScoredToken) -> dict[str, Any]:
        vocabulary = self._answer.vocabulary
        top = top_tokens(token.scores, self._answer.job.sampling.logprobs or 0)
        return {
            **token_fields(vocabulary, token.scores.token_id, token.scores.logprob),
            "top_logprobs": [token_fields(vocabulary, token_id, logprob) for token_id, logprob in top],
        }
