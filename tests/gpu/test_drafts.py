"""Drafts on the chip change no token."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from headrace.engine.decode_batch import new_batch
from headrace.engine.engine import Engine, EngineConfig, PrefillChunk
from headrace.engine.step_timing import time_steps
from headrace.messages.request import SamplingParams
from tests.engine.every_third import EveryThird

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

PROMPTS = [[(7 * i + 11 * n) % 500 + 1 for i in range(length)] for n, length in enumerate((1, 16, 17, 150, 60))]
TOKENS = 40


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """A small random Llama in float16."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "vocab_size": 512}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 512}
    path: Path = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(LlamaConfig(**sizes, **heads, initializer_range=0.1)).save_pretrained(path)
    engine = Engine.load(EngineConfig(path, device="cuda", dtype="float16", max_num_seqs=32, kv_cache_bytes=2**26))
    engine.prepare_decode(lambda what, fraction: None, drafts=True)
    return engine


Output = list[tuple[int, float]]
"""Tokens, and by how much their log probabilities are above the next likely one's."""


def generate(
    engine: Engine, sampling: SamplingParams, known: list[Output] | None, constrained: Sequence[int] = ()
) -> tuple[list[Output], int]:
    """All prompts in one batch, and how many steps; with drafts from `known` outputs, some of them wrong.

    `constrained`: which follow a grammar.
    """
    batch, rng, steps = new_batch(engine), random.Random(1), 0
    outputs: list[Output] = []
    held = []
    for key, prompt in enumerate(PROMPTS):
        pages = engine.pool.allocate(engine.pool.pages_for(len(prompt) + TOKENS + 16))
        held.append(pages)
        matchers: list[Any] = [EveryThird() if key in constrained else None for _ in range(2)]
        output = engine.prefill([PrefillChunk(prompt, 0, len(prompt), pages, sampling, matcher=matchers[0])])[0]
        assert output.token is not None
        outputs.append([(output.token.token_id, 0.0)])
        batch.join(key, [*prompt, output.token.token_id], 1, pages, sampling, matchers[1])
    while len(batch):
        drafts = {}
        for key, tokens in enumerate(outputs):
            draft = ids(known[key][len(tokens) :][: rng.randrange(10)]) if known and len(tokens) < TOKENS else []
            if draft and rng.random() < 0.4:
                draft[rng.randrange(len(draft))] = 3
            if draft:
                drafts[key] = draft
        batch.start(drafts)
        steps += 1
        if known is None and batch.in_flight <= batch.lookahead:
            continue
        for key, token in batch.collect():
            top = [logprob for _, logprob in token.logprobs.top] if token.logprobs is not None else [0.0, 0.0]
            outputs[key].append((token.token_id, top[0] - top[1]))
            if len(outputs[key]) == TOKENS:
                batch.leave(key)
    for pages in held:
        engine.pool.release(pages)
    return [tokens[:TOKENS] for tokens in outputs], steps


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(max_tokens=99, temperature=0, logprobs=2),
        SamplingParams(max_tokens=99, temperature=0.7, top_k=5, top_p=0.9, seed=7, logprobs=2),
        SamplingParams(max_tokens=99, temperature=0.7, top_k=4, seed=8),
        SamplingParams(
            max_tokens=99, temperature=0.7, top_k=3, seed=3, repetition_penalty=1.2, frequency_penalty=0.3, logprobs=2
        ),
        SamplingParams(
            max_tokens=99,
            temperature=0.7,
            top_k=3,
            seed=5,
            logit_bias={9: 1.0},
            min_tokens=20,
            stop_token_ids=(4,),
            logprobs=2,
        ),
    ],
    ids=["greedy", "sampled", "sampled, no log probabilities", "penalized", "biased"],
)
def test_tokens_with_drafts_are_those_without(engine: Engine, sampling: SamplingParams) -> None:
    """Requests of different lengths, drafts right and wrong, in captured steps.

    Sums of few and of many rows are rounded differently, so where two tokens are as likely, either may come, and where
    a draw falls between two.
    """
    plain, _ = generate(engine, sampling, None)
    drafted, steps = generate(engine, sampling, plain)
    same = sum(ids(mine) == ids(theirs) for mine, theirs in zip(drafted, plain, strict=True))
    assert same >= 3, f"{same} of {len(plain)} are the same"
    assert steps < TOKENS - 8
    if sampling.temperature == 0:
        for mine, theirs in zip(drafted, plain, strict=True):
            first = next((at for at, (a, b) in enumerate(zip(mine, theirs, strict=True)) if a[0] != b[0]), None)
            assert first is None or theirs[first][1] < 0.02, "another token came, and no second one was as likely"


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_requests_with_a_grammar_follow_it_beside_others(engine: Engine, temperature: float) -> None:
    """A step ahead and with drafts; those without a grammar say what they say alone."""
    sampling = SamplingParams(max_tokens=99, temperature=temperature, top_k=5, seed=7, logprobs=2)
    alone, _ = generate(engine, sampling, None)
    plain, _ = generate(engine, sampling, None, (0, 2, 4))
    drafted, steps = generate(engine, sampling, plain, (0, 2, 4))
    assert steps < TOKENS - 8
    for outputs in (plain, drafted):
        for key in (0, 2, 4):
            assert all(token % 3 == place % 3 for place, token in enumerate(ids(outputs[key])))
    assert ids(plain[1]) == ids(alone[1])
    same = sum(ids(mine) == ids(theirs) for mine, theirs in zip(drafted, plain, strict=True))
    assert same >= 3, f"{same} of {len(plain)} are the same"


def ids(tokens: list[tuple[int, float]]) -> list[int]:
    """Without their leads."""
    return [token for token, _ in tokens]


def test_all_captured_sizes_are_timed(engine: Engine) -> None:
    """Without drafts up to the largest batch, with drafts up to 256 rows."""
    seconds = time_steps(engine)
    assert max(seconds.plain) == 32
    assert max(seconds.drafted) == 256
    assert engine.pool.num_in_use == 0
