"""Ways to run an engine as the two tiers do together, and tiny checkpoints of the families."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from headrace.engine.decode_batch import DecodeBatch
from headrace.engine.engine import Engine, EngineConfig, PrefillChunk
from headrace.engine.sampler import SampledToken
from headrace.messages.request import SamplingParams
from headrace.messages.stream import TokenLogprobs
from headrace.models.locate import locate_model


@pytest.fixture(scope="session")
def built_in_folder() -> Path:
    """The built-in model, converted."""
    return locate_model("smollm2").path


@pytest.fixture(scope="session")
def fused_engine(built_in_folder: Path) -> Iterator[Engine]:
    """The built-in model on the fused path."""
    yield load(built_in_folder, "fused", max_model_len=512)
    gc.collect()


def load(folder: Path, model_impl: str, max_model_len: int, quantization: str = "none") -> Engine:
    """A small float32 engine on the CPU, with one thread: two that wait for a busy core are slower than one."""
    return Engine.load(
        EngineConfig(
            folder,
            device="cpu",
            dtype="float32" if quantization == "none" else "auto",
            model_impl=model_impl,
            max_model_len=max_model_len,
            max_num_seqs=16,
            cpu_threads=1,
            quantization=quantization,
        )
    )


def prefill(
    engine: Engine, prompt: Sequence[int], pages: Sequence[int], sampling: SamplingParams, chunk: int
) -> tuple[SampledToken, list[TokenLogprobs]]:
    """Compute a prompt in chunks; returns the first token and the prompt's log probabilities."""
    found: list[TokenLogprobs] = []
    token = None
    for start in range(0, len(prompt), chunk):
        length = min(chunk, len(prompt) - start)
        (output,) = engine.prefill([PrefillChunk(prompt, start, length, pages, sampling)])
        found += output.prompt_logprobs
        assert token is None, "a token before the prompt's end"
        token = output.token
    assert token is not None
    return token, found


def generate(
    engine: Engine, prompts: Sequence[Sequence[int]], sampling: Sequence[SamplingParams], tokens: int, chunk: int = 64
) -> list[list[SampledToken]]:
    """Prefill each prompt in chunks, decode all in one batch, give all pages back."""
    pages = [engine.pool.allocate(engine.pool.pages_for(len(prompt) + tokens)) for prompt in prompts]
    batch: DecodeBatch[int] = DecodeBatch(engine)
    outputs = []
    for key, prompt in enumerate(prompts):
        first, _ = prefill(engine, prompt, pages[key], sampling[key], chunk)
        outputs.append([first])
        batch.join(key, [*prompt, first.token_id], 1, pages[key], sampling[key])
    for _ in range(tokens - 1):
        for key, token in batch.step():
            outputs[key].append(token)
    for held in pages:
        engine.pool.release(held)
    engine.pool.check_integrity()
    return outputs


def ids(tokens: Sequence[SampledToken]) -> list[int]:
    """Their token ids."""
    return [token.token_id for token in tokens]


@pytest.fixture(autouse=True)
def _reproducible() -> None:
    torch.manual_seed(0)
