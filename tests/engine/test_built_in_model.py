"""The built-in model gives the tokens that transformers gives, on both paths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from headrace.engine.engine import Engine
from headrace.messages.request import SamplingParams
from tests.engine.conftest import generate, ids, load

TEXTS = ["Hello, my name is", "def fib(n):\n    if n < 2:\n        return n\n    return", "你好，世界。今天天气"]
TOKENS = 20
NEAR_TIE = 1e-3
"""Logits so close may come in either order, as sums are taken in another order."""
GREEDY = SamplingParams(max_tokens=TOKENS, temperature=0)


@pytest.fixture(scope="module")
def transformers_model(built_in_folder: Path) -> Any:
    """The judge."""
    return AutoModelForCausalLM.from_pretrained(built_in_folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def prompts(built_in_folder: Path) -> list[list[int]]:
    """Short texts, and one that fills several pages and chunks."""
    tokenizer = Tokenizer.from_file(str(built_in_folder / "tokenizer.json"))
    return [*(tokenizer.encode(text).ids for text in TEXTS), list(range(1000, 1090))]


def assert_greedy(model: Any, prompt: list[int], got: list[int]) -> None:
    """Each token is the likeliest after those before it, by one forward: what `generate` would give, by induction."""
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + got[:-1]])).logits[0, len(prompt) - 1 :]
    for position, token in enumerate(got):
        lead = float(logits[position].max() - logits[position, token])
        assert lead < NEAR_TIE, f"token {position} is {token}, but another one leads by {lead}"


def test_the_fused_path_generates_what_transformers_generates(
    fused_engine: Engine, transformers_model: Any, prompts: list[list[int]]
) -> None:
    """Prefill in chunks of 32, decode in one batch."""
    outputs = generate(fused_engine, prompts, [GREEDY] * len(prompts), TOKENS, chunk=32)
    for prompt, output in zip(prompts, outputs, strict=True):
        assert_greedy(transformers_model, prompt, ids(output))


def test_the_general_path_generates_what_transformers_generates(
    built_in_folder: Path, transformers_model: Any, prompts: list[list[int]]
) -> None:
    """The same through transformers' own modules."""
    engine = load(built_in_folder, "transformers", max_model_len=256)
    outputs = generate(engine, prompts, [GREEDY] * len(prompts), TOKENS, chunk=32)
    for prompt, output in zip(prompts, outputs, strict=True):
        assert_greedy(transformers_model, prompt, ids(output))
