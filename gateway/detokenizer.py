"""Tokens to text, one at a time: never half a character, never twice the same work."""

from __future__ import annotations

import codecs

from headrace.gateway.vocabulary import Vocabulary

_utf8 = codecs.getincrementaldecoder("utf-8")


class Detokenizer:
    """The text of one output. The pieces joined are the tokens' bytes decoded as UTF-8, bad bytes as U+FFFD.

    For a byte-level tokenizer that is what decoding all tokens at once gives. A SentencePiece decoder differs in two
    points: it drops a leading space (right for a whole text, wrong for one that continues a prompt), and it spoils
    whole runs of byte tokens where one byte is bad.
    """

    def __init__(self, vocabulary: Vocabulary, skip_special: bool = True) -> None:
        self._vocabulary = vocabulary
        self._skipped: frozenset[int] = vocabulary.special_ids if skip_special else frozenset()
        self._decoder = _utf8("replace")

    def push(self, token_id: int) -> str:
        """The text that this token completes; empty inside a code point and for a special token."""
        if token_id in self._skipped:
            return ""
        return self._decoder.decode(self._vocabulary.bytes_of(token_id))

    def flush(self) -> str:
        """U+FFFD where the output ended inside a code point."""
        return self._decoder.decode(b"", final=True)
