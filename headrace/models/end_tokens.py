"""The tokens that end a model's output."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers


def end_tokens(folder: Path, tokenizer: tokenizers.Tokenizer) -> tuple[int, ...]:
    """All that the files of a model's folder name, in ascending order."""
    config = read_json(folder / "config.json")
    found: list[int] = []
    for source in (read_json(folder / "generation_config.json"), {**config, **config.get("text_config", {})}):
        named = source.get("eos_token_id")
        found.extend(named if isinstance(named, list) else [named] if named is not None else [])
    name = text_of(read_json(folder / "tokenizer_config.json").get("eos_token"))
    if name is not None and (token_id := tokenizer.token_to_id(name)) is not None:
        found.append(token_id)
    return tuple(sorted(set(found)))


def read_json(file: Path) -> dict[str, Any]:
    """The object in a file; an empty one where there is no file. Raises `ValueError` for what is no JSON object."""
    found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if not isinstance(found, dict):
        raise ValueError(f"{file} holds no JSON object")
    return found


def text_of(token: Any) -> str | None:
    """A special token's text; older files write a token as an object."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None
