"""The HTTP side over real sockets: shapes, errors, and who may come in."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

import aiohttp
import pytest
from openai import AsyncOpenAI
from prometheus_client.parser import text_string_to_metric_families

from headrace.gateway import admission, respond
from tests.gateway.conftest import MODEL, Gateway, OpenGateway
from tests.gateway.workers import TEXT, Workers, keep_silent

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}
COMPLETION = {"model": MODEL, "prompt": "Hi there", "max_tokens": 100}


def _openai(gateway: Gateway) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0)


async def _events(response: aiohttp.ClientResponse) -> list[Any]:
    """The JSON of each event, up to [DONE]."""
    assert response.headers["Content-Type"].startswith("text/event-stream")
    lines = [line async for line in response.content if line.startswith(b"data: ")]
    assert lines[-1] == b"data: [DONE]\n"
    return [json.loads(line.removeprefix(b"data: ")) for line in lines[:-1]]


async def _choices(gateway: Gateway, body: dict[str, Any]) -> list[Any]:
    """The choices of one completion, or those of all its events."""
    async with gateway.http.post(f"{gateway.url}/v1/completions", json=body) as response:
        if body["stream"]:
            return [event["choices"][0] for event in await _events(response)]
        choices: list[Any] = (await response.json())["choices"]
        return choices


async def test_the_openai_client_gets_a_whole_chat_answer(open_gateway: OpenGateway) -> None:
    """Text, finish reason and usage; the stop token counts and is not shown."""
    async with open_gateway() as gateway, _openai(gateway) as client:
        answer = await client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "Hi"}])
        count = len(gateway.workers.ids()) + 1
    assert answer.choices[0].message.content == TEXT
    assert (answer.choices[0].finish_reason, answer.object, answer.id[:9]) == ("stop", "chat.completion", "chatcmpl-")
    assert answer.usage is not None
    assert answer.usage.completion_tokens == count
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + count
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 0


async def test_the_openai_client_gets_a_chat_stream(open_gateway: OpenGateway) -> None:
    """The role comes first, then the text, the finish reason and, where asked for, the usage."""
    async with open_gateway() as gateway, _openai(gateway) as client:
        stream = await client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "Hi"}],
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = [chunk async for chunk in stream]
    *text, last = chunks
    assert text[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in text) == TEXT
    assert [chunk.choices[0].finish_reason for chunk in text if chunk.choices[0].finish_reason] == ["stop"]
    assert all(chunk.object == "chat.completion.chunk" and chunk.usage is None for chunk in text)
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens > 0


async def test_a_stream_may_count_its_tokens_all_the_while(open_gateway: OpenGateway) -> None:
    """As vLLM does, and as guidellm asks every server to."""
    async with open_gateway() as gateway, _openai(gateway) as client:
        stream = await client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "Hi"}],
            stream=True,
            stream_options={"include_usage": True, "continuous_usage_stats": True},  # type: ignore[typeddict-unknown-key]
        )
        usages = [chunk.usage async for chunk in stream]
    counts = [usage.completion_tokens for usage in usages if usage is not None]
    assert len(counts) == len(usages)
    assert counts == sorted(counts)
    assert 0 < counts[-1] == counts[-2]
    assert all(usage is not None and usage.prompt_tokens == usages[-1].prompt_tokens for usage in usages)


async def test_several_choices_are_one_answer(open_gateway: OpenGateway) -> None:
    """Each has its index, and usage counts the prompt once."""
    async with open_gateway() as gateway, _openai(gateway) as client:
        messages = [{"role": "user", "content": "Hi"}]
        answer = await client.chat.completions.create(model=MODEL, messages=messages, n=3, seed=7)  # type: ignore[arg-type]
        one = await client.chat.completions.create(model=MODEL, messages=messages)  # type: ignore[arg-type]
        seeds = sorted(d.entry.sampling.seed for d in gateway.workers.client_deliveries()[:3])
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert seeds == [7, 8, 9]
    assert answer.usage is not None
    assert one.usage is not None
    assert answer.usage.prompt_tokens == one.usage.prompt_tokens
    assert answer.usage.completion_tokens == 3 * one.usage.completion_tokens


async def test_chat_logprobs_have_bytes_and_join_to_the_text(open_gateway: OpenGateway) -> None:
    """The tokens shown are those of the text; the stop token is not among them."""
    async with open_gateway() as gateway, _openai(gateway) as client:
        gateway.workers.text = "A 🦊!"
        answer = await client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "Hi"}], logprobs=True, top_logprobs=2
        )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert bytes(byte for token in logprobs.content for byte in token.bytes or []).decode() == "A 🦊!"
    assert all(len(token.top_logprobs) == 2 and token.logprob == -0.5 for token in logprobs.content)


async def test_completions_number_choices_prompt_by_prompt(open_gateway: OpenGateway) -> None:
    """Two prompts with n=2: choices 0 and 1 continue the first, 2 and 3 the second."""
    async with open_gateway() as gateway, _openai(gateway) as client:
        answer = await client.completions.create(model=MODEL, prompt=["One", "Two words"], n=2, max_tokens=3, echo=True)
    begin = [choice.text.split("The quick")[0] for choice in answer.choices]
    assert begin == ["One", "One", "Two words", "Two words"]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert {choice.finish_reason for choice in answer.choices} == {"length"}
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 12


@pytest.mark.parametrize("stream", [False, True])
async def test_echo_with_logprobs_scores_the_prompt_too(open_gateway: OpenGateway, stream: bool) -> None:
    """Offsets count from the prompt's first character; the first token has no score."""
    body = {**COMPLETION, "echo": True, "logprobs": 2, "max_tokens": 3, "stream": stream}
    async with open_gateway() as gateway:
        choices = await _choices(gateway, body)
        expected = gateway.workers.ids("Hi there") + gateway.workers.ids()[:3]
        vocabulary = gateway.workers.tokenizer.vocabulary
    text = "".join(choice["text"] for choice in choices)
    merged = {key: [item for c in choices for item in c["logprobs"][key]] for key in choices[0]["logprobs"]}
    assert merged["tokens"] == [vocabulary.name_of(token_id) for token_id in expected]
    assert merged["token_logprobs"] == [None] + [-0.5] * (len(expected) - 1)
    assert merged["top_logprobs"][0] is None
    assert all(len(top) == 2 for top in merged["top_logprobs"][1:])
    for token, offset in zip(merged["tokens"], merged["text_offset"], strict=True):
        assert text[offset:].startswith(token)


async def test_no_tokens_wanted_scores_the_prompt_alone(open_gateway: OpenGateway) -> None:
    """`max_tokens` 0 with echo and logprobs is what evaluation harnesses ask; without them no worker is needed."""
    async with open_gateway() as gateway:
        body = {**COMPLETION, "max_tokens": 0, "echo": True}
        _, scored = await gateway.post("/v1/completions", {**body, "logprobs": 1})
        asked = len(gateway.workers.client_deliveries())
        _, plain = await gateway.post("/v1/completions", body)
        assert len(gateway.workers.client_deliveries()) == asked == 1
    assert scored["choices"][0]["text"] == plain["choices"][0]["text"] == "Hi there"
    assert scored["choices"][0]["logprobs"]["token_logprobs"][0] is None
    assert len(scored["choices"][0]["logprobs"]["tokens"]) == scored["usage"]["prompt_tokens"]
    assert plain["choices"][0]["finish_reason"] == "length"
    assert plain["usage"]["completion_tokens"] == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_a_stop_string_ends_the_text_before_it_and_frees_the_workers(
    open_gateway: OpenGateway, stream: bool
) -> None:
    """Its start is never shown, and both tiers are told to stop."""
    body = {**COMPLETION, "stop": ["fox jumps", "nothing"], "stream": stream, "logprobs": 0}
    async with open_gateway() as gateway:
        choices = await _choices(gateway, body)
        await gateway.workers.until(lambda: len(gateway.workers.cancels) >= 2)
    assert "".join(choice["text"] for choice in choices) == "The quick brown "
    assert choices[-1]["finish_reason"] == "stop"
    tokens = [token for choice in choices for token in choice["logprobs"]["tokens"]]
    assert "".join(tokens).startswith("The quick brown")
    assert "jumps" not in "".join(tokens)


async def test_every_error_has_openai_s_shape(open_gateway: OpenGateway) -> None:
    """Status, type, code, param and a message that says what to do."""
    async with open_gateway(max_body_bytes=2000) as gateway:
        cases = [
            ("/v1/chat/completions", {**CHAT, "tools": [{}]}, 400, "missing_field", "tools[0].type"),
            ("/v1/chat/completions", {**CHAT, "model": "gpt"}, 404, "model_not_found", "model"),
            ("/v1/chat/completions", {**CHAT, "user": "x" * 3000}, 413, "body_too_large", None),
            ("/v1/completions", {**COMPLETION, "max_tokens": 600}, 400, "context_length_exceeded", "prompt"),
            ("/v1/embeddings", {}, 404, "unknown_url", None),
            ("/v1/models", {}, 405, "method_not_allowed", None),
        ]
        for path, body, status, code, param in cases:
            found, answer = await gateway.post(path, body)
            assert (found, answer["error"]["code"], answer["error"]["param"]) == (status, code, param), answer
            assert set(answer["error"]) == {"message", "type", "param", "code"}
        async with gateway.http.post(f"{gateway.url}/v1/completions", data=b"{") as response:
            assert response.status == 400
            assert (await response.json())["error"]["code"] == "invalid_json"


async def test_models_are_listed_under_the_served_name(open_gateway: OpenGateway) -> None:
    """One card, and a 404 for others."""
    async with open_gateway(prefill=False, decode=0) as gateway, _openai(gateway) as client:
        assert [model.id async for model in client.models.list()] == [MODEL]
        assert (await client.models.retrieve(MODEL)).owned_by == "headrace"
        async with gateway.http.get(f"{gateway.url}/v1/models/other") as response:
            assert response.status == 404
        async with gateway.http.get(f"{gateway.url}/version") as response:
            assert "version" in await response.json()


async def test_the_api_key_guards_all_but_the_probes(open_gateway: OpenGateway) -> None:
    """Metrics too."""
    async with open_gateway(prefill=False, decode=0, api_key="secret") as gateway:
        for path, status in (("/health", 200), ("/ping", 200), ("/ready", 503), ("/metrics", 401), ("/v1/models", 401)):
            async with gateway.http.get(gateway.url + path) as response:
                assert response.status == status, path
        for header, status in (("Bearer secret", 200), ("Bearer wrong", 401), ("Basic secret", 401), ("Bearer é", 401)):
            async with gateway.http.get(f"{gateway.url}/metrics", headers={"Authorization": header}) as response:
                assert response.status == status, header


async def test_a_sane_request_id_is_returned_and_others_are_replaced(open_gateway: OpenGateway) -> None:
    """In whole answers, streams and errors alike."""
    async with open_gateway() as gateway:
        for body in (CHAT, {**CHAT, "stream": True}, {**CHAT, "n": 0}):
            for given, kept in (("abc-1", True), ("x" * 200, False), ("a b", False)):
                headers = {"X-Request-Id": given}
                async with gateway.http.post(
                    f"{gateway.url}/v1/chat/completions", json=body, headers=headers
                ) as response:
                    assert (response.headers["X-Request-Id"] == given) == kept
                    await response.read()


async def test_ready_follows_the_tiers(open_gateway: OpenGateway) -> None:
    """False without workers, true once a warm-up went through both tiers, false when a tier is empty again. Whoever
    starts a mesh learns the model's name without a key.
    """
    async with open_gateway(api_key="secret") as gateway:
        assert (await _until_ready(gateway, True))["model"] == MODEL
        await gateway.workers.leave("d0")
        assert "decode" in (await _until_ready(gateway, False))["reason"]


async def _until_ready(gateway: Gateway, ready: bool) -> dict[str, Any]:
    async with asyncio.timeout(10):
        while True:
            async with gateway.http.get(f"{gateway.url}/ready") as response:
                body = await response.json()
                assert body["ready"] == (response.status == 200)
                if body["ready"] == ready:
                    return dict(body)
            await asyncio.sleep(0.02)


async def test_a_tier_without_workers_is_a_503(open_gateway: OpenGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a moment's patience, with a hint when to come back."""
    monkeypatch.setattr(admission, "PATIENCE_SECONDS", 0.1)
    async with (
        open_gateway(decode=0) as gateway,
        gateway.http.post(f"{gateway.url}/v1/chat/completions", json=CHAT) as response,
    ):
        assert response.status == 503
        assert int(response.headers["Retry-After"]) > 0
        assert "decode" in (await response.json())["error"]["message"]


async def test_a_full_queue_is_a_429(open_gateway: OpenGateway) -> None:
    """With a hint when to come back."""
    async with open_gateway(max_queued_requests=2) as gateway:
        gateway.workers.script = keep_silent
        await _until_ready(gateway, True)
        first = asyncio.create_task(gateway.post("/v1/chat/completions", {**CHAT, "n": 2}))
        await gateway.workers.until(lambda: len(gateway.workers.client_deliveries()) == 2)
        async with gateway.http.post(f"{gateway.url}/v1/chat/completions", json=CHAT) as response:
            assert response.status == 429
            assert int(response.headers["Retry-After"]) > 0
        first.cancel()


async def test_a_quiet_stream_is_kept_alive(open_gateway: OpenGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """Comments, so that proxies don't hang up."""
    monkeypatch.setattr(respond, "KEEP_ALIVE_SECONDS", 0.05)
    async with open_gateway() as gateway:
        gateway.workers.script = keep_silent
        async with gateway.http.post(f"{gateway.url}/v1/chat/completions", json={**CHAT, "stream": True}) as response:
            assert await response.content.readuntil(b"\n\n") == b": keep-alive\n\n"


async def test_an_answer_over_its_deadline_is_a_504(open_gateway: OpenGateway) -> None:
    """And the workers are told."""
    async with open_gateway(request_timeout=0.3) as gateway:
        gateway.workers.script = keep_silent
        status, answer = await gateway.post("/v1/chat/completions", CHAT)
        assert (status, answer["error"]["code"]) == (504, "deadline_exceeded")
        await gateway.workers.until(lambda: len(gateway.workers.cancels) >= 2)


async def test_metrics_show_requests_and_the_workers_figures(open_gateway: OpenGateway) -> None:
    """Gauges and counters of every live worker carry its tier and name."""
    async with open_gateway() as gateway:
        stats = {"kv_pages_in_use": 3.0, "handoff_recomputed_total": 2.0, "not a name": 1.0}
        gateway.workers.decode[0].registry.update_stats(stats)
        await gateway.post("/v1/chat/completions", CHAT)
        labels = {"tier": "decode", "worker": "d0"}
        for _ in range(500):
            found = await _samples(gateway)
            if found.get("headrace_kv_pages_in_use") == (labels, 3.0):
                break
            await asyncio.sleep(0.01)
    assert found["headrace_handoff_recomputed_total"] == (labels, 2.0)
    assert found["headrace_gateway_requests_total"] == ({"endpoint": "/v1/chat/completions", "outcome": "ok"}, 1.0)
    assert found["headrace_gateway_time_to_first_token_seconds_count"][1] >= 1
    assert found["headrace_gateway_inter_token_seconds_count"][1] >= 5


async def _samples(gateway: Gateway) -> dict[str, tuple[dict[str, str], float]]:
    async with gateway.http.get(f"{gateway.url}/metrics") as response:
        families = text_string_to_metric_families(await response.text())
        return {sample.name: (sample.labels, sample.value) for family in families for sample in family.samples}


async def test_each_request_leaves_one_readable_line(
    open_gateway: OpenGateway, caplog: pytest.LogCaptureFixture
) -> None:
    """Who did it, how long each part took, how fast it was."""
    caplog.set_level(logging.INFO, "headrace.gateway.requests")
    async with open_gateway() as gateway:
        await gateway.post("/v1/chat/completions", {**CHAT, "user": "ann"})
    lines = [record.getMessage() for record in caplog.records if record.name == "headrace.gateway.requests"]
    assert len(lines) == 1
    for part in ("chat-", "p0->d0", "ttft", "(queue 1 prefill 2 kv 3 first", "tok/s", "kv=received", "user='ann'"):
        assert part in lines[0]


async def test_the_text_of_a_slow_client_is_complete(open_gateway: OpenGateway) -> None:
    """What was not read yet comes in larger pieces."""

    async def burst(workers: Workers, delivery: Any) -> None:
        ids = workers.ids()
        await workers.report(delivery)
        await workers.tokens(delivery, 0, ids[:4])
        await workers.tokens(delivery, 4, ids[4:], "length")

    async with open_gateway() as gateway:
        gateway.workers.script = burst
        async with gateway.http.post(f"{gateway.url}/v1/completions", json={**COMPLETION, "stream": True}) as response:
            events = await _events(response)
    assert "".join(event["choices"][0]["text"] for event in events) == TEXT
