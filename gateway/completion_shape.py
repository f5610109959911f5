"""Answers of /v1/completions, with the log probabilities of OpenAI's first API."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from headrace.gateway.answer import Answer
from headrace.gateway.detokenizer import Detokenizer
from headrace.gateway.job import Prompt
from headrace.gateway.shape import ChoicesShape, header, safe, top_tokens
from headrace.gateway.text import Delta, ScoredToken
from headrace.messages.stream import TokenLogprobs

Logprobs = dict[str, list[Any]]


class CompletionShape(ChoicesShape):
    """`text_completion`, streamed or whole."""

    def __init__(self, answer: Answer, model: str) -> None:
        super().__init__(answer, model)
        self._begun: set[int] = set()
        self._echoes: dict[int, tuple[str, list[int]]] = {}

    def _chunk(self, index: int, delta: Delta, finish_reason: str | None) -> dict[str, Any] | None:
        """The first chunk of a choice carries the prompt where `echo` asks for it."""
        if not delta and finish_reason is None:
            return None
        return self._choice(index, delta, finish_reason)

    def _whole(self, index: int, delta: Delta, finish_reason: str | None) -> dict[str, Any]:
        return self._choice(index, delta, finish_reason)

    def _envelope(self, choices: Sequence[dict[str, Any]], streamed: bool) -> dict[str, Any]:
        return {**header(self._answer, self._model, "text_completion"), "choices": choices}

    def _choice(self, index: int, delta: Delta, finish_reason: str | None) -> dict[str, Any]:
        job = self._answer.job
        logprobs: Logprobs | None = None
        if job.show_logprobs:
            logprobs = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        text = delta.text
        prompt, offsets = self._echo(index) if job.echo else ("", [])
        if job.echo and index not in self._begun:
            text = prompt + text
            if logprobs is not None:
                self._add_prompt(logprobs, index, offsets)
        self._begun.add(index)
        if logprobs is not None:
            for token in delta.tokens:
                self._add(logprobs, ScoredToken(token.scores, len(prompt) + token.offset))
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}

    def _echo(self, index: int) -> tuple[str, list[int]]:
        """The prompt's text and where each of its tokens begins in it; worked out once a prompt."""
        number = index // self._answer.job.n
        if number not in self._echoes:
            self._echoes[number] = self._decode(self._answer.job.prompts[number])
        return self._echoes[number]

    def _decode(self, prompt: Prompt) -> tuple[str, list[int]]:
        vocabulary = self._answer.vocabulary
        first = vocabulary.name_of(prompt.token_ids[0])
        was_added = prompt.text is not None and not prompt.text.startswith(first)
        detokenizer = Detokenizer(vocabulary, skip_special=False)
        text, offsets = "", []
        for position, token_id in enumerate(prompt.token_ids):
            offsets.append(len(text))
            if position > 0 or not was_added or token_id not in vocabulary.special_ids:
                text += detokenizer.push(token_id)
        text += detokenizer.flush()
        return (text if prompt.text is None else prompt.text), offsets

    def _add_prompt(self, logprobs: Logprobs, index: int, offsets: list[int]) -> None:
        """The prompt's tokens; nothing is known of how likely the first was."""
        choice = self._answer.choices[index]
        report = choice.report
        assert report is not None, "deltas wait for the report"
        assert report.prompt_logprobs is not None, "checked when the report came"
        logprobs["tokens"].append(self._name(choice.prompt.token_ids[0]))
        logprobs["token_logprobs"].append(None)
        logprobs["top_logprobs"].append(None)
        logprobs["text_offset"].append(0)
        for scores, offset in zip(report.prompt_logprobs, offsets[1:], strict=False):
            self._add(logprobs, ScoredToken(scores, offset))

    def _add(self, logprobs: Logprobs, token: ScoredToken) -> None:
        scores: TokenLogprobs = token.scores
        top = top_tokens(scores, self._answer.job.sampling.logprobs or 0)
        named = {self._name(token_id): logprob for token_id, logprob in top}
        named.setdefault(self._name(scores.token_id), safe(scores.logprob))
        logprobs["tokens"].append(self._name(scores.token_id))
        logprobs["token_logprobs"].append(safe(scores.logprob))
        logprobs["top_logprobs"].append(named)
        logprobs["text_offset"].append(token.offset)

    def _name(self, token_id: int) -> str:
        r"""A token's text, or `bytes:\xe4\xb8` for part of a code point."""
        name = self._answer.vocabulary.name_of(token_id)
        return f"bytes:{name}" if name.encode() != self._answer.vocabulary.bytes_of(token_id) else name
