"""Asks a mesh: through the official `openai` client for what it says, over plain HTTP for how fast it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import aiohttp
from openai import AsyncOpenAI

from headrace.loadtest.prompts import SamplePrompt
from headrace.loadtest.timed_stream import EACH_TOKEN, TimedStream, completion, timed_stream


class StreamClient:
    """All requests are greedy."""

    def __init__(self, url: str, model: str) -> None:
        self._client = AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600)
        self._model = model
        self._session = aiohttp.ClientSession(url, timeout=aiohttp.ClientTimeout(total=600))

    async def ask(self, prompt: SamplePrompt, tokens: int) -> str:
        """The text of a chat or completion from text."""
        options: dict[str, Any] = {"model": self._model, "max_tokens": tokens, "temperature": 0, "stream": True}
        if prompt.is_chat:
            messages: Any = [{"role": "user", "content": prompt.text}]
            stream = await self._client.chat.completions.create(messages=messages, **options)
        else:
            stream = await self._client.completions.create(prompt=prompt.text, **options)
        choices = [chunk.choices[0] async for chunk in stream]
        return "".join((choice.delta.content if prompt.is_chat else choice.text) or "" for choice in choices)

    async def complete(self, prompt: Sequence[int], tokens: int) -> TimedStream:
        """Just `tokens` tokens after a prompt of token ids, each timed. Raises as `timed_stream`."""
        return await timed_stream(self._session, completion(self._model, prompt, tokens) | EACH_TOKEN)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *failure: object) -> None:
        await self._client.close()
        await self._session.close()
