"""Answers of a form that the client asked for, through a real mesh: whole, and the same whatever happens meanwhile."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import aiohttp
import jsonschema
import pytest
import pytest_asyncio
from openai import AsyncOpenAI, BadRequestError

from headrace import grammar
from headrace.models.locate import locate_model
from tests.e2e.test_moves import moved_to, recomputed, until_nothing_is_held, until_running
from tests.e2e.tiny_mesh import MODEL as TINY_MODEL
from tests.e2e.tiny_mesh import TinyMesh, tiny_mesh

MODEL = "smollm2"
SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 8},
        "people": {"type": "integer", "minimum": 0, "maximum": 999},
        "kind": {"enum": ["capital", "town"]},
    },
    "required": ["city", "people", "kind"],
    "additionalProperties": False,
}
FORMAT: Any = {"type": "json_schema", "json_schema": {"name": "place", "schema": SCHEMA, "strict": True}}
MESSAGES: Any = [{"role": "user", "content": "Tell me about a town, as JSON."}]


@pytest.mark.parametrize(
    "options", [{"temperature": 0}, {"temperature": 1.2, "top_p": 0.95, "seed": 5, "n": 2}], ids=str
)
async def test_an_answer_follows_its_schema_streamed_and_not(client: AsyncOpenAI, options: dict[str, Any]) -> None:
    """The same text both ways, each choice of its own."""
    asked = {"model": MODEL, "messages": MESSAGES, "max_tokens": 120, "response_format": FORMAT, **options}
    whole = await client.chat.completions.create(**asked)
    for choice in whole.choices:
        assert choice.finish_reason == "stop"
        jsonschema.validate(json.loads(choice.message.content or ""), SCHEMA)
    streamed = {choice.index: "" for choice in whole.choices}
    async for chunk in await client.chat.completions.create(stream=True, **asked):
        for part in chunk.choices:
            streamed[part.index] += part.delta.content or ""
    assert streamed == {choice.index: choice.message.content for choice in whole.choices}


async def test_every_other_form_is_followed(client: AsyncOpenAI) -> None:
    """Those of vLLM on both endpoints; logits of forbidden tokens reach nobody; a limit cuts the text."""
    options: dict[str, Any] = {"model": MODEL, "temperature": 0, "max_tokens": 60}

    async def complete(prompt: str = "The answer is", **form: Any) -> Any:
        extra = {"structured_outputs": form}
        return (await client.completions.create(prompt=prompt, logprobs=5, extra_body=extra, **options)).choices[0]

    assert (await complete(choice=["left", "right"])).text in ("left", "right")
    number = await complete(regex=r"[0-9]{3}-[0-9]{2}")
    assert len(number.text) == 6
    assert all(text in "0123456789-" for top in number.logprobs.top_logprobs[:6] for text in top)
    assert json.loads(
        (await complete(json={"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 2})).text
    )
    assert (await complete(grammar='root ::= "(" root ")" | "x"')).text.strip("()") == "x"
    chat = await client.chat.completions.create(messages=MESSAGES, response_format={"type": "json_object"}, **options)
    text = chat.choices[0].message.content or ""
    assert text.startswith("{")
    if chat.choices[0].finish_reason == "stop":
        json.loads(text)
    else:
        assert chat.choices[0].finish_reason == "length"


async def test_a_schema_that_cannot_be_followed_is_a_400(client: AsyncOpenAI) -> None:
    """Before anything is queued, with what is wrong."""
    bad: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "array", "uniqueItems": True}}}
    with pytest.raises(BadRequestError, match="uniqueItems") as caught:
        await client.chat.completions.create(model=MODEL, messages=MESSAGES, response_format=bad)
    assert caught.value.param == "response_format.json_schema.schema"


BODIES: list[dict[str, Any]] = [
    {"temperature": 0, "structured_outputs": {"regex": "([a-z]{1,4}=[0-9]{1,3};){60}"}},
    {"temperature": 1.0, "seed": 7, "structured_outputs": {"json": {"type": "array", "items": {"type": "integer"}}}},
    {"temperature": 1.3, "top_p": 0.9, "seed": 8, "structured_outputs": {"regex": "(up|down| ){200}"}},
    {"temperature": 0, "ignore_eos": True},
]


async def ask_all(mesh: TinyMesh) -> list[str]:
    """All at once."""
    async with aiohttp.ClientSession(mesh.url) as session:

        async def ask(number: int, fields: dict[str, Any]) -> str:
            body = {"model": TINY_MODEL, "prompt": [number + 50] * 9, "max_tokens": 70, **fields}
            async with session.post("/v1/completions", json=body) as response:
                answer = await response.json()
                assert response.status == 200, answer
                return str(answer["choices"][0]["text"])

        return await asyncio.gather(*[ask(number, fields) for number, fields in enumerate(BODIES)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where tiny engines find a tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(locate_model(MODEL).path / name, folder)
    return folder


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def undisturbed(redis_url: str, folder: Path) -> list[str]:
    """What one decode worker says, without drafts."""
    async with tiny_mesh(redis_url, folder, prefill_pages=[60], decode_pages=[60]) as mesh:
        texts = await ask_all(mesh)
    await until_nothing_is_held(mesh)
    assert all(pair.split("=")[1].isdigit() for pair in texts[0].split(";")[:-1])
    assert texts[1].startswith("[")
    assert set(texts[2].replace("up", "").replace("down", "")) <= set(" down")
    return texts


@pytest.mark.parametrize("kind", ["drafts", "moves", "moves with drafts", "failover", "colocated"])
async def test_the_text_is_the_same_whatever_happens_meanwhile(
    kind: str, redis_url: str, folder: Path, undisturbed: list[str]
) -> None:
    """A worker that takes a request over reads its tokens so far once more."""
    pages: dict[str, Any] = {"prefill_pages": [60], "decode_pages": [60] if kind == "drafts" else [60, 60]}
    if kind == "colocated":
        pages = {"colocate_pages": [90]}
    drain_timeout = 0.0 if kind == "failover" else 5.0
    async with tiny_mesh(redis_url, folder, **pages, speculates="drafts" in kind, drain_timeout=drain_timeout) as mesh:
        asking = asyncio.create_task(ask_all(mesh))
        if kind in ("moves", "moves with drafts", "failover"):
            await until_running(mesh, "decode-0", 1)
            await mesh.stop("decode-0")
            assert not asking.done()
        texts = await asking
        if kind == "failover":
            assert recomputed(mesh) > 0
        elif "moves" in kind:
            assert moved_to(mesh, "decode-1") > 0
            assert recomputed(mesh) == 0
        if kind == "drafts":
            assert mesh.speculators[0].counters.total.drafted > 0
    await until_nothing_is_held(mesh)
    assert texts == undisturbed


async def test_a_worker_that_cannot_follow_a_grammar_says_so(redis_url: str, tmp_path: Path) -> None:
    """The request fails, and the worker goes on."""
    async with (
        tiny_mesh(redis_url, tmp_path, prefill_pages=[60], decode_pages=[60]) as mesh,
        aiohttp.ClientSession(mesh.url) as session,
    ):
        body = {"model": TINY_MODEL, "prompt": [5], "max_tokens": 5, "structured_outputs": {"choice": ["a"]}}
        async with session.post("/v1/completions", json=body) as response:
            assert response.status == 400
            assert "does not suit structured output" in (await response.json())["error"]["message"]
        async with session.post("/v1/completions", json={**body, "structured_outputs": None}) as response:
            assert response.status == 200


async def test_a_grammar_that_grows_too_large_on_its_way_ends_its_request_alone(
    redis_url: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found by the decode worker, between tokens of others."""
    monkeypatch.setattr(grammar, "MAX_LEXER_STATES", 60)
    async with (
        tiny_mesh(redis_url, folder, prefill_pages=[60], decode_pages=[60]) as mesh,
        aiohttp.ClientSession(mesh.url) as session,
    ):

        async def ask(**fields: Any) -> tuple[int, dict[str, Any]]:
            body = {"model": TINY_MODEL, "prompt": [5, 6], "max_tokens": 70, "seed": 1, "ignore_eos": True, **fields}
            async with session.post("/v1/completions", json=body) as response:
                return response.status, await response.json()

        large = ask(structured_outputs={"regex": "((a|b)*a(a|b){18}){50}"})
        (status, body), (other, _) = await asyncio.gather(large, ask())
        assert (status, other) == (400, 200)
        assert "too many states" in body["error"]["message"]
    await until_nothing_is_held(mesh)
