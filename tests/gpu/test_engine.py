"""The engine on a real GPU against the same engine on the CPU: `pytest tests/gpu`; `make test` leaves it out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from headrace.engine.decode_batch import DecodeBatch
from headrace.engine.engine import Engine, EngineConfig, PrefillChunk
from headrace.messages.request import SamplingParams

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

PROMPTS = [[(7 * i + 11 * n) % 500 + 1 for i in range(length)] for n, length in enumerate((1, 16, 17, 150))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Llama with grouped queries."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "vocab_size": 512}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 512}
    path = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(LlamaConfig(**sizes, **heads)).save_pretrained(path)
    return path


def generate(engine: Engine, sampling: SamplingParams, steps: int = 24) -> list[list[int]]:
    """All prompts at once: chunked prefill, then one batch."""
    batch: DecodeBatch[int] = DecodeBatch(engine)
    outputs: list[list[int]] = []
    for key, prompt in enumerate(PROMPTS):
        pages = engine.pool.allocate(engine.pool.pages_for(len(prompt) + steps + 1))
        for start in range(0, len(prompt), 64):
            chunk = PrefillChunk(prompt, start, min(64, len(prompt) - start), pages, sampling)
            output = engine.prefill([chunk])[0]
        assert output.token is not None
        outputs.append([output.token.token_id])
        batch.join(key, prompt + outputs[key], 1, pages, sampling)
    for _ in range(steps):
        for key, token in batch.step():
            outputs[key].append(token.token_id)
    return outputs


@pytest.mark.parametrize("impl", ["fused", "transformers"])
@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(max_tokens=64, temperature=0),
        SamplingParams(max_tokens=64, temperature=0.9, top_p=0.9, top_k=40, seed=7, repetition_penalty=1.1),
    ],
    ids=["greedy", "sampled"],
)
def test_tokens_on_the_gpu_are_those_on_the_cpu(folder: Path, impl: str, sampling: SamplingParams) -> None:
    """Float32, greedy and sampled, on both paths."""
    torch.backends.cuda.matmul.allow_tf32 = False
    engines = [
        Engine.load(EngineConfig(folder, device=d, dtype="float32", model_impl=impl, kv_cache_bytes=2**26))
        for d in ("cuda", "cpu")
    ]
    on_gpu, on_cpu = (generate(engine, sampling) for engine in engines)
    assert on_gpu == on_cpu


def test_pages_survive_the_trip_through_host_memory(folder: Path) -> None:
    """What is read from one page is what arrives in another."""
    engine = Engine.load(EngineConfig(folder, device="cuda", kv_cache_bytes=2**26))
    engine.cache.pages.normal_()
    engine.cache.write_pages(1, [5, 3], engine.cache.read_pages(1, [0, 1]))
    assert torch.equal(engine.cache.pages[1, [5, 3]], engine.cache.pages[1, [0, 1]])
    rows, row_bytes = np.array([1, 6]), engine.cache.page_bytes // 8
    engine.cache.write_rows(0, row_bytes, rows, engine.cache.read_rows(0, row_bytes, rows + 16))
    by_row = engine.cache.pages[0].view(torch.uint8).view(-1, row_bytes)
    assert torch.equal(by_row[[1, 6]], by_row[[17, 22]])
