"""What a client sees of a real mesh."""

from __future__ import annotations

import asyncio
import io
import json
from typing import Any

import aiohttp
import pytest
import torch
from openai import APIStatusError, AsyncOpenAI
from transformers import AutoModelForCausalLM, AutoTokenizer

from headrace.loadtest.local_mesh import LocalMesh
from headrace.models.locate import locate_model

MODEL = "smollm2"
NEAR_TIE = 1e-3


@pytest.fixture(scope="module")
def reference() -> tuple[Any, Any]:
    """`transformers`' own model and tokenizer."""
    folder = locate_model(MODEL).path
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


async def stream_text(client: AsyncOpenAI, prompt: str, **options: Any) -> str:
    """A streamed completion's whole text."""
    stream = await client.completions.create(model=MODEL, prompt=prompt, stream=True, **options)
    return "".join([chunk.choices[0].text async for chunk in stream if chunk.choices])


@pytest.mark.parametrize(
    "prompt", ["The mill by the river", "def add(a, b):\n", "水车在河边 🎉" * 40], ids=["en", "code", "zh"]
)
async def test_greedy_streams_are_those_of_transformers(client: AsyncOpenAI, reference: Any, prompt: str) -> None:
    """Through queue, prefill, handoff and decode, the tokens are the reference's (but at a near tie)."""
    model, tokenizer = reference
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    output = model.generate(
        ids, max_new_tokens=16, do_sample=False, pad_token_id=0, return_dict_in_generate=True, output_logits=True
    )
    new = output.sequences[0, ids.shape[1] :]
    text = await stream_text(client, prompt, max_tokens=16, temperature=0)
    if text != tokenizer.decode(new, skip_special_tokens=True):
        best = torch.cat(output.logits).topk(2).values
        assert (best[:, 0] - best[:, 1]).min() < NEAR_TIE, text


async def test_concurrent_streams_give_what_each_gives_alone(client: AsyncOpenAI) -> None:
    """Requests that share batches don't disturb each other, greedy or sampled with a seed."""
    prompts = [f"{number} reasons to visit" for number in range(8)]
    options = [{"temperature": 0} if n % 2 else {"temperature": 0.8, "top_p": 0.9, "seed": n} for n in range(8)]
    alone = [await stream_text(client, p, max_tokens=8, **o) for p, o in zip(prompts, options, strict=True)]
    jobs = [stream_text(client, p, max_tokens=8, **o) for p, o in zip(prompts, options, strict=True)]
    assert await asyncio.gather(*jobs) == alone


async def test_unicode_never_shows_a_broken_character(client: AsyncOpenAI) -> None:
    """Every streamed piece is whole, though characters span tokens."""
    options: dict[str, Any] = {"max_tokens": 24, "temperature": 0, "logit_bias": {"2": -100}}
    stream = await client.completions.create(model=MODEL, prompt="🎉👩‍💻🌊" * 6, stream=True, **options)
    pieces = [chunk.choices[0].text async for chunk in stream]
    assert not any("\ufffd" in piece for piece in pieces[:-1])


async def test_chat_reports_usage_and_log_probabilities(client: AsyncOpenAI) -> None:
    """A whole chat answer carries its usage, and the chosen token is among its likeliest when greedy."""
    answer = await client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Say hello."}],
        max_completion_tokens=6,
        temperature=0,
        logprobs=True,
        top_logprobs=3,
    )
    assert answer.usage is not None
    assert answer.usage.completion_tokens <= 6
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.choices[0].logprobs is not None
    for token in answer.choices[0].logprobs.content or []:
        assert token.token == token.top_logprobs[0].token


async def test_echo_scores_a_prompt_without_generating(client: AsyncOpenAI) -> None:
    """`max_tokens` 0 with echo and logprobs needs the prefill tier alone."""
    answer = await client.completions.create(model=MODEL, prompt="The sky is blue", echo=True, logprobs=1, max_tokens=0)
    scored = answer.choices[0].logprobs
    assert answer.choices[0].text == "The sky is blue"
    assert scored is not None
    assert scored.token_logprobs is not None
    assert scored.token_logprobs[0] is None
    assert all(value < 0 for value in scored.token_logprobs[1:])


async def test_several_choices_differ_and_repeat_under_one_seed(client: AsyncOpenAI) -> None:
    """`n` choices are drawn apart; the same seed draws them again."""
    options: dict[str, Any] = {"prompt": "Once upon a time", "n": 3, "max_tokens": 8, "seed": 5}
    first, second = [await client.completions.create(model=MODEL, **options) for _ in range(2)]
    texts = [choice.text for choice in first.choices]
    assert texts == [choice.text for choice in second.choices]
    assert len(set(texts)) > 1


async def test_a_stop_string_ends_the_text_before_it(client: AsyncOpenAI, mesh: LocalMesh) -> None:
    """The text stops before the string, and the workers stop too."""
    whole = await stream_text(client, "1, 2, 3, 4, 5,", max_tokens=24, temperature=0)
    stop = whole[6:9]
    text = await stream_text(client, "1, 2, 3, 4, 5,", max_tokens=400, temperature=0, stop=stop)
    assert text == whole[: whole.index(stop)]
    await mesh.until_no_page_is_used()


async def test_text_that_repeats_itself_is_drafted(client: AsyncOpenAI, mesh: LocalMesh) -> None:
    """Drafts stand, several tokens come at once, each has its log probability, and all pages come back. On a machine
    that stalls a request may go without: drafts rest where the clock says that they lose.
    """
    for _ in range(5):
        chunks = [
            chunk
            async for chunk in await client.completions.create(
                model=MODEL, prompt="red green blue " * 12, max_tokens=60, temperature=0, logprobs=1, stream=True
            )
        ]
        scored = [token for chunk in chunks if (scores := chunk.choices[0].logprobs) for token in scores.tokens or []]
        assert len(scored) == 60
        assert "".join(scored) == "".join(chunk.choices[0].text for chunk in chunks)
        if len(chunks) < 50:
            break
    assert len(chunks) < 50
    await mesh.until_no_page_is_used()
    drafters = ("ngram", "head")
    accepted = [await mesh.metrics(f"headrace_speculation_{name}_accepted_total") for name in drafters]
    assert sum(found["decode-0"] for found in accepted) > 10


async def test_a_client_that_leaves_frees_its_pages(mesh: LocalMesh, client: AsyncOpenAI) -> None:
    """Disconnecting mid-stream cancels the request in both tiers."""
    stream = await client.completions.create(
        model=MODEL, prompt="word " * 200, max_tokens=4000, stream=True, extra_body={"ignore_eos": True}
    )
    async for _ in stream:
        break
    await mesh.until_pages_are_used("decode-0")
    await stream.close()
    await mesh.until_no_page_is_used()


BAD_BODIES = [
    ({"prompt": list(range(1000)) * 9, "max_tokens": 5}, 400, None),
    ({"model": "gpt-nothing", "prompt": "x"}, 404, "model"),
    ({"prompt": "x", "temperature": "hot"}, 400, "temperature"),
    ({"prompt": "x", "suffix": "y"}, 400, "suffix"),
    ({"prompt": [1_000_000]}, 400, None),
]


@pytest.mark.parametrize(("body", "status", "param"), BAD_BODIES)
async def test_bad_fields_get_a_clear_error(
    mesh: LocalMesh, body: dict[str, Any], status: int, param: str | None
) -> None:
    """Each names the field in OpenAI's shape."""
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{mesh.url}/v1/completions", json={"model": MODEL, **body}) as response,
    ):
        error = (await response.json())["error"]
        assert response.status == status, error
        assert error["message"]
        assert param is None or error["param"] == param


async def test_bad_bodies_get_a_clear_error_and_the_mesh_goes_on(mesh: LocalMesh, client: AsyncOpenAI) -> None:
    """Broken JSON, no messages, 50 MB: refused, and the next request is served."""
    async with aiohttp.ClientSession() as session:
        for path, data, status in (
            ("completions", b'{"model": ', 400),
            ("chat/completions", json.dumps({"model": MODEL, "messages": []}).encode(), 400),
            ("completions", b'{"prompt": "' + b"x" * 50_000_000 + b'"}', 413),
        ):
            async with session.post(f"{mesh.url}/v1/{path}", data=io.BytesIO(data)) as response:
                assert response.status == status
                assert (await response.json())["error"]["message"]
    assert await stream_text(client, "Still", max_tokens=2, temperature=0)


async def test_an_unknown_model_raises_the_clients_own_error(client: AsyncOpenAI) -> None:
    """The official client understands our errors."""
    with pytest.raises(APIStatusError) as caught:
        await client.chat.completions.create(model="nobody", messages=[{"role": "user", "content": "x"}])
    assert caught.value.status_code == 404
