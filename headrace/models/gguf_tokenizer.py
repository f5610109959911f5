"""A `tokenizers.Tokenizer` from the metadata of a GGUF file.

The splitting rules are those of llama.cpp (`llama-vocab.cpp`), by the file's `tokenizer.ggml.pre`.
"""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from headrace.models.errors import ModelError

CONTROL = 3
USER_DEFINED = 4

GPT4_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,%d}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def build_tokenizer(metadata: dict[str, Any]) -> Tokenizer:
    """The tokenizer that a GGUF file describes. Raises `ModelError` for kinds that are not supported."""
    kind = metadata.get("tokenizer.ggml.model")
    if kind == "gpt2":
        tokenizer = _byte_level_bpe(metadata)
    elif kind == "llama":
        tokenizer = _sentencepiece_bpe(metadata)
    else:
        raise ModelError(f"tokenizer model {kind!r} of the GGUF file is not supported; 'gpt2' and 'llama' are")
    _add_special_tokens(tokenizer, metadata)
    return tokenizer


def tokenizer_config(metadata: dict[str, Any]) -> dict[str, Any]:
    """What goes into tokenizer_config.json: special tokens by name and the chat template."""
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token = _token(metadata, key)
        if token is not None:
            config[f"{name}_token"] = token
    config["add_bos_token"] = _adds_bos(metadata)
    template = metadata.get("tokenizer.chat_template")
    if template is not None:
        config["chat_template"] = template
    return config


def _token(metadata: dict[str, Any], name: str) -> str | None:
    index = metadata.get(f"tokenizer.ggml.{name}_token_id")
    return None if index is None else metadata["tokenizer.ggml.tokens"][index]


def _adds_bos(metadata: dict[str, Any]) -> bool:
    default = metadata["tokenizer.ggml.model"] == "llama" or metadata.get("tokenizer.ggml.pre") == "llama-bpe"
    return bool(metadata.get("tokenizer.ggml.add_bos_token", default))


def _add_special_tokens(tokenizer: Tokenizer, metadata: dict[str, Any]) -> None:
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    for kind, special in ((CONTROL, True), (USER_DEFINED, False)):
        chosen = [token for token, token_type in zip(tokens, types, strict=True) if token_type == kind]
        tokenizer.add_tokens([AddedToken(token, special=special, normalized=False) for token in chosen])
    bos = _token(metadata, "bos")
    if bos is not None and _adds_bos(metadata):
        start = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokens.index(bos))]
        )
        steps = [start] if tokenizer.post_processor is None else [tokenizer.post_processor, start]
        tokenizer.post_processor = processors.Sequence(steps)


def _byte_level_bpe(metadata: dict[str, Any]) -> Tokenizer:
    vocabulary = {token: index for index, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    pre = metadata.get("tokenizer.ggml.pre", "gpt-2")
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=merges, fuse_unk=False, ignore_merges=pre == "llama-bpe"))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    mapped_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if pre in ("gpt-2", "default"):
        tokenizer.pre_tokenizer = byte_level
    elif pre == "smollm":
        # Each digit is a word of its own, as in llama.cpp and the original tokenizer.
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    elif pre in ("llama-bpe", "qwen2"):
        split = Regex(GPT4_SPLIT % (3 if pre == "llama-bpe" else 1))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(split, "isolated"), mapped_only])
        if pre == "qwen2":
            tokenizer.normalizer = normalizers.NFC()
    else:
        raise ModelError(
            f"tokenizer.ggml.pre {pre!r} of the GGUF file is not supported (gpt-2, smollm, llama-bpe and qwen2 are): "
            "use the model's Hugging Face folder"
        )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


def _sentencepiece_bpe(metadata: dict[str, Any]) -> Tokenizer:
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = _merges_from_scores(tokens, metadata["tokenizer.ggml.scores"], vocabulary)
    unknown = _token(metadata, "unknown") or "<unk>"
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    to_piece = normalizers.Replace(" ", "▁")
    to_text = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), to_piece])
        to_text.append(decoders.Strip(content=" ", left=1, right=0))
    else:
        tokenizer.normalizer = to_piece
    tokenizer.decoder = decoders.Sequence(to_text)
    return tokenizer


def _merges_from_scores(tokens: list[str], scores: list[float], vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """SentencePiece joins the pair whose result scores highest; as a list of merges that is: by falling score."""
    merges: list[tuple[float, int, int, str, str]] = []
    for token, score in zip(tokens, scores, strict=True):
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocabulary and right in vocabulary:
                merges.append((-score, vocabulary[left], vocabulary[right], left, right))
    merges.sort()
    return [(left, right) for *_, left, right in merges]
