"""Prefill, decode batches and start-up, on the built-in model."""

from __future__ import annotations

from pathlib import Path

import pytest

from headrace.engine.base import Ready
from headrace.engine.decode_batch import DecodeBatch
from headrace.engine.engine import Engine, EngineConfig, PrefillChunk
from headrace.engine.errors import EngineError
from headrace.messages.request import SamplingParams
from tests.engine.conftest import generate, ids, prefill

PROMPT = list(range(2000, 2040))
GREEDY = SamplingParams(max_tokens=8, temperature=0)


def test_every_layer_is_reported_once_and_in_order(fused_engine: Engine) -> None:
    """The pages of layer l may leave when `on_layer(l, None)` is called."""
    pages = fused_engine.pool.allocate(3)
    layers: list[int] = []
    written: list[bool] = []

    def on_layer(layer: int, ready: Ready | None) -> None:
        layers.append(layer)
        written.append(any(fused_engine.cache.read_pages(layer, pages)))

    fused_engine.prefill([PrefillChunk(PROMPT, 0, 40, pages, GREEDY)], on_layer)
    assert layers == list(range(fused_engine.layout.num_layers))
    assert all(written)
    fused_engine.pool.release(pages)


def test_chunks_of_several_requests_share_a_forward(fused_engine: Engine) -> None:
    """A finished prompt, an unfinished one and one that wants no token."""
    pages = [fused_engine.pool.allocate(3) for _ in range(3)]
    nothing = SamplingParams(max_tokens=0, temperature=0, prompt_logprobs=1)
    outputs = fused_engine.prefill(
        [
            PrefillChunk(PROMPT, 0, 40, pages[0], GREEDY),
            PrefillChunk(PROMPT, 0, 25, pages[1], GREEDY),
            PrefillChunk(PROMPT, 0, 40, pages[2], nothing),
        ]
    )
    alone, _ = prefill(fused_engine, PROMPT, pages[0], GREEDY, chunk=40)
    assert outputs[0].token == alone
    assert outputs[1].token is None
    assert outputs[2].token is None
    assert [entry.token_id for entry in outputs[2].prompt_logprobs] == PROMPT[1:]
    for held in pages:
        fused_engine.pool.release(held)


def test_sampled_tokens_do_not_depend_on_the_batch(fused_engine: Engine) -> None:
    """The same request alone, and beside three others of other lengths and kinds."""
    drawn = SamplingParams(max_tokens=8, temperature=0.9, top_p=0.95, seed=42)
    others = [GREEDY, SamplingParams(max_tokens=8, seed=7), SamplingParams(max_tokens=8, temperature=0.5, top_k=9)]
    (alone,) = generate(fused_engine, [PROMPT], [drawn], 8)
    together = generate(fused_engine, [PROMPT[:5], PROMPT[:33], PROMPT, PROMPT[2:]], [*others[:2], drawn, others[2]], 8)
    assert ids(together[2]) == ids(alone)


def test_a_request_that_moves_goes_on_with_the_same_tokens(fused_engine: Engine) -> None:
    """After five tokens the prompt and output are prefilled anew, as after a worker's death."""
    sampling = SamplingParams(max_tokens=8, temperature=1.0, seed=3, presence_penalty=0.5, repetition_penalty=1.1)
    (whole,) = generate(fused_engine, [PROMPT], [sampling], 8)
    so_far = [*PROMPT, *ids(whole)[:5]]
    pages = fused_engine.pool.allocate(fused_engine.pool.pages_for(len(so_far) + 3))
    (output,) = fused_engine.prefill([PrefillChunk(so_far, 0, len(so_far), pages, sampling, generated=5)])
    assert output.token is not None
    batch: DecodeBatch[str] = DecodeBatch(fused_engine)
    batch.join("moved", [*so_far, output.token.token_id], 6, pages, sampling)
    rest = [output.token, *(token for _ in range(2) for _, token in batch.step())]
    assert ids(rest) == ids(whole)[5:]
    fused_engine.pool.release(pages)


def test_requests_join_and_leave_a_running_batch_without_harm_to_others(fused_engine: Engine) -> None:
    """Three requests; the first leaves after two steps, a late one takes part, pages come one by one."""
    prompts = {"a": PROMPT, "b": PROMPT[:16], "c": PROMPT[5:], "late": PROMPT[9:]}
    expected = dict(zip(prompts, generate(fused_engine, list(prompts.values()), [GREEDY] * 4, 8), strict=True))
    pool, batch = fused_engine.pool, DecodeBatch[str](fused_engine)
    pages: dict[str, list[int]] = {}
    got: dict[str, list[int]] = {}

    def join(key: str) -> None:
        prompt = prompts[key]
        pages[key] = pool.allocate(pool.pages_for(len(prompt)))
        token, _ = prefill(fused_engine, prompt, pages[key], GREEDY, chunk=64)
        got[key] = [token.token_id]
        batch.join(key, [*prompt, token.token_id], 1, pages[key], GREEDY)

    for key in ("a", "b", "c"):
        join(key)
    for step in range(7):
        if step == 2:
            batch.leave("a")
        if step == 3:
            join("late")
        for key in got:
            length = len(prompts[key]) + len(got[key])
            if pool.pages_for(length) > len(pages[key]) and not (key == "a" and step >= 2):
                extra = pool.allocate(1)
                pages[key] += extra
                batch.add_pages(key, extra)
        for key, token in batch.step():
            got[key].append(token.token_id)
    assert len(got["a"]) == 3
    assert len(got["late"]) == 5
    for key, tokens in got.items():
        assert tokens == ids(expected[key])[: len(tokens)], key
    for held in pages.values():
        pool.release(held)
    pool.check_integrity()


def test_pages_that_travel_to_another_engine_give_the_same_tokens(fused_engine: Engine) -> None:
    """Prefill, copy layer by layer as bytes into other pages, decode from those."""
    (expected,) = generate(fused_engine, [PROMPT], [GREEDY], 8)
    pool, cache = fused_engine.pool, fused_engine.cache
    source, target = pool.allocate(3), pool.allocate(3)[::-1]
    first, _ = prefill(fused_engine, PROMPT, source, GREEDY, chunk=17)
    for layer in range(fused_engine.layout.num_layers):
        cache.write_pages(layer, target, cache.read_pages(layer, source))
        cache.write_pages(layer, source, memoryview(bytes(3 * cache.page_bytes)))
    batch: DecodeBatch[int] = DecodeBatch(fused_engine)
    batch.join(0, [*PROMPT, first.token_id], 1, target, GREEDY)
    tokens = [first.token_id, *(token.token_id for _ in range(7) for _, token in batch.step())]
    assert tokens == ids(expected)
    pool.release(source + target)


def test_a_cache_too_small_for_one_request_says_which_flag_to_change(built_in_folder: Path) -> None:
    """1 MiB is less than 8,192 tokens need."""
    with pytest.raises(EngineError, match=r"--kv-cache-memory-bytes \d+ or lower --max-model-len"):
        Engine.load(EngineConfig(built_in_folder, device="cpu", kv_cache_bytes=2**20, cpu_threads=1))
