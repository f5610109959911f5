"""The built-in model with packed weights: close to float32, the same in any batch, pages and threads in any order."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from headrace.engine.device import can_pack
from headrace.engine.engine import Engine, PrefillChunk
from headrace.messages.request import SamplingParams
from tests.engine.conftest import generate, ids, load

if not can_pack():
    pytest.skip("packed weights need numba and AVX2", allow_module_level=True)

from headrace.engine.packed_decoder import PackedDecoder

pytestmark = pytest.mark.timeout(300)  # the first one compiles

GREEDY = SamplingParams(max_tokens=32, temperature=0)
TEXT = (
    "A headrace is the channel that carries water from the mill pond to the wheel. When the sluice is opened, the "
    "water runs down to the wheel, and the wheel turns the stones that grind corn into flour for the village bakery."
)


@pytest.fixture(scope="module")
def packed_engine(built_in_folder: Path) -> Engine:
    """With as many threads as it likes."""
    engine = load(built_in_folder, "auto", max_model_len=512, quantization="auto")
    assert isinstance(engine.model, PackedDecoder)
    return engine


@pytest.fixture(scope="module")
def prompts(built_in_folder: Path) -> list[list[int]]:
    """Of 1 to 60 tokens."""
    tokens = Tokenizer.from_file(str(built_in_folder / "tokenizer.json")).encode(TEXT).ids
    return [tokens[:1], tokens[3:20], tokens[:33], tokens[10:], tokens]


@torch.inference_mode()
def logits(engine: Engine, tokens: list[int], pages: list[int], chunk: int) -> torch.Tensor:
    """Of every position, float32 [T, vocabulary], computed in chunks."""
    found = []
    for start in range(0, len(tokens), chunk):
        length = min(chunk, len(tokens) - start)
        batch = engine._pack([PrefillChunk(tokens, start, length, pages, GREEDY)])
        found.append(engine.model.logits(engine.model.forward(batch, engine.cache, None)).clone())
    return torch.cat(found)


def test_likelihoods_are_close_to_those_of_float32(
    packed_engine: Engine, fused_engine: Engine, prompts: list[list[int]]
) -> None:
    """Weights are the same; what differs is that inputs of a product have 8 bits."""
    for prompt in prompts[1:]:
        pages = list(range(8))
        ours = logits(packed_engine, prompt, pages, 64).log_softmax(-1)
        exact = logits(fused_engine, prompt, pages, 64).log_softmax(-1)
        divergence = (exact.exp() * (exact - ours)).sum(-1)
        assert divergence.mean() < 0.01
        assert (ours.argmax(-1) == exact.argmax(-1)).float().mean() > 0.9


def test_a_request_gives_the_same_tokens_alone_and_in_a_batch(packed_engine: Engine, prompts: list[list[int]]) -> None:
    """Greedily, 32 tokens each."""
    together = generate(packed_engine, prompts, [GREEDY] * len(prompts), 32)
    for prompt, output in zip(prompts, together, strict=True):
        (alone,) = generate(packed_engine, [prompt], [GREEDY], 32)
        assert ids(alone) == ids(output)


def test_chunks_and_scattered_pages_change_nothing(packed_engine: Engine, prompts: list[list[int]]) -> None:
    """Bit for bit: a token sees the same cache in the same order."""
    whole = logits(packed_engine, prompts[-1], list(range(8)), 64)
    scattered = np.random.default_rng(0).permutation(packed_engine.pool.num_pages)[:8].tolist()
    for chunk in (1, 16, 32):
        assert torch.equal(whole, logits(packed_engine, prompts[-1], scattered, chunk))


def test_threads_change_nothing(packed_engine: Engine, prompts: list[list[int]]) -> None:
    """Who computes a part does not matter, nor how many."""
    one = logits(packed_engine, prompts[-1], list(range(8)), 64)
    for threads in (2, 3, 1):
        packed_engine.model.use_threads(threads)
        assert torch.equal(one, logits(packed_engine, prompts[-1], list(range(8)), 64))


def test_layers_are_announced_in_order_when_their_pages_are_written(
    packed_engine: Engine, prompts: list[list[int]]
) -> None:
    """What the handoff sends is final."""
    tokens, pages = prompts[-1], [3, 1, 4, 15, 9]
    seen: list[int] = []
    copies: list[torch.Tensor] = []

    def announced(layer: int, _: object) -> None:
        seen.append(layer)
        copies.append(packed_engine.cache.layer(layer)[pages].clone())

    packed_engine.prefill([PrefillChunk(tokens, 0, len(tokens), pages, GREEDY)], announced)
    assert seen == list(range(packed_engine.model_config.num_layers))
    for layer, copy in enumerate(copies):
        assert torch.equal(copy, packed_engine.cache.layer(layer)[pages])


def test_more_rows_than_before_find_room(packed_engine: Engine) -> None:
    """Buffers grow with the batch."""
    prompt = list(range(1000, 1300))
    few = logits(packed_engine, prompt, list(range(20)), 20)
    assert torch.equal(few, logits(packed_engine, prompt, list(range(20)), 300))


def test_weights_that_can_not_be_packed_are_not(tmp_path: Path) -> None:
    """A random checkpoint runs as it always did."""
    from tests.engine.test_families import save

    save(tmp_path, "Llama", {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32})
    engine = load(tmp_path, "auto", max_model_len=64, quantization="auto")
    assert not isinstance(engine.model, PackedDecoder)
