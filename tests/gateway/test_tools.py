"""Tools: how a model is told of them, bound to them, and how its calls are read, however its text is cut."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any

import jsonschema
import numpy as np
import pytest
from openai import AsyncOpenAI

from headrace.gateway.chat_request import read_chat
from headrace.gateway.errors import BadRequest
from headrace.gateway.job import Job
from headrace.gateway.tokenizer import Tokenizer
from headrace.gateway.tools import MAX_HEAD, CallReader, Read, Tool, joined, read_tool_use
from tests.gateway.conftest import MODEL, OpenGateway

WEATHER = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "weather", "description": "Look out", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "now"}},
]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome", "days": 3}}\n</tool_call>'
MESSAGES = [{"role": "user", "content": "Hi"}]


def ask(tokenizer: Tokenizer, **fields: Any) -> Job:
    """A chat with both tools."""
    body = {"model": "m", "messages": MESSAGES, "tools": TOOLS, **fields}
    return read_chat(json.dumps(body).encode(), tokenizer)[1]


def read(pieces: Sequence[str], most_calls: int | None = None) -> tuple[str, list[tuple[str, str]]]:
    """Content and (name, arguments) of all calls."""
    reader, whole = CallReader(most_calls), Read()
    for number, piece in enumerate(pieces):
        new = reader.push(piece, ended=number == len(pieces) - 1)
        whole.pieces += new.pieces
    calls = joined(whole.calls)
    assert len({call["id"] for call in calls}) == len(calls) == reader.num_calls
    return whole.content, [(call["function"]["name"], call["function"]["arguments"]) for call in calls]


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("Just text, 1 < 2.", "Just text, 1 < 2.", []),
        ("  two\n\nlines \n", "  two\n\nlines \n", []),
        (CALL, "", [("weather", '{"city": "Rome", "days": 3}')]),
        (f"Let me see.\n{CALL}\n", "Let me see.", [("weather", '{"city": "Rome", "days": 3}')]),
        (f"{CALL}\n{CALL}", "", [("weather", '{"city": "Rome", "days": 3}')] * 2),
        ('<tool_call>{"name":"now","arguments":{}}</tool_call>', "", [("now", "{}")]),
        (
            '<tool_call>\n{"name": "now", "arguments": {"a": {"b": "} <tool</tool_ }}"}}  }\n</tool_call> ok',
            " ok",
            [("now", '{"a": {"b": "} <tool</tool_ }}"}}')],
        ),
        ("<tool_call>nothing of the kind</tool_call>", "<tool_call>nothing of the kind</tool_call>", []),
        ('<tool_call>\n{"name": "now"', '<tool_call>\n{"name": "now"', []),
        ('<tool_call>\n{"name": "now", "arguments": {"a": 1', "", [("now", '{"a": 1')]),
        ('<tool_call>\n{"name": "now", "arguments": {"a": 1}}', "", [("now", '{"a": 1}')]),
        ("<tool_call>" + "x" * (MAX_HEAD + 1), "<tool_call>" + "x" * (MAX_HEAD + 1), []),
        ("a <tool_cal", "a <tool_cal", []),
    ],
)
def test_calls_are_read_however_the_text_is_cut(text: str, content: str, calls: list[tuple[str, str]]) -> None:
    """In one piece, in two at every place, and letter by letter."""
    for cut in range(len(text) + 1):
        assert read([text[:cut], text[cut:]]) == (content, calls), cut
    assert read([*text, ""]) == (content, calls)


def test_arguments_are_told_as_they_come() -> None:
    """A client need not wait for the end of a call."""
    reader = CallReader(None)
    reader.push('<tool_call>\n{"name": "now", "arguments": {"text": "', ended=False)
    assert reader.push("a long", ended=False).calls == [{"index": 0, "function": {"arguments": "a long"}}]


def test_no_more_calls_are_read_than_are_allowed() -> None:
    """`parallel_tool_calls` false."""
    assert read([f"{CALL}\n{CALL} and text"], most_calls=1) == ("", [("weather", '{"city": "Rome", "days": 3}')])


def walk(tokenizer: Tokenizer, sampling: Any, seed: int) -> str:
    """Tokens at random that the request's grammar allows, the end as soon as it may come."""
    matcher, chance, output = tokenizer.grammars.matcher(sampling), random.Random(seed), list[int]()
    assert matcher is not None
    matcher.start([])
    masks = np.zeros((1, 1536), np.int32)
    for _ in range(400):
        matcher.fill(masks, [])
        choices = np.flatnonzero(np.unpackbits(masks.view(np.uint8), bitorder="little"))
        if 2 in choices:
            break
        output.append(int(choices[chance.randrange(len(choices))]))
        matcher.advance(output[-1:])
    return b"".join(map(tokenizer.vocabulary.bytes_of, output)).decode()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_an_answer_that_must_call_is_a_call(with_tools: Tokenizer, choice: Any, seed: int) -> None:
    """Whatever the model would like; arguments follow the schema."""
    tools = TOOLS if isinstance(choice, dict) else TOOLS[:1]
    content, calls = read([walk(with_tools, ask(with_tools, tools=tools, tool_choice=choice).sampling, seed)])
    assert content == ""
    ((name, arguments),) = calls
    assert name == "weather"
    jsonschema.validate(json.loads(arguments), WEATHER)


def test_tools_and_their_results_reach_the_template(with_tools: Tokenizer) -> None:
    """Arguments as an object, as templates expect them."""
    function = {"name": "weather", "arguments": '{"city": "Oslo"}'}
    told = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "type": "function", "function": function}]},
        {"role": "tool", "tool_call_id": "c", "content": "Rain"},
    ]
    text = ask(with_tools, messages=told).prompts[0].text
    assert text is not None
    assert '{"type": "function", "function": {"name": "now"}}' in text
    assert '{"name": "weather", "arguments": {"city": "Oslo"}}' in text
    assert "<|im_start|>tool\nRain" in text
    assert "Look out" not in (ask(with_tools, tool_choice="none").prompts[0].text or "")


@pytest.mark.parametrize("fields", [{}, {"tool_choice": "auto"}, {"tool_choice": "auto", "parallel_tool_calls": False}])
def test_a_model_that_may_call_is_not_bound(with_tools: Tokenizer, fields: dict[str, Any]) -> None:
    """Its calls are read where it makes some."""
    job = ask(with_tools, **fields)
    assert job.sampling.grammar is None
    assert job.tool_use is not None
    assert ask(with_tools, tool_choice="none").tool_use is None


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [], "tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "nothing"}}}, "tool_choice"),
        ({"tools": [TOOLS[0], TOOLS[0]]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        (
            {
                "tools": [{"type": "function", "function": {"name": "a", "parameters": {"type": "objekt"}}}],
                "tool_choice": "required",
            },
            "tools",
        ),
        ({"response_format": {"type": "json_object"}}, "tools"),
        ({"messages": [{"role": "assistant", "content": None}]}, "messages[0].content"),
        ({"functions": [{}]}, "functions"),
    ],
)
def test_what_cannot_be_honoured_is_named(with_tools: Tokenizer, fields: dict[str, Any], param: str) -> None:
    """The 400 says which field is at fault."""
    with pytest.raises(BadRequest) as caught:
        ask(with_tools, **fields)
    assert caught.value.param is not None
    assert caught.value.param.startswith(param)


def test_a_template_without_tools_refuses_them(tokenizer: Tokenizer) -> None:
    """The built-in model's: the model would not know."""
    for fields in ({}, {"tools": None, "messages": [{"role": "tool", "content": "x"}]}):
        with pytest.raises(BadRequest, match="no place for tools"):
            ask(tokenizer, **fields)


async def test_the_openai_client_gets_calls_whole_and_streamed(
    with_tools: Tokenizer, open_gateway: OpenGateway
) -> None:
    """With the text before them, and a finish reason of their own."""
    asked: Any = {"model": MODEL, "messages": MESSAGES, "tools": TOOLS}
    async with open_gateway() as gateway, AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="none") as client:
        gateway.workers.text = f"Let me see.\n{CALL}\n{CALL}"
        whole = (await client.chat.completions.create(**asked)).choices[0]
        content, started, arguments, reasons = "", [], ["", ""], []
        async for chunk in await client.chat.completions.create(stream=True, **asked):
            (choice,) = chunk.choices
            content += choice.delta.content or ""
            reasons.append(choice.finish_reason)
            for call in choice.delta.tool_calls or ():
                assert call.function is not None
                started += [(call.id, call.function.name)] if call.id else []
                arguments[call.index] += call.function.arguments or ""
        gateway.workers.text = CALL
        alone = (await client.chat.completions.create(**asked)).choices[0]
    assert (whole.finish_reason, whole.message.content) == ("tool_calls", "Let me see.")
    assert [json.loads(call.function.arguments) for call in whole.message.tool_calls or ()] == [  # type: ignore[union-attr]
        {"city": "Rome", "days": 3}
    ] * 2
    assert (content, reasons[-1]) == ("Let me see.", "tool_calls")
    assert [name for _, name in started] == ["weather", "weather"]
    assert [json.loads(own) for own in arguments] == [{"city": "Rome", "days": 3}] * 2
    assert alone.message.content is None


def test_a_named_tool_is_the_only_one_left() -> None:
    """And is called once."""
    tools = [Tool.model_validate(tool) for tool in TOOLS]
    use = read_tool_use(tools, None, True)
    assert use is not None
    assert (len(use.tools), use.is_required, use.most_calls) == (2, False, None)
