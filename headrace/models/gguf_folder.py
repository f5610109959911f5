"""A GGUF file is converted, once, into a Hugging Face-style folder in a cache.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from headrace.models.errors import ModelError

CACHE_VARIABLE = "HEADRACE_CACHE"
FORMAT_VERSION = 1
"""Part of the folder's name: raise it when what is written changes."""
HASHED_BYTES = 4 * 2**20

HF_CLASSES = {
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
}
TOP_TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
BLOCK_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ROPE_FREQUENCIES = "rope_freqs.weight"


def cache_folder() -> Path:
    """Where converted models live: `$HEADRACE_CACHE`, or `~/.cache/headrace/models`."""
    configured = os.environ.get(CACHE_VARIABLE)
    return Path(configured) if configured else Path.home() / ".cache" / "headrace" / "models"


def gguf_to_folder(gguf: Path) -> Path:
    """The converted form of a GGUF file. A second call finds the first one's folder; processes may race.

    Raises `ModelError` for architectures and tokenizers that are not supported.
    """
    folder = cache_folder() / f"{gguf.stem}-{_file_hash(gguf)}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{gguf.stem}-", dir=folder.parent))
    try:
        _convert(gguf, unfinished)
        os.replace(unfinished, folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise ModelError(f"can't write {folder} ({error}): set {CACHE_VARIABLE} to a folder with room") from error
    finally:  # where another process was quicker, its folder is as good as ours
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _file_hash(gguf: Path) -> str:
    """Hash the size, the start (all metadata) and the end, not the whole: this runs at every start."""
    size = gguf.stat().st_size
    digest = xxhash.xxh3_64(f"{FORMAT_VERSION}:{size}".encode())
    with gguf.open("rb") as file:
        digest.update(file.read(HASHED_BYTES))
        file.seek(max(0, size - HASHED_BYTES))
        digest.update(file.read(HASHED_BYTES))
    return digest.hexdigest()


def _convert(gguf: Path, folder: Path) -> None:
    import gguf as gguf_library  # slow to import, and only needed here
    from safetensors.numpy import save_file

    from headrace.models.gguf_tokenizer import build_tokenizer, tokenizer_config

    try:
        reader = gguf_library.GGUFReader(gguf)
    except ValueError as error:
        raise ModelError(f"{gguf} is not a GGUF file ({error})") from error
    metadata = {key: field.contents() for key, field in reader.fields.items()}
    architecture = metadata.get("general.architecture")
    if architecture not in HF_CLASSES:
        raise ModelError(f"{gguf.name}: architecture {architecture!r} is not supported; use one of {list(HF_CLASSES)}")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    build_tokenizer(metadata).save(str(folder / "tokenizer.json"))
    tied = "output.weight" not in tensors
    _write_json(folder / "tokenizer_config.json", tokenizer_config(metadata))
    _write_json(folder / "config.json", _config(metadata, tensors, tied))
    _write_json(folder / "generation_config.json", {"eos_token_id": _stop_tokens(metadata)})
    save_file(dict(_weights(metadata, tensors)), folder / "model.safetensors", metadata={"format": "pt"})


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _stop_tokens(metadata: dict[str, Any]) -> list[int]:
    names = ("eos", "eot", "eom")
    found = {metadata.get(f"tokenizer.ggml.{name}_token_id") for name in names}
    return sorted(token for token in found if token is not None)


def _config(metadata: dict[str, Any], tensors: dict[str, Any], tied: bool) -> dict[str, Any]:
    architecture: str = metadata["general.architecture"]

    def value(key: str, default: Any = None) -> Any:
        found = metadata.get(f"{architecture}.{key}", default)
        if found is None:
            raise ModelError(f"the GGUF file lacks {architecture}.{key}")
        return found

    model_type, class_name = HF_CLASSES[architecture]
    heads, hidden = value("attention.head_count"), value("embedding_length")
    return {
        "architectures": [class_name],
        "model_type": model_type,
        "hidden_size": hidden,
        "intermediate_size": value("feed_forward_length"),
        "num_hidden_layers": value("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": value("attention.head_count_kv", heads),
        "head_dim": value("attention.key_length", hidden // heads),
        "hidden_act": "silu",
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": False,
        "max_position_embeddings": value("context_length"),
        "rms_norm_eps": value("attention.layer_norm_rms_epsilon"),
        "rope_theta": value("rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(metadata, architecture, ROPE_FREQUENCIES in tensors),
        "tie_word_embeddings": tied,
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
        "dtype": "float32",
        "use_cache": True,
    }


def _rope_scaling(metadata: dict[str, Any], architecture: str, has_frequencies: bool) -> dict[str, Any] | None:
    """Llama 3's scaling is only in the file as a tensor of factors; its parameters are Llama 3.1 to 3.3's."""
    kind = metadata.get(f"{architecture}.rope.scaling.type", "none")
    if has_frequencies:
        small = metadata[f"{architecture}.embedding_length"] < 4096
        return {
            "rope_type": "llama3",
            "factor": 32.0 if small else 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    if kind == "none":
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": metadata[f"{architecture}.rope.scaling.factor"]}
    raise ModelError(f"RoPE scaling {kind!r} of GGUF files is not supported: use the model's Hugging Face folder")


def _weights(metadata: dict[str, Any], tensors: dict[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    from gguf.quants import dequantize

    architecture = metadata["general.architecture"]
    heads = metadata[f"{architecture}.attention.head_count"]
    kv_heads = metadata.get(f"{architecture}.attention.head_count_kv", heads)
    for name, tensor in tensors.items():
        if name == ROPE_FREQUENCIES:
            continue
        values = np.asarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        if architecture == "llama" and ".attn_q." in name:
            values = _halves_from_pairs(values, heads)
        elif architecture == "llama" and ".attn_k." in name:
            values = _halves_from_pairs(values, kv_heads)
        yield _hf_name(name), np.ascontiguousarray(values)


def _halves_from_pairs(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp rotates neighbouring rows (2i, 2i+1), Hugging Face rows (i, i + half); undo its permutation."""
    half = rows.shape[0] // heads // 2
    return rows.reshape(heads, half, 2, -1).swapaxes(1, 2).reshape(rows.shape)


def _hf_name(name: str) -> str:
    if name in TOP_TENSORS:
        return TOP_TENSORS[name]
    prefix, _, rest = name.partition(".")
    layer, _, part = rest.partition(".")
    stem, _, suffix = part.rpartition(".")
    if prefix != "blk" or stem not in BLOCK_TENSORS:
        raise ModelError(f"tensor {name!r} of the GGUF file is not known: use the model's Hugging Face folder")
    return f"model.layers.{layer}.{BLOCK_TENSORS[stem]}.{suffix}"
