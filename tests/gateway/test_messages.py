"""Anthropic's Messages API: its own client against it, and every field honoured or refused by name."""

from __future__ import annotations

import json
from typing import Any

import anthropic
import pytest
from anthropic import AsyncAnthropic
from anthropic.types import message_count_tokens_params, message_create_params

from headrace.gateway import respond
from headrace.gateway.errors import BadRequest
from headrace.gateway.job import Job
from headrace.gateway.messages_request import CountTokensRequest, MessagesRequest, read_messages
from headrace.gateway.tokenizer import Tokenizer
from tests.gateway.conftest import IDENTITY, MODEL, Gateway, OpenGateway
from tests.gateway.test_tools import CALL, WEATHER
from tests.gateway.workers import TEXT, Workers, keep_silent

HI: Any = [{"role": "user", "content": "Hi"}]
ASK: Any = {"model": MODEL, "max_tokens": 100, "messages": HI}
TOOLS: Any = [
    {"name": "weather", "description": "Look out", "input_schema": WEATHER},
    {"name": "now", "input_schema": {}},
]


def _client(gateway: Gateway, **options: Any) -> AsyncAnthropic:
    return AsyncAnthropic(base_url=gateway.url, **{"api_key": "none", "max_retries": 0, **options})


def _read(tokenizer: Tokenizer, **fields: Any) -> Job:
    return read_messages(json.dumps({**ASK, **fields}).encode(), tokenizer)[1]


def test_every_field_of_anthropic_s_endpoints_is_known() -> None:
    """A field that Anthropic adds makes this fail until it is honoured or refused by name."""
    own = set(MessagesRequest.model_fields)
    assert set(message_create_params.MessageCreateParamsBase.__annotations__) <= own
    assert set(message_count_tokens_params.MessageCountTokensParams.__annotations__) <= set(
        CountTokensRequest.model_fields
    )


async def test_the_anthropic_client_gets_a_whole_message(open_gateway: OpenGateway) -> None:
    """Text, stop reason, usage; the system prompt comes first."""
    async with open_gateway() as gateway, _client(gateway) as client:
        answer = await client.messages.create(**ASK, system=[{"type": "text", "text": "Be brief"}])
        counted = await client.messages.count_tokens(model=MODEL, messages=HI, system="Be brief")
        (delivery,) = gateway.workers.client_deliveries()
        prompt = gateway.workers.tokenizer.decode(delivery.entry.token_ids)
        count = len(gateway.workers.ids()) + 1
    assert [block.text for block in answer.content if block.type == "text"] == [TEXT]
    assert (answer.type, answer.role, answer.stop_reason, answer.id[:4]) == ("message", "assistant", "end_turn", "msg_")
    assert answer.usage.output_tokens == count
    assert answer.usage.input_tokens == counted.input_tokens == len(delivery.entry.token_ids)
    assert "system\nBe brief" in prompt
    assert delivery.entry.sampling.max_tokens == 100


async def test_the_anthropic_client_gets_a_stream(open_gateway: OpenGateway) -> None:
    """Begun, grown and ended block by block; what was found computed is no input."""

    async def cached(workers: Workers, delivery: Any) -> None:
        await workers.report(delivery, cached_tokens=3)
        await workers.tokens(delivery, 0, workers.ids(), "length")

    async with open_gateway() as gateway, _client(gateway) as client:
        gateway.workers.script = cached
        async with client.messages.stream(**ASK) as stream:
            events = [event.type async for event in stream]
            message = await stream.get_final_message()
        prompt = len(gateway.workers.client_deliveries()[0].entry.token_ids)
    assert events[:2] == ["message_start", "content_block_start"]
    assert events[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert [block.text for block in message.content if block.type == "text"] == [TEXT]
    assert message.stop_reason == "max_tokens"
    assert (message.usage.input_tokens, message.usage.cache_read_input_tokens) == (prompt - 3, 3)
    assert message.usage.output_tokens == len(gateway.workers.ids())


@pytest.mark.parametrize("stream", [False, True])
async def test_a_stop_sequence_is_named(open_gateway: OpenGateway, stream: bool) -> None:
    """It ends the text before it."""
    asked = {**ASK, "stop_sequences": ["lazy", "fox jumps"]}
    async with open_gateway() as gateway, _client(gateway) as client:
        if stream:
            async with client.messages.stream(**asked) as events:
                message = await events.get_final_message()
        else:
            message = await client.messages.create(**asked)
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "fox jumps")
    assert message.content[0].type == "text"
    assert message.content[0].text == "The quick brown "


@pytest.mark.parametrize("stream", [False, True])
async def test_tools_are_called_and_their_results_go_back(
    with_tools: Tokenizer, open_gateway: OpenGateway, stream: bool
) -> None:
    """The answer's content can be sent back as it is."""
    async with open_gateway() as gateway, _client(gateway) as client:
        gateway.workers.text = f"Let me see.\n{CALL}\n{CALL}"
        if stream:
            async with client.messages.stream(**ASK, tools=TOOLS) as events:
                message = await events.get_final_message()
        else:
            message = await client.messages.create(**ASK, tools=TOOLS)
        calls = [block for block in message.content if block.type == "tool_use"]
        results: Any = [
            {"type": "tool_result", "tool_use_id": calls[0].id, "content": [{"type": "text", "text": "Rain"}]},
            {"type": "tool_result", "tool_use_id": calls[1].id, "content": "No sky", "is_error": True},
            {"type": "text", "text": "And now?"},
        ]
        told: Any = [*HI, {"role": "assistant", "content": message.content}, {"role": "user", "content": results}]
        await client.messages.create(model=MODEL, max_tokens=1, tools=TOOLS, messages=told)
        prompt = gateway.workers.tokenizer.decode(gateway.workers.client_deliveries()[-1].entry.token_ids)
    assert message.stop_reason == "tool_use"
    assert [block.type for block in message.content] == ["text", "tool_use", "tool_use"]
    assert [call.input for call in calls] == [{"city": "Rome", "days": 3}] * 2
    assert '{"name": "weather", "arguments": {"city": "Rome", "days": 3}}' in prompt
    assert "tool\nRain" in prompt
    assert "tool\nError: No sky" in prompt
    assert prompt.index("No sky") < prompt.index("And now?")


async def test_a_call_that_was_cut_has_what_came_of_its_input(with_tools: Tokenizer, open_gateway: OpenGateway) -> None:
    """`max_tokens` says why."""

    async def cut(workers: Workers, delivery: Any) -> None:
        await workers.report(delivery)
        await workers.tokens(delivery, 0, workers.ids(CALL.partition(', "days"')[0]), "length")

    async with open_gateway() as gateway, _client(gateway) as client:
        gateway.workers.script = cut
        message = await client.messages.create(**ASK, tools=TOOLS)
    assert message.stop_reason == "max_tokens"
    assert message.content[0].type == "tool_use"
    assert message.content[0].input == {"city": "Rome"}


@pytest.mark.parametrize(
    ("fields", "required", "parallel"),
    [
        ({}, False, None),
        ({"tool_choice": {"type": "auto", "disable_parallel_tool_use": True}}, False, 1),
        ({"tool_choice": {"type": "any"}}, True, None),
        ({"tool_choice": {"type": "tool", "name": "now"}}, True, 1),
    ],
)
def test_what_must_be_called(
    with_tools: Tokenizer, fields: dict[str, Any], required: bool, parallel: int | None
) -> None:
    """As in a chat."""
    use = _read(with_tools, tools=TOOLS, **fields).tool_use
    assert use is not None
    assert (use.is_required, use.most_calls) == (required, parallel)


def test_all_sampling_fields_reach_the_workers(tokenizer: Tokenizer) -> None:
    """Nothing is lost between the body and the queue."""
    schema = {"type": "json_schema", "schema": {"type": "integer"}}
    job = _read(
        tokenizer, temperature=0.5, top_p=0.9, top_k=3, stop_sequences=["a"], stream=True, metadata={"user_id": "ann"},
        output_config={"format": schema},
    )  # fmt: skip
    sampling = job.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.max_tokens) == (0.5, 0.9, 3, 100)
    assert (job.stop, job.stream, job.user) == (("a",), True, "ann")
    assert sampling.grammar
    assert _read(tokenizer, thinking={"type": "disabled"}, service_tier="auto", tools=[], system="").tool_use is None


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking"),
        ({"mcp_servers": [{}]}, "mcp_servers"),
        ({"context_management": {"edits": []}}, "context_management"),
        ({"container": "x"}, "container"),
        ({"output_config": {"effort": "low"}}, "output_config.effort"),
        (
            {"output_config": {"format": {"type": "json_schema", "schema": {"type": "objekt"}}}},
            "output_config.format.schema",
        ),
        ({"stop": ["a"]}, "stop"),
        ({"stop_sequences": [""]}, "stop_sequences[0]"),
        ({"system": [{"type": "image"}]}, "system[0].type"),
        ({"messages": []}, "messages"),
        ({"messages": [*HI, {"role": "assistant", "content": "I"}]}, "messages[1]"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_use", "id": "a", "name": "b", "input": {}}]}]},
            "messages[0].content[0]",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "citations": [{}]}]}]},
            "messages[0].content[0].citations",
        ),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
        ({"tools": TOOLS, "tool_choice": {"type": "auto", "name": "now"}}, "tool_choice.name"),
        ({"tools": TOOLS, "tool_choice": {"type": "tool", "name": "never"}}, "tool_choice"),
        ({"tools": [{**TOOLS[0], "defer_loading": True}]}, "tools[0].defer_loading"),
    ],
)
def test_what_cannot_be_honoured_is_named(with_tools: Tokenizer, fields: dict[str, Any], param: str) -> None:
    """The 400 says which field is at fault."""
    with pytest.raises(BadRequest) as caught:
        _read(with_tools, **fields)
    assert (caught.value.param or "").startswith(param)


async def test_more_tokens_than_the_context_has_room_for_are_cut(open_gateway: OpenGateway) -> None:
    """Clients ask for the most that any model gives, whatever this one's context is."""
    async with open_gateway() as gateway, _client(gateway) as client:
        for max_tokens in (20_000, 100):
            await client.messages.create(**{**ASK, "max_tokens": max_tokens})
        cut, whole = (delivery.entry for delivery in gateway.workers.client_deliveries())
    assert len(cut.token_ids) + cut.sampling.max_tokens == IDENTITY.max_model_len
    assert whole.sampling.max_tokens == 100


async def test_errors_have_anthropic_s_form(open_gateway: OpenGateway) -> None:
    """Its client raises what it would there; the field is named."""
    async with open_gateway(api_key="secret") as gateway, _client(gateway, api_key="secret") as client:
        with pytest.raises(anthropic.BadRequestError, match="thinking"):
            await client.messages.create(**ASK, thinking={"type": "enabled", "budget_tokens": 1024})
        with pytest.raises(anthropic.NotFoundError) as missing:
            await client.messages.create(**{**ASK, "model": "other"})
        with pytest.raises(anthropic.BadRequestError, match="maximum context length"):
            await client.messages.create(**{**ASK, "messages": [{"role": "user", "content": "word " * 600}]})
        with pytest.raises(anthropic.AuthenticationError):
            await client.with_options(api_key="wrong").messages.create(**ASK)
        assert (await gateway.post("/v1/messages", ASK, headers={"X-Api-Key": "secret"}))[0] == 200
        status, body = await gateway.post("/v1/messages", ASK, headers={"X-Api-Key": "wrong"})
    assert missing.value.body == {
        "type": "error",
        "error": {
            "type": "not_found_error",
            "message": f"The model 'other' does not exist; this server has '{MODEL}'.",
        },
    }
    assert (status, body["error"]["type"]) == (401, "authentication_error")


async def test_a_quiet_stream_is_pinged_and_fails_in_anthropic_s_words(
    open_gateway: OpenGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once it has begun, an error is an event."""
    monkeypatch.setattr(respond, "KEEP_ALIVE_SECONDS", 0.05)
    async with open_gateway(request_timeout=0.3) as gateway, _client(gateway) as client:
        gateway.workers.script = keep_silent
        body = {**ASK, "stream": True}
        async with gateway.http.post(f"{gateway.url}/v1/messages", json=body) as response:
            text = (await response.read()).decode()
        with pytest.raises(anthropic.APIStatusError, match="timeout_error"):
            async with client.messages.stream(**ASK) as stream:
                await stream.get_final_message()
    assert text.startswith('event: ping\ndata: {"type":"ping"}\n\n')
    assert text.splitlines()[-3] == "event: error"
    assert "[DONE]" not in text
