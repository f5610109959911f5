"""Tiny random checkpoints: every family gives the log probabilities that transformers computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from headrace.engine.engine import Engine
from headrace.messages.request import SamplingParams
from tests.engine.conftest import generate, load, prefill

VOCABULARY = 96
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
FUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"head_dim": 8}),
    "llama tied, with biases": ("Llama", {"tie_word_embeddings": True, "attention_bias": True}),
    "llama with wide heads": ("Llama", {"head_dim": 16}),
    "llama 3 rope": ("Llama", {"rope_parameters": LLAMA3_ROPE}),
    "linear rope": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "phi3": ("Phi3", {}),
    "phi3 with partial rotation": ("Phi3", {"partial_rotary_factor": 0.5}),
    "gemma": ("Gemma", {"head_dim": 16}),
}
GENERAL: dict[str, tuple[str, dict[str, Any]]] = {
    "llama with exact gelu": ("Llama", {"hidden_act": "gelu"}),
    "olmo2": ("Olmo2", {}),
    "gpt neox": ("GPTNeoX", {"num_key_value_heads": 4}),
}


def save(folder: Path, family: str, options: dict[str, Any]) -> Any:
    """A random model, with norms and biases that differ from their initial ones and zeros, and a copy on disk."""
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **options})
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0, 0.3 if parameter.ndim > 1 else 0.2)
            if "norm" in name and family != "Gemma":
                parameter.add_(1)
    model.save_pretrained(folder)
    return model


def assert_same_logprobs(engine: Engine, model: Any) -> None:
    """A prompt in chunks, its log probabilities, then a few decoded tokens' ones."""
    prompt = torch.randint(0, VOCABULARY, (45,)).tolist()
    sampling = SamplingParams(max_tokens=6, temperature=0, logprobs=5, prompt_logprobs=5)
    pages = engine.pool.allocate(engine.pool.pages_for(len(prompt)))
    _, of_prompt = prefill(engine, prompt, pages, sampling, chunk=18)
    engine.pool.release(pages)
    (outputs,) = generate(engine, [prompt], [sampling], 6, chunk=45)
    sequence = prompt + [token.token_id for token in outputs]
    with torch.inference_mode():
        expected = model(torch.tensor([sequence])).logits[0].float().log_softmax(-1)
    entries = of_prompt + [token.logprobs for token in outputs if token.logprobs is not None]
    assert [entry.token_id for entry in entries] == sequence[1:]
    got = torch.tensor([entry.logprob for entry in entries])
    torch.testing.assert_close(got, expected[torch.arange(len(got)), sequence[1:]], atol=2e-4, rtol=1e-4)
    likeliest = torch.tensor([[value for _, value in entry.top] for entry in entries])
    torch.testing.assert_close(likeliest, expected[:-1].topk(5).values, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", FUSED)
def test_the_fused_decoder_equals_transformers(name: str, tmp_path: Path) -> None:
    """Families and options that the fused path claims."""
    model = save(tmp_path, *FUSED[name])
    assert_same_logprobs(load(tmp_path, "fused", max_model_len=128), model)


@pytest.mark.parametrize("name", GENERAL)
def test_what_the_fused_decoder_can_not_run_equals_transformers_all_the_same(name: str, tmp_path: Path) -> None:
    """`auto` takes the general path where it must."""
    model = save(tmp_path, *GENERAL[name])
    assert_same_logprobs(load(tmp_path, "auto", max_model_len=128), model)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma"])
def test_the_general_path_equals_transformers_on_families_of_the_fused_one(name: str, tmp_path: Path) -> None:
    """So that either can be chosen."""
    model = save(tmp_path, *FUSED[name])
    assert_same_logprobs(load(tmp_path, "transformers", max_model_len=128), model)
