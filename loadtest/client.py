"""Streams answers through the official `openai` client and times them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from openai import AsyncOpenAI

from headrace.loadtest.prompts import SamplePrompt


@dataclass
class Answer:
    """One streamed answer; times are seconds."""

    text: str = ""
    started: float = 0.0
    token_times: list[float] = field(default_factory=list)

    @property
    def time_to_first_token(self) -> float:
        """From the request to the first token."""
        return self.token_times[0] - self.started

    @property
    def inter_token_time(self) -> float:
        """Mean gap between tokens."""
        return (self.token_times[-1] - self.token_times[0]) / max(len(self.token_times) - 1, 1)


class StreamClient:
    """All requests are greedy."""

    def __init__(self, url: str, model: str) -> None:
        self._client = AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600)
        self._model = model

    async def ask(self, prompt: SamplePrompt, tokens: int) -> Answer:
        """A chat or completion from text."""
        options: dict[str, Any] = {"model": self._model, "max_tokens": tokens, "temperature": 0, "stream": True}
        answer = Answer(started=time.perf_counter())
        if prompt.is_chat:
            messages: Any = [{"role": "user", "content": prompt.text}]
            stream = await self._client.chat.completions.create(messages=messages, **options)
        else:
            stream = await self._client.completions.create(prompt=prompt.text, **options)
        async for chunk in stream:
            choice = chunk.choices[0]
            piece = choice.delta.content if prompt.is_chat else choice.text
            answer.text += piece or ""
        return answer

    async def complete(self, prompt: Sequence[int], tokens: int) -> Answer:
        """Just `tokens` tokens after a prompt of token ids, each timed."""
        answer = Answer(started=time.perf_counter())
        stream: Any = await self._client.completions.create(
            model=self._model,
            prompt=list(prompt),
            max_tokens=tokens,
            temperature=0,
            stream=True,
            logprobs=0,  # makes each token an event, also where its text waits for the next one
            extra_body={"ignore_eos": True},
        )
        async for chunk in stream:
            choice = chunk.choices[0]
            answer.text += choice.text
            if choice.logprobs is not None:
                now = time.perf_counter()
                answer.token_times += [now] * len(choice.logprobs.tokens or [])
        return answer

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *failure: object) -> None:
        await self._client.close()
