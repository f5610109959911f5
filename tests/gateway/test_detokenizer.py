"""Detokenizing token by token gives what decoding at once gives, and never half a character."""

from __future__ import annotations

import pytest
import tokenizers
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models

from headrace.gateway.detokenizer import Detokenizer
from headrace.gateway.tokenizer import Tokenizer
from headrace.gateway.vocabulary import UnsupportedTokenizer, Vocabulary


def _pieces(vocabulary: Vocabulary, ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(vocabulary)
    return [*(detokenizer.push(token_id) for token_id in ids), detokenizer.flush()]


def _sentencepiece() -> tokenizers.Tokenizer:
    """A tokenizer in the manner of Llama 2 whose only whole words are two."""
    words = ["<unk>", "<s>", "▁Hello", "▁world", *(f"<0x{byte:02X}>" for byte in range(256))]
    model = models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=[], byte_fallback=True)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_random_tokens_read_as_the_full_decode(tokenizer: Tokenizer, data: st.DataObject) -> None:
    """Whatever a model may emit, special tokens and broken bytes included."""
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocabulary_size - 1), max_size=40))
    assert "".join(_pieces(tokenizer.vocabulary, ids)) == tokenizer._tokenizer.decode(ids, skip_special_tokens=True)


@settings(deadline=None, max_examples=200)
@given(text=st.text(max_size=40))
def test_unicode_text_never_shows_a_broken_character(tokenizer: Tokenizer, text: str) -> None:
    """Every piece but those of the text itself is free of U+FFFD."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    pieces = _pieces(tokenizer.vocabulary, ids)
    decoded = tokenizer._tokenizer.decode(ids, skip_special_tokens=True)
    assert "".join(pieces) == decoded
    assume(decoded == text)  # this vocabulary lacks a few bytes of rare planes
    assert sum(piece.count("\ufffd") for piece in pieces) == text.count("\ufffd")


@given(text=st.text(max_size=20))
def test_byte_fallback_shows_a_character_when_its_last_byte_is_there(text: str) -> None:
    """Bytes of SentencePiece's fallback are joined to characters."""
    tokenizer = _sentencepiece()
    ids = [2, *(4 + byte for byte in text.encode()), 3]
    pieces = _pieces(Vocabulary(tokenizer), ids)
    assert "".join(pieces) == f" Hello{text} world" == tokenizer.decode(ids)
    assert all(len(piece) <= 1 for piece in pieces[1:-2])


def test_an_output_that_ends_inside_a_character_ends_in_one_replacement(tokenizer: Tokenizer) -> None:
    """Flushing says that something is missing."""
    ids = tokenizer.encode("🦊", add_special_tokens=False)
    assert len(ids) > 1
    assert "".join(_pieces(tokenizer.vocabulary, ids[:-1])) == "\ufffd"


def test_special_tokens_and_unknown_ids_have_no_text(tokenizer: Tokenizer) -> None:
    """Padding rows of the embedding have no token."""
    assert _pieces(tokenizer.vocabulary, [0, 1, 2, 49152 + 5]) == [""] * 5


def test_names_show_the_bytes_of_part_of_a_character(tokenizer: Tokenizer) -> None:
    """As OpenAI shows them."""
    first = tokenizer.encode("🦊", add_special_tokens=False)[0]
    assert tokenizer.vocabulary.name_of(first).startswith("\\xf0")
    assert tokenizer.vocabulary.name_of(2) == "<|im_end|>"


def test_a_decoder_of_another_kind_is_refused() -> None:
    """WordPiece can't be read token by token."""
    tokenizer = tokenizers.Tokenizer(models.WordPiece(vocab={"[UNK]": 0}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    with pytest.raises(UnsupportedTokenizer, match="WordPiece"):
        Vocabulary(tokenizer)
