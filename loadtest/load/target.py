"""A server under test: found, and asked what it takes, before anything is measured."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import urlsplit

import aiohttp

from headrace.errors import StartError
from headrace.loadtest.load.prompts import WORDS
from headrace.loadtest.load.sse import error_text

Endpoint = Literal["auto", "chat", "completions"]
PATHS = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}
PROBE_SECONDS = 120.0
TOKEN_RANGES = ((1000, 30000), (256, 1000))
"""Ids that are plain text to most tokenizers: special ones come first or last."""
PROBE_WORDS = (40, 200)


@dataclass(frozen=True)
class Target:
    """One server, one model. What is asked of it is a list of token ids where `token_ids` names their range."""

    name: str
    url: str
    model: str
    endpoint: Literal["chat", "completions"]
    token_ids: tuple[int, int] | None = None
    takes_ignore_eos: bool = True
    """Whether it can be made to answer at full length."""
    tokens_around: float = 0.0
    """Prompt tokens that a chat template or tokenizer adds to a text."""
    tokens_per_word: float = 1.0
    headers: dict[str, str] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    """Fields that each request has besides ours."""
    notes: tuple[str, ...] = ()
    """What a reader of the figures should know."""

    def body(self, prompt: list[int] | str, output_tokens: int) -> dict[str, Any]:
        """The JSON of one request."""
        text: dict[str, Any] = (
            {"prompt": prompt}
            if self.endpoint == "completions"
            else {"messages": [{"role": "user", "content": prompt}]}
        )
        options: dict[str, Any] = {"model": self.model, "max_tokens": output_tokens, "temperature": 0}
        if self.takes_ignore_eos:
            options["ignore_eos"] = True
        return text | options | self.extra

    def address(self) -> tuple[str, int, bool]:
        """Host, port, and whether it speaks TLS."""
        parts = urlsplit(self.url)
        tls = parts.scheme == "https"
        return parts.hostname or "", parts.port or (443 if tls else 80), tls

    def head(self) -> bytes:
        """The start of an HTTP request, up to Content-Length."""
        parts = urlsplit(self.url)
        lines = [
            f"POST {parts.path}{PATHS[self.endpoint]} HTTP/1.1",
            f"Host: {parts.netloc}",
            "Accept: text/event-stream",
        ]
        lines += ["Content-Type: application/json", *(f"{name}: {value}" for name, value in self.headers.items())]
        return "".join(f"{line}\r\n" for line in lines).encode()


async def find_target(
    url: str, model: str | None, api_key: str | None, endpoint: Endpoint, extra: dict[str, Any]
) -> Target:
    """`url` may be `NAME=URL`, without a scheme, and with or without `/v1`. Raises `StartError`."""
    name, sign, rest = url.partition("=")
    if not sign or "/" in name or ":" in name:
        name, rest = "", url
    rest = (rest if "://" in rest else f"http://{rest}").rstrip("/").removesuffix("/v1")
    try:
        parts = urlsplit(rest)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
            raise ValueError("no such scheme, host or port")
    except ValueError as error:
        raise StartError(f"--url {url}: {error}; give one such as http://localhost:8000") from error
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    timeout = aiohttp.ClientTimeout(total=PROBE_SECONDS)
    async with aiohttp.ClientSession(headers=headers, timeout=timeout) as session:
        try:
            models = [model] if model else await _models(session, rest)
            target = Target(name or parts.netloc, rest, models[0], "chat", headers=headers, extra=extra)
            target = await _what_it_takes(session, target, endpoint)
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            raise StartError(
                f"can't talk to {rest}: {error or 'no answer in time'}; is it up, and is it HTTP?"
            ) from error
    if len(models) > 1:
        note = f"{len(models)} models are served; {target.model} was taken: --model names another"
        target = _with(target, notes=(note, *target.notes))
    return target


def _with(target: Target, **changes: Any) -> Target:
    return Target(**(vars(target) | changes))


async def _models(session: aiohttp.ClientSession, url: str) -> list[str]:
    async with session.get(f"{url}/v1/models") as response:
        text = await response.text()
        if response.status in (401, 403):
            raise StartError(f"{url} wants another key (status {response.status}): give --api-key or OPENAI_API_KEY")
        if response.status != 200:
            raise StartError(f"{url}/v1/models answers {response.status}: give --model, or another --url")
    answer = json.loads(text)
    models = [str(entry["id"]) for entry in answer.get("data", [])] if isinstance(answer, dict) else []
    if not models:
        raise StartError(f"{url} serves no model")
    return models


async def _what_it_takes(session: aiohttp.ClientSession, target: Target, endpoint: Endpoint) -> Target:
    """Try the most exact way to ask first."""
    refusals: list[str] = []
    for takes_ignore_eos in (True, False):
        if endpoint != "chat":
            for token_ids in TOKEN_RANGES:
                trial = _with(target, endpoint="completions", token_ids=token_ids, takes_ignore_eos=takes_ignore_eos)
                probe = list(range(token_ids[1] - 8, token_ids[1]))
                if await _prompt_tokens(session, trial, probe, refusals) == len(probe):
                    return _with(trial, notes=_notes(trial))
        for way in [one for one in ("chat", "completions") if endpoint in ("auto", one)]:
            trial = _with(target, endpoint=way, takes_ignore_eos=takes_ignore_eos)
            counts = [await _prompt_tokens(session, trial, " ".join(WORDS[:n]), refusals) for n in PROBE_WORDS]
            few, many = counts
            if few is None or many is None:
                continue
            if many <= few:  # no usage in its answers
                return _with(trial, notes=(*_notes(trial), "the server counts no tokens: a word was taken for a token"))
            per_word = (many - few) / (PROBE_WORDS[1] - PROBE_WORDS[0])
            around = max(few - per_word * PROBE_WORDS[0], 0.0)
            return _with(trial, tokens_per_word=per_word, tokens_around=around, notes=_notes(trial))
    raise StartError(f"{target.url} refuses what a load test asks: {refusals[-1]}")


def _notes(target: Target) -> tuple[str, ...]:
    return () if target.takes_ignore_eos else ("the server knows no ignore_eos: answers may be shorter than asked for",)


async def _prompt_tokens(
    session: aiohttp.ClientSession, target: Target, prompt: list[int] | str, refusals: list[str]
) -> int | None:
    """Prompt tokens as the server counts, 0 where it does not; None where it refuses."""
    url = target.url + PATHS[target.endpoint]
    async with session.post(url, json=target.body(prompt, 1)) as response:
        text = await response.text()
        if response.status == 200:
            return int((json.loads(text).get("usage") or {}).get("prompt_tokens") or 0)
    try:
        why = error_text(json.loads(text))
    except ValueError:
        why = text[:200]
    refusals.append(f"status {response.status}: {why}")
    if response.status in (401, 403, 429) or response.status > 501:
        raise StartError(f"{url} refuses: {refusals[-1]}")
    return None
