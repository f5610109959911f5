"""Text to tokens: a model's tokenizer, chat template and end-of-sequence tokens, read from its folder."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import tokenizers

from headrace.gateway.chat_template import ChatTemplate
from headrace.gateway.errors import QueueFull
from headrace.gateway.vocabulary import Vocabulary
from headrace.grammar import Grammars
from headrace.models.end_tokens import end_tokens, read_json, text_of
from headrace.settings import SettingsError

T = TypeVar("T")

THREADS = 2
"""The tokenizers library and JSON parsing release the interpreter only in part: more threads gain little."""
MAX_IN_THREADS = 1024
"""Requests that are being read or wait for it."""
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


class Tokenizer:
    """What the gateway knows of a model. Methods are safe in any thread; `in_thread` keeps them off the event loop."""

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        config: dict[str, Any],
        template: ChatTemplate | None,
        grammars: Grammars,
    ) -> None:
        self._tokenizer = tokenizer
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="tokenizer")
        self._in_threads = 0
        self.template = template
        self.grammars = grammars
        self.vocabulary = Vocabulary(tokenizer)
        self.eos_token_ids: tuple[int, ...] = config["eos_token_ids"]
        self.context_length: int = config["context_length"]
        self.vocabulary_size: int = config["vocab_size"]
        """Ids from here on are refused: the model's embedding has no row for them."""

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Read a model's folder. Raises `SettingsError` where its tokenizer is missing or of an unknown kind."""
        tokenizer = _read_tokenizer(folder / "tokenizer.json")
        try:
            config = _read_config(folder, tokenizer)
            return cls(tokenizer, config, _read_template(folder), Grammars(folder, config["vocab_size"]))
        except ValueError as error:
            raise SettingsError(f"{folder}: {error}") from error

    async def in_thread(self, work: Callable[[], T]) -> T:
        """Run `work` in one of the tokenizer's threads. Raises `QueueFull` where too much waits for them."""
        if self._in_threads >= MAX_IN_THREADS:
            raise QueueFull(f"{MAX_IN_THREADS} requests are being read: try again later.")
        self._in_threads += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work)
        finally:
            self._in_threads -= 1

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """The tokens of a text."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of tokens, special ones by name."""
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=False)
        return text

    def pieces(self, token_ids: Sequence[int]) -> list[str]:
        """Each token as the tokenizer's vocabulary has it; empty where it has none of that id."""
        return [self._tokenizer.id_to_token(token_id) or "" for token_id in token_ids]

    def close(self) -> None:
        """End the threads; work not begun is dropped."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def _read_tokenizer(file: Path) -> tokenizers.Tokenizer:
    if not file.is_file():
        raise SettingsError(f"{file} is missing: convert the model's tokenizer to the fast format first")
    try:
        tokenizer = tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8"))
    except Exception as error:  # the tokenizers library raises bare Exception
        raise SettingsError(f"{file} can't be read: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _read_config(folder: Path, tokenizer: tokenizers.Tokenizer) -> dict[str, Any]:
    model = read_json(folder / "config.json")
    model = {**model, **model.get("text_config", {})}
    return {
        "eos_token_ids": end_tokens(folder, tokenizer),
        "context_length": int(model.get("max_position_embeddings") or 2048),
        "vocab_size": int(model.get("vocab_size") or tokenizer.get_vocab_size(with_added_tokens=True)),
    }


def _read_template(folder: Path) -> ChatTemplate | None:
    config = read_json(folder / "tokenizer_config.json")
    file = folder / "chat_template.jinja"
    source = file.read_text(encoding="utf-8") if file.is_file() else config.get("chat_template")
    if isinstance(source, list):  # several templates by name
        source = next((item["template"] for item in source if item["name"] == "default"), None)
    if not source:
        return None
    special = {name: text for name in SPECIAL_TOKENS if (text := text_of(config.get(name))) is not None}
    return ChatTemplate(source, special)
