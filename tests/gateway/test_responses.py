"""OpenAI's Responses API: its own client against it, and every field honoured or refused by name."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI
from openai.types.responses import response_create_params

from headrace.gateway.errors import BadRequest
from headrace.gateway.job import Job
from headrace.gateway.responses_request import ResponsesRequest, read_responses
from headrace.gateway.tokenizer import Tokenizer
from headrace.messages.request import SamplingParams
from tests.gateway.conftest import MODEL, Gateway, OpenGateway
from tests.gateway.test_tools import CALL, WEATHER
from tests.gateway.workers import TEXT, Workers

TOOLS: Any = [{"type": "function", "name": "weather", "parameters": WEATHER}, {"type": "function", "name": "now"}]
INTEGER = {"type": "json_schema", "name": "number", "schema": {"type": "integer"}, "strict": True}


def _client(gateway: Gateway) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0)


def _sampling(job: Job) -> SamplingParams:
    """As the workers get it, in a mesh with room for 512 tokens."""
    return job.sampling_of(job.prompts[0], 0, 512)


def _read(tokenizer: Tokenizer, **fields: Any) -> Job:
    return read_responses(json.dumps({"model": "m", "input": "Hi", **fields}).encode(), tokenizer)[1]


def test_every_field_of_openai_s_endpoint_is_known() -> None:
    """A field that OpenAI adds makes this fail until it is honoured or refused by name."""
    known = set(ResponsesRequest.model_fields)
    assert set(response_create_params.ResponseCreateParamsBase.__annotations__) <= known
    optional = {name: None for name, field in ResponsesRequest.model_fields.items() if not field.is_required()}
    assert ResponsesRequest.model_validate({"model": "m", "input": "Hi", **optional})


async def test_the_openai_client_gets_a_whole_response(open_gateway: OpenGateway) -> None:
    """Text, status, usage, and what was asked for."""
    async with open_gateway() as gateway, _client(gateway) as client:
        answer = await client.responses.create(
            model=MODEL, input="Hi", instructions="Be brief", max_output_tokens=100, metadata={"a": "b"}, store=False
        )
        (delivery,) = gateway.workers.client_deliveries()
        prompt = gateway.workers.tokenizer.decode(delivery.entry.token_ids)
        count = len(gateway.workers.ids()) + 1
    assert (answer.output_text, answer.status, answer.object, answer.id[:5]) == (TEXT, "completed", "response", "resp_")
    assert answer.usage is not None
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (len(delivery.entry.token_ids), count)
    assert answer.usage.total_tokens == answer.usage.input_tokens + count
    assert (answer.instructions, answer.max_output_tokens, answer.metadata) == ("Be brief", 100, {"a": "b"})
    assert "system\nBe brief" in prompt
    assert delivery.entry.sampling.max_tokens == 100


async def test_the_openai_client_gets_a_stream(open_gateway: OpenGateway) -> None:
    """Its own accumulator takes the events, which are numbered."""
    async with open_gateway() as gateway, _client(gateway) as client:
        async with client.responses.stream(model=MODEL, input=[{"role": "user", "content": "Hi"}]) as stream:
            events = [event async for event in stream]
            final = await stream.get_final_response()
        raw = [event async for event in await client.responses.create(model=MODEL, input="Hi", stream=True)]
    kinds = [event.type.removeprefix("response.") for event in raw]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert kinds[-4:] == ["output_text.done", "content_part.done", "output_item.done", "completed"]
    assert set(kinds[4:-4]) == {"output_text.delta"}
    assert [event.sequence_number for event in raw] == list(range(len(raw)))
    assert events[-1].type == "response.completed"
    assert (final.output_text, final.status) == (TEXT, "completed")
    assert final.usage is not None


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_that_was_cut_is_incomplete(open_gateway: OpenGateway, stream: bool) -> None:
    """Whole and streamed."""
    async with open_gateway() as gateway, _client(gateway) as client:
        asked: Any = {"model": MODEL, "input": "Hi", "max_output_tokens": 3}
        if stream:
            answer = [event async for event in await client.responses.create(**asked, stream=True)][-1].response
        else:
            answer = await client.responses.create(**asked)
    assert (answer.status, answer.output[0].status) == ("incomplete", "incomplete")
    assert answer.incomplete_details.reason == "max_output_tokens"


@pytest.mark.parametrize("stream", [False, True])
async def test_functions_are_called_and_their_results_go_back(
    with_tools: Tokenizer, open_gateway: OpenGateway, stream: bool
) -> None:
    """The output's items can be sent back as they are."""
    asked: Any = {"model": MODEL, "tools": TOOLS}
    async with open_gateway() as gateway, _client(gateway) as client:
        gateway.workers.text = f"Let me see.\n{CALL}\n{CALL}"
        if stream:
            async with client.responses.stream(**asked, input="Hi") as events:
                answer: Any = [event async for event in events][-1]
                answer = answer.response
        else:
            answer = await client.responses.create(**asked, input="Hi")
        text, *calls = answer.output
        results = [{"type": "function_call_output", "call_id": call.call_id, "output": "Rain"} for call in calls]
        told: Any = [{"role": "user", "content": "Hi"}, *answer.output, *results]
        await client.responses.create(**asked, input=told, max_output_tokens=1)
        prompt = gateway.workers.tokenizer.decode(gateway.workers.client_deliveries()[-1].entry.token_ids)
    assert answer.output_text == text.content[0].text == "Let me see."
    assert [(call.type, call.name) for call in calls] == [("function_call", "weather")] * 2
    assert [json.loads(call.arguments) for call in calls] == [{"city": "Rome", "days": 3}] * 2
    assert prompt.count("<|im_start|>assistant") == 2
    assert prompt.count('"arguments": {"city": "Rome", "days": 3}') == 2
    assert prompt.count("tool\nRain") == 2


async def test_a_stream_that_cannot_go_on_fails_as_a_response(open_gateway: OpenGateway) -> None:
    """With the error's code; before the stream begins it is a plain HTTP error."""

    async def stop_midway(workers: Workers, delivery: Any) -> None:
        await workers.report(delivery)
        await workers.tokens(delivery, 0, workers.ids()[:2])

    async with open_gateway(request_timeout=0.5) as gateway, _client(gateway) as client:
        gateway.workers.script = stop_midway
        events = [event async for event in await client.responses.create(model=MODEL, input="Hi", stream=True)]
        with pytest.raises(openai.BadRequestError, match="previous_response_id"):
            await client.responses.create(model=MODEL, input="Hi", previous_response_id="resp_1")
    last = events[-1]
    assert last.type == "response.failed"
    assert last.response.error is not None
    assert (last.response.status, last.response.error.code) == ("failed", "deadline_exceeded")


def test_all_fields_reach_the_workers(tokenizer: Tokenizer) -> None:
    """Nothing is lost between the body and the queue."""
    job = _read(
        tokenizer, temperature=0.5, top_p=0.9, max_output_tokens=7, stream=True, text={"format": INTEGER}, user="ann"
    )
    assert (job.sampling.temperature, job.sampling.top_p, job.sampling.max_tokens) == (0.5, 0.9, 7)
    assert (job.stream, job.user) == (True, "ann")
    assert job.sampling.grammar
    assert _read(tokenizer, text={"format": {"type": "json_object"}}).sampling.grammar
    harmless = {"store": False, "background": False, "truncation": "disabled", "include": [], "reasoning": {}}
    assert _read(tokenizer, **harmless, text={"format": {"type": "text"}}).sampling.grammar is None


def test_what_must_be_called(with_tools: Tokenizer) -> None:
    """As in a chat."""
    use = _read(with_tools, tools=TOOLS, tool_choice={"type": "function", "name": "now"}).tool_use
    assert use is not None
    assert (use.is_required, use.most_calls, [tool.function.name for tool in use.tools]) == (True, 1, ["now"])
    assert _read(with_tools, tools=TOOLS, tool_choice="none").tool_use is None


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"store": True}, "store"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"conversation": "c"}, "conversation"),
        ({"truncation": "auto"}, "truncation"),
        ({"reasoning": {"effort": "low"}}, "reasoning"),
        ({"include": ["message.output_text.logprobs"]}, "include"),
        ({"max_tokens": 5}, "max_tokens"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "text.format"),
        ({"text": {"format": {**INTEGER, "schema": {"type": "objekt"}}}}, "text.format.schema"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
        ({"input": []}, "input"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type"),
        ({"input": [{"type": "reasoning", "id": "r", "summary": []}]}, "input[0]"),
        ({"input": [{"type": "function_call", "call_id": "c", "name": "now"}]}, "input[0].arguments"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "name": "never"}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "name": ""}}, "tool_choice.name"),
        ({"max_output_tokens": 600}, "input"),
    ],
)
def test_what_cannot_be_honoured_is_named(with_tools: Tokenizer, fields: dict[str, Any], param: str) -> None:
    """The 400 says which field is at fault."""
    with pytest.raises(BadRequest) as caught:
        _sampling(_read(with_tools, **fields))
    assert caught.value.param == param
