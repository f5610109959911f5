"""Every field of both endpoints is honoured or refused by name; none is ignored."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai.types import completion_create_params as completion_params
from openai.types.chat import completion_create_params as chat_params

from headrace.gateway.chat_request import ChatRequest, read_chat
from headrace.gateway.completion_request import CompletionRequest, read_completion
from headrace.gateway.errors import BadRequest, ContextLengthExceeded
from headrace.gateway.job import Job
from headrace.gateway.tokenizer import Tokenizer

CHAT = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
COMPLETION = {"model": "m", "prompt": "Hi"}


def _chat(tokenizer: Tokenizer, **fields: Any) -> Job:
    return read_chat(json.dumps({**CHAT, **fields}).encode(), tokenizer)[1]


def _completion(tokenizer: Tokenizer, **fields: Any) -> Job:
    return read_completion(json.dumps({**COMPLETION, **fields}).encode(), tokenizer)[1]


def test_every_field_of_openai_s_endpoints_is_known() -> None:
    """A field that OpenAI adds makes this fail until it is honoured or refused by name."""
    assert set(chat_params.CompletionCreateParamsBase.__annotations__) <= set(ChatRequest.model_fields)
    assert set(completion_params.CompletionCreateParamsBase.__annotations__) <= set(CompletionRequest.model_fields)


def test_null_means_absent_in_every_optional_field(tokenizer: Tokenizer) -> None:
    """As in OpenAI's API."""
    optional = {name: None for name, field in ChatRequest.model_fields.items() if not field.is_required()}
    assert _chat(tokenizer, **optional, seed=1) if "seed" not in optional else _chat(tokenizer, **optional)
    optional = {name: None for name, field in CompletionRequest.model_fields.items() if not field.is_required()}
    assert _completion(tokenizer, **optional).sampling.max_tokens == 16


def test_all_sampling_fields_reach_the_workers(tokenizer: Tokenizer) -> None:
    """Nothing is lost between the body and the queue."""
    job = _chat(
        tokenizer, temperature=0.5, top_p=0.9, max_completion_tokens=7, seed=-1, presence_penalty=1,
        frequency_penalty=-1, logit_bias={"5": 2}, top_k=3, min_p=0.1, repetition_penalty=1.2, stop_token_ids=[9],
        min_tokens=2, logprobs=True, top_logprobs=4, n=2, stop=["a", "b", "a"], stream=True,
        stream_options={"include_usage": True, "continuous_usage_stats": True},
    )  # fmt: skip
    sampling = job.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.9, 3, 0.1)
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) == (1, -1, 1.2)
    assert (sampling.max_tokens, sampling.min_tokens, sampling.logprobs, sampling.seed) == (7, 2, 4, 2**63 - 1)
    assert sampling.logit_bias == {5: 2.0}
    assert sampling.stop_token_ids == (2, 9)
    assert (job.n, job.stop, job.stream, job.include_usage, job.continuous_usage) == (2, ("a", "b"), True, True, True)


def test_ignore_eos_takes_only_the_model_s_own_end_tokens_away(tokenizer: Tokenizer) -> None:
    """The client's stop tokens stay."""
    assert _chat(tokenizer, ignore_eos=True, stop_token_ids=[9]).sampling.stop_token_ids == (9,)


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "json_object"}},
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "a", "description": "b", "schema": {"type": "array"}, "strict": True},
            }
        },
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
        {"response_format": {"type": "text"}, "structured_outputs": {"json": '{"type": "integer"}'}},
        {"structured_outputs": {"json": {"type": "integer"}}},
        {"structured_outputs": {"json_object": True}},
        {"structured_outputs": {"regex": "[0-9]+"}},
        {"structured_outputs": {"choice": ["a", "b"]}},
        {"structured_outputs": {"grammar": 'root ::= "a" root | "b"'}},
    ],
)
def test_each_form_of_an_answer_reaches_the_workers_as_a_grammar(tokenizer: Tokenizer, fields: dict[str, Any]) -> None:
    """On both endpoints."""
    chat = _chat(tokenizer, **fields).sampling
    assert chat.grammar
    assert _completion(tokenizer, **fields).sampling.grammar == chat.grammar


def test_defaults_are_openai_s(tokenizer: Tokenizer) -> None:
    """Temperature 1, no limit for a chat but the context, and a seed that differs from request to request."""
    first, second = _chat(tokenizer), _chat(tokenizer)
    assert first.sampling.temperature == 1
    assert first.sampling.seed != second.sampling.seed
    prompt = first.prompts[0]
    assert first.sampling_of(prompt, 0, 100).max_tokens == 100 - len(prompt.token_ids)


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [], "tool_choice": "none", "functions": [], "function_call": "none", "parallel_tool_calls": True},
        {"response_format": {"type": "text"}, "modalities": ["text"], "store": False, "service_tier": "auto"},
        {"user": "me", "metadata": {"a": "b"}, "safety_identifier": "x", "prompt_cache_key": "y"},
        {"top_p": 0, "top_k": -1, "logit_bias": {}, "stop": []},
        {"messages": [{"role": "developer", "content": [{"type": "text", "text": "Hi"}]}]},
        {"messages": [{"role": "assistant", "content": "a", "refusal": None, "tool_calls": [], "annotations": []}]},
    ],
)
def test_fields_that_ask_for_nothing_are_let_through(tokenizer: Tokenizer, fields: dict[str, Any]) -> None:
    """Clients send harmless values of fields that they don't use."""
    assert _chat(tokenizer, **fields)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"functions": [{}]}, "functions"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "text", "json_schema": {"name": "a"}}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.json_schema.name"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "objekt"}}}},
            "response_format.json_schema.schema",
        ),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"json_object": True, "regex": "a"}}, "structured_outputs"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json"),
        ({"structured_outputs": {"json": "[" * 65_000}}, "structured_outputs.json"),
        ({"structured_outputs": {"json": "1"}}, "structured_outputs.json"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"structured_outputs": {"choice": ["水" * 9000] * 9}}, "structured_outputs.choice"),
        ({"structured_outputs": {"grammar": "start: nothing"}}, "structured_outputs.grammar"),
        ({"structured_outputs": {"regex": "a" * 65_537}}, "structured_outputs.regex"),
        ({"structured_outputs": {"grammar": "root ::= " + '"a" ' * 3000}}, "structured_outputs.grammar"),
        ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}, "structured_outputs"),
        ({"guided_json": {"type": "object"}}, "guided_json"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"audio": {}}, "audio"),
        ({"prediction": {}}, "prediction"),
        ({"reasoning_effort": "low"}, "reasoning_effort"),
        ({"verbosity": "low"}, "verbosity"),
        ({"web_search_options": {}}, "web_search_options"),
        ({"store": True}, "store"),
        ({"service_tier": "flex"}, "service_tier"),
        ({"temperature": "0.5"}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"n": 0}, "n"),
        ({"n": 1.5}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 2**31 - 1}, "max_tokens"),
        ({"max_tokens": 5, "max_completion_tokens": 5}, "max_tokens"),
        ({"stop": [1]}, "stop[0]"),
        ({"stop": ""}, "stop"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stream": 1}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"stream": True, "stream_options": {"continuous_usage_stats": True}}, "stream_options.continuous_usage_stats"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logit_bias": {"x": 1}}, "logit_bias.x"),
        ({"logit_bias": {"49152": 1}}, "logit_bias"),
        ({"stop_token_ids": [49152]}, "stop_token_ids"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "function", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]}, "messages[0].tool_calls[0].id"),
        ({"messages": [{"role": "user", "content": "x", "name": "Ann"}]}, "messages"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "chat_template_kwargs"),
    ],
)  # fmt: skip
def test_a_chat_field_that_cannot_be_honoured_is_named(
    tokenizer: Tokenizer, fields: dict[str, Any], param: str
) -> None:
    """The 400 says which field is at fault."""
    with pytest.raises(BadRequest) as caught:
        _chat(tokenizer, **fields)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 2}, "best_of"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [[1], []]}, "prompt[1]"),
        ({"prompt": [49152]}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": ["a"] * 100, "n": 100}, "n"),
        ({"logprobs": True}, "logprobs"),
        ({"logprobs": 21}, "logprobs"),
        ({"messages": []}, "messages"),
    ],
)
def test_a_completion_field_that_cannot_be_honoured_is_named(
    tokenizer: Tokenizer, fields: dict[str, Any], param: str
) -> None:
    """The 400 says which field is at fault."""
    with pytest.raises(BadRequest) as caught:
        _completion(tokenizer, **fields)
    assert (caught.value.param or "").startswith(param)


def test_an_unknown_field_is_refused_with_the_nearest_known(tokenizer: Tokenizer) -> None:
    """A typing error does not pass as a default."""
    with pytest.raises(BadRequest, match="Did you mean 'temperature'") as caught:
        _chat(tokenizer, temprature=0)
    assert (caught.value.param, caught.value.code) == ("temprature", "unknown_field")


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b"[]", b"null", b"[" * 100_000])
def test_a_body_that_is_no_json_object_is_refused(tokenizer: Tokenizer, body: bytes) -> None:
    """Whatever the bytes are."""
    with pytest.raises(BadRequest) as caught:
        read_chat(body, tokenizer)
    assert caught.value.code == "invalid_json"


def test_a_large_prompt_of_wrong_tokens_is_refused_quickly(tokenizer: Tokenizer) -> None:
    """Only the first of a million faults is looked at."""
    with pytest.raises(BadRequest):
        _completion(tokenizer, prompt=[0.5] * 1_000_000)


@pytest.mark.parametrize(("prompt", "count"), [("Hi", 1), (["Hi", "there"], 2), ([1, 2], 1), ([[1, 2], [3]], 2)])
def test_prompts_come_in_four_forms(tokenizer: Tokenizer, prompt: Any, count: int) -> None:
    """Text, texts, tokens and lists of tokens."""
    job = _completion(tokenizer, prompt=prompt, n=3, best_of=3)
    assert len(job.prompts) == count
    assert job.choices == 3 * count


def test_a_prompt_over_the_context_is_refused_in_openai_s_words(tokenizer: Tokenizer) -> None:
    """Clients look for the code and for the numbers."""
    job = _completion(tokenizer, prompt=[1] * 90, max_tokens=20)
    with pytest.raises(ContextLengthExceeded, match=r"length is 100 tokens\. However, you requested 110"):
        job.sampling_of(job.prompts[0], 0, 100)
    chat = _chat(tokenizer)
    with pytest.raises(ContextLengthExceeded):
        chat.sampling_of(chat.prompts[0], 0, 5)


def test_choices_differ_in_their_seed_alone(tokenizer: Tokenizer) -> None:
    """The first answer of n is what n=1 gives."""
    job = _chat(tokenizer, seed=5, n=2)
    assert [job.sampling_of(job.prompts[0], number, 500).seed for number in (0, 1)] == [5, 6]
