"""Asks a mesh: through the official `openai` client for what it says, over plain HTTP for how fast it is."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import aiohttp
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
        self._session = aiohttp.ClientSession(url, timeout=aiohttp.ClientTimeout(total=600))

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
        """Just `tokens` tokens after a prompt of token ids, each timed, by a client that costs the machine little."""
        body = {
            "model": self._model,
            "prompt": list(prompt),
            "max_tokens": tokens,
            "temperature": 0,
            "stream": True,
            "ignore_eos": True,
            "logprobs": 0,  # makes each token an event, also where its text waits for the next one
        }
        events: list[bytes] = []
        answer = Answer(started=time.perf_counter())
        async with self._session.post("/v1/completions", json=body) as response:
            if response.status != 200:
                raise RuntimeError(await response.text())
            async for line in response.content:
                if line.startswith(b"data: {"):
                    answer.token_times.append(time.perf_counter())
                    events.append(line)
        choices = [json.loads(event.removeprefix(b"data: "))["choices"][0] for event in events]
        answer.text = "".join(choice["text"] for choice in choices)
        counts = [len(choice["logprobs"]["tokens"]) if choice["logprobs"] else 0 for choice in choices]
        answer.token_times = [at for at, count in zip(answer.token_times, counts, strict=True) for _ in range(count)]
        return answer

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *failure: object) -> None:
        await self._client.close()
        await self._session.close()
