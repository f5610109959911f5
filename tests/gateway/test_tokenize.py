"""What needs no worker: tokens of texts and chats, text of tokens, and how much there is to do."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from headrace.gateway.errors import BadRequest
from headrace.gateway.tokenize_request import read_detokenize, read_tokenize
from headrace.gateway.tokenizer import Tokenizer
from tests.gateway.conftest import MODEL, OpenGateway
from tests.gateway.workers import keep_silent

MESSAGES = [{"role": "user", "content": "Grüße, 🦊!"}]


def _tokenize(tokenizer: Tokenizer, **fields: Any) -> dict[str, Any]:
    return read_tokenize(json.dumps(fields).encode(), tokenizer)[1]


async def test_text_comes_back_from_its_tokens(open_gateway: OpenGateway) -> None:
    """With the fields of vLLM, and without a single worker."""
    async with open_gateway(prefill=False, decode=0) as gateway:
        body = {"prompt": "Grüße, 🦊!", "model": MODEL, "return_token_strs": True}
        status, answer = await gateway.post("/tokenize", body)
        assert status == 200
        assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
        assert answer["tokens"] == gateway.workers.ids("Grüße, 🦊!")
        assert answer["max_model_len"] > 512
        assert await gateway.post("/detokenize", {"tokens": answer["tokens"]}) == (200, {"prompt": "Grüße, 🦊!"})
        assert (await gateway.post("/tokenize", {"prompt": "", "model": "other"}))[0] == 404
        assert (await gateway.post("/detokenize", {"tokens": [-1]}))[1]["error"]["param"] == "tokens[0]"


async def test_a_chat_has_the_tokens_that_its_answer_is_charged(open_gateway: OpenGateway) -> None:
    """And the length is what the mesh has room for."""
    async with open_gateway() as gateway:
        _, answer = await gateway.post("/v1/chat/completions", {"model": MODEL, "messages": MESSAGES})
        _, tokens = await gateway.post("/tokenize", {"messages": MESSAGES})
        (delivery,) = gateway.workers.client_deliveries()
    assert tokens["tokens"] == delivery.entry.token_ids
    assert tokens["count"] == answer["usage"]["prompt_tokens"]
    assert (tokens["max_model_len"], tokens["token_strs"]) == (512, None)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "prompt"),
        ({"prompt": "a", "messages": MESSAGES}, "prompt"),
        ({"prompt": "a", "tools": []}, "tools"),
        ({"messages": []}, "messages"),
        ({"messages": MESSAGES, "chat_template": "x"}, "chat_template"),
        ({"messages": MESSAGES, "continue_final_message": True}, "continue_final_message"),
        ({"messages": MESSAGES, "add_generation_prompt": False}, "add_generation_prompt"),
        ({"messages": MESSAGES, "chat_template_kwargs": {"x": 1}}, "chat_template_kwargs"),
        ({"prompt": "a", "add_special_token": True}, "add_special_token"),
    ],
)
def test_what_cannot_be_honoured_is_named(tokenizer: Tokenizer, fields: dict[str, Any], param: str) -> None:
    """As at every endpoint."""
    with pytest.raises(BadRequest) as caught:
        _tokenize(tokenizer, **fields)
    assert caught.value.param == param


def test_special_tokens_are_text_like_any_other(tokenizer: Tokenizer) -> None:
    """There and back."""
    found = _tokenize(tokenizer, prompt="<|im_start|>user", add_special_tokens=False, return_token_strs=True)
    assert found["token_strs"][0] == "<|im_start|>"
    body = json.dumps({"tokens": found["tokens"]}).encode()
    assert read_detokenize(body, tokenizer)[1] == {"prompt": "<|im_start|>user"}
    with pytest.raises(BadRequest, match="vocabulary"):
        read_detokenize(b'{"tokens": [49152]}', tokenizer)


async def test_load_counts_what_is_under_way(open_gateway: OpenGateway) -> None:
    """Here, and as each tier has published it."""
    async with open_gateway() as gateway:
        gateway.workers.script = keep_silent
        gateway.workers.decode[0].registry.update_stats({"requests_waiting": 2.0, "requests_running": 3.0})
        asked = asyncio.create_task(gateway.post("/v1/completions", {"model": MODEL, "prompt": ["a", "b"]}))
        await gateway.workers.until(lambda: len(gateway.workers.client_deliveries()) == 2)
        decode = {"members": 1, "requests_waiting": 2, "requests_running": 3}
        async with asyncio.timeout(10):
            while True:
                async with gateway.http.get(f"{gateway.url}/load") as response:
                    load = await response.json()
                if load["tiers"]["decode"] == decode and load["server_load"] == 2:
                    break
                await asyncio.sleep(0.02)
        asked.cancel()
    assert [load["tiers"][tier]["members"] for tier in ("gateway", "prefill")] == [1, 1]


async def test_an_unknown_path_is_told_what_there_is(open_gateway: OpenGateway) -> None:
    """In OpenAI's form."""
    async with open_gateway(prefill=False, decode=0) as gateway:
        status, answer = await gateway.post("/v1/embeddings", {})
    assert (status, answer["error"]["code"]) == (404, "unknown_url")
    assert "/v1/chat/completions" in answer["error"]["message"]


async def test_the_helpers_are_guarded_and_counted(open_gateway: OpenGateway) -> None:
    """A key, a deadline, a line in the metrics."""
    async with open_gateway(prefill=False, decode=0, api_key="secret") as gateway:
        assert (await gateway.post("/tokenize", {"prompt": "a"}))[0] == 401
        key = {"Authorization": "Bearer secret"}
        assert (await gateway.post("/tokenize", {"prompt": "a"}, headers=key))[0] == 200
        late = {**key, "X-Request-Timeout": "-1"}
        _, refused = await gateway.post("/tokenize", {"prompt": "a"}, headers=late)
        assert refused["error"]["param"] == "X-Request-Timeout"
        async with gateway.http.get(f"{gateway.url}/metrics", headers=key) as response:
            text = await response.text()
    assert 'headrace_gateway_requests_total{endpoint="/tokenize",outcome="ok"} 1.0' in text
