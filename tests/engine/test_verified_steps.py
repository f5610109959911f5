"""Decode steps with drafts on the built-in model give the tokens of steps without."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from headrace.engine.decode_batch import DecodeBatch
from headrace.engine.engine import Engine
from headrace.engine.sampler import SampledToken
from headrace.messages.request import SamplingParams
from tests.engine.conftest import generate, ids, load, prefill
from tests.engine.test_families import FUSED, GENERAL, save

PROMPT = list(range(2000, 2040))
TOKENS = 24


def generate_drafted(
    engine: Engine, prompts: Sequence[Sequence[int]], sampling: Sequence[SamplingParams], known: list[list[int]]
) -> tuple[list[list[SampledToken]], int]:
    """Decode all in one batch with drafts of 0 to 6 tokens that go wrong here and there; returns outputs and steps.

    `known` is the output to come. Pages are given as needed, and what a refused draft leaves is taken back.
    """
    pool, generator = engine.pool, random.Random(1)
    batch: DecodeBatch[int] = DecodeBatch(engine)
    pages = [pool.allocate(pool.pages_for(len(prompt))) for prompt in prompts]
    outputs = []
    for key, prompt in enumerate(prompts):
        first, _ = prefill(engine, prompt, pages[key], sampling[key], chunk=64)
        outputs.append([first])
        batch.join(key, [*prompt, first.token_id], 1, pages[key], sampling[key])
    steps = 0
    running = set(range(len(prompts)))
    while running:
        drafts = {}
        for key in running:
            draft = known[key][len(outputs[key]) :][: min(generator.randrange(7), TOKENS - len(outputs[key]) - 1)]
            if draft and generator.random() < 0.5:
                draft[generator.randrange(len(draft))] = 77
            if draft:
                drafts[key] = draft
            needed = pool.pages_for(len(prompts[key]) + len(outputs[key]) + len(draft))
            if needed > len(pages[key]):
                new = pool.allocate(needed - len(pages[key]))
                batch.add_pages(key, new)
                pages[key] += new
        batch.start(drafts)
        steps += 1
        for key, token in batch.collect():
            outputs[key].append(token)
        for key in list(running):
            kept = pool.pages_for(len(prompts[key]) + len(outputs[key]))
            if kept < len(pages[key]):
                batch.keep_pages(key, kept)
                pool.release(pages[key][kept:])
                del pages[key][kept:]
            if len(outputs[key]) == TOKENS:
                batch.leave(key)
                running.remove(key)
    for held in pages:
        pool.release(held)
    pool.check_integrity()
    return outputs, steps


def test_steps_with_drafts_give_the_same_tokens(fused_engine: Engine) -> None:
    """Four requests of different lengths and kinds, drafts of different lengths in one step, right and wrong ones."""
    prompts = [PROMPT, PROMPT[:5], PROMPT[3:36], PROMPT[7:]]
    sampling = [
        SamplingParams(max_tokens=TOKENS, temperature=0),
        SamplingParams(max_tokens=TOKENS, temperature=0.9, top_p=0.95, seed=4, logprobs=2),
        SamplingParams(max_tokens=TOKENS, temperature=0, repetition_penalty=1.2, frequency_penalty=0.4, logprobs=0),
        SamplingParams(max_tokens=TOKENS, temperature=1.1, top_k=20, seed=9, presence_penalty=0.6, min_tokens=9),
    ]
    plain = generate(fused_engine, prompts, sampling, TOKENS)
    drafted, steps = generate_drafted(fused_engine, prompts, sampling, [ids(tokens) for tokens in plain])
    assert [ids(tokens) for tokens in drafted] == [ids(tokens) for tokens in plain]
    assert steps < TOKENS - 4
    for mine, theirs in zip(plain, drafted, strict=True):
        for one, other in zip(mine, theirs, strict=True):
            assert (one.logprobs is None) == (other.logprobs is None)
            if one.logprobs is not None and other.logprobs is not None:
                assert abs(one.logprobs.logprob - other.logprobs.logprob) < 1e-4
                assert [t for t, _ in one.logprobs.top] == [t for t, _ in other.logprobs.top]


@pytest.mark.parametrize("name", ["qwen3", "gemma", "gpt neox"])
def test_every_way_to_run_a_model_verifies_drafts(name: str, tmp_path: Path) -> None:
    """Families of the fused path, and one of the general path."""
    save(tmp_path, *(FUSED | GENERAL)[name])
    engine = load(tmp_path, "auto", max_model_len=128)
    prompts = [list(range(20, 60)), list(range(30, 41))]
    sampling = [SamplingParams(max_tokens=TOKENS, temperature=0), SamplingParams(max_tokens=TOKENS, top_k=5, seed=3)]
    plain = [ids(tokens) for tokens in generate(engine, prompts, sampling, TOKENS)]
    drafted, steps = generate_drafted(engine, prompts, sampling, plain)
    assert [ids(tokens) for tokens in drafted] == plain
    assert steps < TOKENS - 4
