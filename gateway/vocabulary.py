"""The bytes that each token stands for, from a `tokenizer.json`.

Two kinds of decoder cover the published language models: byte-level (GPT-2's table of 256 printable characters) and
SentencePiece's (`▁` for a space, `<0xE4>` for a byte). Bytes, not text, are what tokens really carry: a code point
may span several of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import tokenizers

BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class UnsupportedTokenizer(ValueError):
    """The tokenizer's decoder is of a kind that can't be decoded token by token."""


class Vocabulary:
    """Token id -> bytes, filled as ids are asked for."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._to_bytes = _piece_decoder(json.loads(tokenizer.to_str())["decoder"])
        added = tokenizer.get_added_tokens_decoder()
        self._added = {token_id: token.content.encode() for token_id, token in added.items()}
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self._known: dict[int, bytes] = {}

    def bytes_of(self, token_id: int) -> bytes:
        """The bytes of one token; a special token's are its name, those of an id without a token are empty."""
        known = self._known.get(token_id)
        if known is None:
            known = self._known[token_id] = self._look_up(token_id)
        return known

    def name_of(self, token_id: int) -> str:
        r"""The token as the API shows it: its text, or `\xe4\xb8` for part of a code point."""
        raw = self.bytes_of(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "".join(f"\\x{byte:02x}" for byte in raw)

    def _look_up(self, token_id: int) -> bytes:
        if token_id in self._added:
            return self._added[token_id]
        piece = self._tokenizer.id_to_token(token_id)
        return b"" if piece is None else self._to_bytes(piece)


def _piece_decoder(decoder: dict[str, Any] | None) -> Callable[[str], bytes]:
    steps = decoder.get("decoders", [decoder]) if decoder else []
    kinds = {step["type"] for step in steps}
    if "ByteLevel" in kinds:
        return _byte_level
    if steps and kinds <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}:
        return _sentencepiece
    raise UnsupportedTokenizer(
        f"the tokenizer's decoder ({', '.join(sorted(kinds)) or 'none'}) is neither byte-level nor SentencePiece's: "
        "Headrace can't stream its text"
    )


def _byte_level(piece: str) -> bytes:
    try:
        return bytes(BYTE_OF[character] for character in piece)
    except KeyError:  # not made of the table's characters: the tokenizers library takes it as it is
        return piece.encode()


def _sentencepiece(piece: str) -> bytes:
    byte = BYTE_PIECE.fullmatch(piece)
    return bytes([int(byte[1], 16)]) if byte else piece.replace("▁", " ").encode()


def _gpt2_table() -> dict[str, int]:
    """The printable character that stands for each byte in byte-level BPE (GPT-2's `bytes_to_unicode`), inverted."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    table = {chr(byte): byte for byte in printable}
    table.update({chr(256 + index): byte for index, byte in enumerate(others)})
    return table


BYTE_OF = _gpt2_table()
