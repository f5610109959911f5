"""Prompts and decode steps at the same time, on two threads and two streams of one GPU, over one engine and one pool.

Batches are the same in all runs, so every token has to be, too.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from headrace.engine.decode_batch import RunningBatch, new_batch
from headrace.engine.device import use_urgent_stream
from headrace.engine.engine import Engine, EngineConfig, PrefillChunk
from headrace.engine.page_pool import PagePool
from headrace.loadtest.shapes import SMOLLM2_135M, model_folder
from headrace.messages.request import SamplingParams

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

CHUNK, STEPS = 256, 40
GREEDY = SamplingParams(max_tokens=STEPS, temperature=0)
DRAWN = SamplingParams(max_tokens=STEPS, temperature=0.8, top_p=0.9, seed=3, repetition_penalty=1.1)
PROMPTS = [([(31 * n + 7 * i) % 40000 for i in range(40 + 97 * n)], DRAWN if n % 2 else GREEDY) for n in range(12)]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """SmolLM2's shape with random weights, and hardly more pages than two prompts need."""
    folder = model_folder(SMOLLM2_135M, tmp_path_factory.mktemp("shape"))
    torch.manual_seed(0)
    config = EngineConfig(folder, max_model_len=2048, max_num_seqs=16, random_weights=True, kv_cache_bytes=2**28)
    engine = Engine.load(config)
    engine.warm_up()
    engine.prepare_decode(lambda what, fraction: None)
    return engine


@pytest.fixture
def threads(engine: Engine) -> Iterator[tuple[ThreadPoolExecutor, ThreadPoolExecutor]]:
    """For prompts, and for decode steps."""
    with (
        ThreadPoolExecutor(1) as prompts,
        ThreadPoolExecutor(1, initializer=use_urgent_stream, initargs=(engine.device,)) as steps,
    ):
        yield prompts, steps


class Pages:
    """A pool for two threads."""

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._changed = threading.Condition()

    def take(self, tokens: int) -> list[int]:
        """Pages for so many tokens, once they are free."""
        needed = self._pool.pages_for(tokens)
        with self._changed:
            assert self._changed.wait_for(lambda: needed <= self._pool.num_free, 60)
            return self._pool.allocate(needed)

    def release(self, pages: list[int]) -> None:
        """Others may have them at once."""
        with self._changed:
            self._pool.release(pages)
            self._changed.notify_all()


def compute(engine: Engine, prompt: list[int], sampling: SamplingParams, pages: list[int]) -> int:
    """In chunks, each of which is waited for, as a colocated worker does; returns the first token."""
    for start in range(0, len(prompt), CHUNK):
        length = min(CHUNK, len(prompt) - start)
        (output,) = engine.prefill([PrefillChunk(prompt, start, length, pages, sampling)], lambda layer, ready: None)
        engine.synchronize()
    assert output.token is not None
    return output.token.token_id


def decode(batch: RunningBatch[int], steps: int) -> dict[int, list[int]]:
    """Start so many steps, each before the one ahead is collected."""
    found: dict[int, list[int]] = {}
    for step in range(steps + batch.lookahead):
        if step < steps:
            batch.start()
        if batch.in_flight > (batch.lookahead if step < steps else 0):
            for key, token in batch.collect():
                found.setdefault(key, []).append(token.token_id)
    while batch.in_flight:
        for key, token in batch.collect():
            found.setdefault(key, []).append(token.token_id)
    return found


def test_neither_changes_what_the_other_computes(
    engine: Engine, threads: tuple[ThreadPoolExecutor, ThreadPoolExecutor]
) -> None:
    """A batch of eight and a row of prompts, first one after the other, then three times together."""
    prompts, steps = threads
    pool = engine.pool

    def compute_all() -> list[int]:
        tokens = []
        for prompt, sampling in PROMPTS:
            pages = pool.allocate(pool.pages_for(len(prompt)))
            tokens.append(compute(engine, prompt, sampling, pages))
            pool.release(pages)
        return tokens

    held = [pool.allocate(pool.pages_for(len(prompt) + STEPS + 2)) for prompt, _ in PROMPTS[:8]]
    firsts = [
        prompts.submit(compute, engine, prompt, sampling, pages).result()
        for (prompt, sampling), pages in zip(PROMPTS, held, strict=False)
    ]

    def decode_all() -> dict[int, list[int]]:
        batch: RunningBatch[int] = new_batch(engine)
        for key, (first, pages) in enumerate(zip(firsts, held, strict=True)):
            prompt, sampling = PROMPTS[key]
            batch.join(key, [*prompt, first], 1, pages, sampling)
        return decode(batch, STEPS)

    alone = prompts.submit(compute_all).result(), steps.submit(decode_all).result()
    for _ in range(3):
        computing, decoding = prompts.submit(compute_all), steps.submit(decode_all)
        assert (computing.result(), decoding.result()) == alone
    for pages in held:
        pool.release(pages)
    assert pool.num_in_use == 0


def test_pages_go_from_prompts_to_steps_and_back(
    engine: Engine, threads: tuple[ThreadPoolExecutor, ThreadPoolExecutor]
) -> None:
    """A prompt's pages are decoded as soon as its first token is known, and the next prompt gets them right after."""
    prompts, steps = threads
    spared = engine.pool.allocate(engine.pool.num_free - 2 * engine.pool.pages_for(len(PROMPTS[-1][0]) + STEPS + 2))

    def serve() -> list[list[int]]:
        pages = Pages(engine.pool)
        computed: queue.SimpleQueue[tuple[int, int, list[int]]] = queue.SimpleQueue()

        def compute_all() -> None:
            for key, (prompt, sampling) in enumerate(PROMPTS):
                own = pages.take(len(prompt) + STEPS + 2)
                computed.put((key, compute(engine, prompt, sampling, own), own))

        def decode_all() -> list[list[int]]:
            batch: RunningBatch[int] = new_batch(engine)
            found = []
            for _ in PROMPTS:
                key, first, own = computed.get(timeout=60)
                prompt, sampling = PROMPTS[key]
                batch.join(key, [*prompt, first], 1, own, sampling)
                found.append([first, *decode(batch, STEPS)[key]])
                batch.leave(key)
                pages.release(own)
            return found

        computing, decoding = prompts.submit(compute_all), steps.submit(decode_all)
        computing.result()
        return decoding.result()

    together = [serve() for _ in range(3)]
    apart = []
    for prompt, sampling in PROMPTS:
        own = engine.pool.allocate(engine.pool.pages_for(len(prompt) + STEPS + 2))
        first = prompts.submit(compute, engine, prompt, sampling, own).result()

        def decode_one(prompt: list[int], first: int, own: list[int], sampling: SamplingParams) -> list[int]:
            batch: RunningBatch[int] = new_batch(engine)
            batch.join(0, [*prompt, first], 1, own, sampling)
            return [first, *decode(batch, STEPS)[0]]

        apart.append(steps.submit(decode_one, prompt, first, own, sampling).result())
        engine.pool.release(own)
    assert together == [apart] * 3
    engine.pool.release(spared)
    assert engine.pool.num_in_use == 0
