"""What the fused decoder does with prompts on a GPU, with Triton's interpreter for the chip."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from headrace.engine import engine as engine_module
from headrace.engine import fused_decoder
from headrace.kernels import rope_cache
from headrace.kernels.prefill_attention import TilePlan, Tiling, plan_tiles
from headrace.messages.request import SamplingParams
from tests.engine.conftest import load, prefill

PROMPT = [7, 30, 2, 55, 11, 42, 9, 8, 61, 20, 3, 3, 17, 25, 90, 64, 33, 12, 5]


@pytest.mark.parametrize("chunk", [64, 6], ids=["whole", "chunked"])
def test_prompts_in_tiles_give_the_log_probabilities_of_torch(
    chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Qwen 3, for its norms of queries and keys; whole prompts read fresh keys, later chunks the pages."""
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16}
    config = transformers.Qwen3Config(**sizes, num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=64)
    transformers.Qwen3ForCausalLM(config).save_pretrained(tmp_path)
    engine = load(tmp_path, "fused", max_model_len=64)
    sampling = SamplingParams(max_tokens=4, temperature=0, prompt_logprobs=2)
    plans: list[TilePlan] = []

    def plan(pages: torch.Tensor, table: torch.Tensor, lengths: list[int], contexts: list[int], heads: int) -> TilePlan:
        plans.append(plan_tiles(table, lengths, contexts, heads // pages.shape[2], Tiling(16, 16, 4, 1)))
        return plans[-1]

    def launch(*arguments: Any, keep_keys: bool, factors: None) -> torch.Tensor:
        return rope_cache._launch(*arguments, keep_keys, (1.0, 1.0), factors)

    results = []
    for on_gpu in (False, True):
        if on_gpu:
            monkeypatch.setattr(engine_module, "plan_prefill", plan)
            monkeypatch.setattr(fused_decoder, "rope_cache", launch)
        pages = engine.pool.allocate(2)
        token, logprobs = prefill(engine, PROMPT, pages, sampling, chunk)
        results.append((token.token_id, [entry.logprob for entry in logprobs], engine.cache.pages[:, pages].clone()))
        engine.pool.release(pages)
    assert {plan.has_prefix for plan in plans} == ({False} if chunk == 64 else {False, True})
    assert results[0][0] == results[1][0]
    assert results[0][1] == pytest.approx(results[1][1], abs=1e-4)
    torch.testing.assert_close(results[0][2], results[1][2], atol=1e-4, rtol=1e-4)
