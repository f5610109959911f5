"""Tokenizers made from GGUF metadata."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer

from headrace.models.errors import ModelError
from headrace.models.gguf_tokenizer import build_tokenizer
from headrace.models.locate import locate_model

TEXTS = [
    "Hello world, it's fine.  Two  spaces.\n\n",
    "def f(x):\n\treturn {x: [1234, 3.14]}  # done",
    "你好，世界。",
    "🌍👩‍👩‍👧 café naïve",
    "<|im_start|>user\nhi<|im_end|>\n",
]


@pytest.fixture(scope="module")
def folder() -> Path:
    """The built-in model's."""
    return locate_model("smollm2").path


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives_the_way_there_and_back(text: str, folder: Path) -> None:
    """And transformers reads the same tokens from the folder."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokens = tokenizer.encode(text).ids
    assert tokenizer.decode(tokens, skip_special_tokens=False) == text
    assert AutoTokenizer.from_pretrained(folder)(text)["input_ids"] == tokens


def test_control_tokens_are_one_token_and_digits_stand_alone(folder: Path) -> None:
    """By the rule that llama.cpp calls `smollm`."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.encode("<|im_start|>").ids == [1]
    assert tokenizer.encode("2024").tokens == ["2", "0", "2", "4"]


def test_the_chat_template_works_from_the_folder(folder: Path) -> None:
    """With the default system prompt and the opening of the answer."""
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert "<|im_start|>" in config["chat_template"]
    messages = [{"role": "user", "content": "hi"}]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")


def sentencepiece(**extra: Any) -> Tokenizer:
    """A vocabulary in which "ab" scores higher than "bc"."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "c", "bc", "ab"]
    return build_tokenizer(
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.scores": [0.0] * (len(tokens) - 2) + [-2.0, -1.0],
            "tokenizer.ggml.token_type": [2, 3, 3, *([6] * 256), *([1] * 6)],
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.unknown_token_id": 0,
            **extra,
        }
    )


def test_sentencepiece_joins_the_best_pair_first_and_falls_back_to_bytes() -> None:
    """A space before the text, `<s>` before all, and UTF-8 for what has no piece."""
    tokenizer = sentencepiece()
    assert tokenizer.encode("abc").tokens == ["<s>", "▁", "ab", "c"]
    assert tokenizer.encode("é", add_special_tokens=False).tokens == ["▁", "<0xC3>", "<0xA9>"]
    for text in ("abc", "a b  c", "é 你"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_sentencepiece_without_a_prefix_adds_none() -> None:
    """By `add_space_prefix`."""
    tokenizer = sentencepiece(**{"tokenizer.ggml.add_space_prefix": False, "tokenizer.ggml.add_bos_token": False})
    assert tokenizer.encode("abc").tokens == ["ab", "c"]
    assert tokenizer.decode(tokenizer.encode(" abc").ids) == " abc"


def byte_level(pre: str) -> Tokenizer:
    """Bytes only, but for the two-digit token "12"."""
    tokens = [*sorted(ByteLevel.alphabet()), "12", "<s>"]
    return build_tokenizer(
        {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": pre,
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.merges": ["1 2"],
            "tokenizer.ggml.token_type": [1] * 257 + [3],
            "tokenizer.ggml.bos_token_id": 257,
        }
    )


@pytest.mark.parametrize(
    ("pre", "bos", "digits"), [("gpt-2", 0, 1), ("smollm", 0, 2), ("qwen2", 0, 2), ("llama-bpe", 1, 1)]
)
def test_numbers_are_split_by_the_rule_of_the_model(pre: str, bos: int, digits: int) -> None:
    """Every digit alone for smollm and qwen2; a first `<s>` for llama-bpe."""
    tokenizer = byte_level(pre)
    assert len(tokenizer.encode("12").ids) == bos + digits
    assert tokenizer.decode(tokenizer.encode("a 12, ünï\n\n b").ids) == "a 12, ünï\n\n b"


def test_an_unknown_splitting_rule_is_named() -> None:
    """Guessing would give wrong tokens in silence."""
    with pytest.raises(ModelError, match="'tekken'"):
        byte_level("tekken")
