"""Text, stop strings and log probabilities of one answer, in step."""

from __future__ import annotations

from headrace.gateway.text import AnswerText, Delta
from headrace.gateway.tokenizer import Tokenizer
from tests.gateway.workers import scores


def _run(tokenizer: Tokenizer, text: str, stops: tuple[str, ...] = (), min_tokens: int = 0) -> tuple[Delta, bool]:
    answer = AnswerText(tokenizer.vocabulary, stops, min_tokens)
    for token_id in tokenizer.encode(text, add_special_tokens=False):
        answer.push(token_id, scores(token_id, 0))
    answer.finish()
    return answer.take(), answer.stopped


def test_tokens_are_told_of_with_their_text_and_place(tokenizer: Tokenizer) -> None:
    """Each token's offset is where its first character stands."""
    delta, stopped = _run(tokenizer, "Hello 🦊 world")
    assert (delta.text, stopped) == ("Hello 🦊 world", False)
    assert b"".join(tokenizer.vocabulary.bytes_of(t.scores.token_id) for t in delta.tokens).decode() == delta.text
    assert [token.offset for token in delta.tokens] == sorted(token.offset for token in delta.tokens)


def test_tokens_of_the_stop_string_are_not_told_of(tokenizer: Tokenizer) -> None:
    """Neither are tokens after it."""
    delta, stopped = _run(tokenizer, "one two three four", (" three",))
    assert (delta.text, stopped) == ("one two", True)
    assert [tokenizer.vocabulary.name_of(t.scores.token_id) for t in delta.tokens] == ["one", " two"]


def test_held_back_text_comes_out_at_the_end(tokenizer: Tokenizer) -> None:
    """A beginning of a stop string that never came."""
    answer = AnswerText(tokenizer.vocabulary, ("lazy dog!",), 0)
    for token_id in tokenizer.encode("the lazy dog", add_special_tokens=False):
        answer.push(token_id, None)
    assert answer.take().text == "the "
    answer.finish()
    assert answer.take().text == "lazy dog"


def test_stop_strings_count_only_after_min_tokens(tokenizer: Tokenizer) -> None:
    """As vLLM has it: text made before is not searched."""
    assert _run(tokenizer, "stop and stop again", ("stop",), min_tokens=2)[0].text == "stop and "


def test_broken_bytes_at_the_end_are_shown_as_one_replacement(tokenizer: Tokenizer) -> None:
    """The tokens that carry them are told of too."""
    answer = AnswerText(tokenizer.vocabulary, (), 0)
    first = tokenizer.encode("🦊", add_special_tokens=False)[0]
    answer.push(first, scores(first, 0))
    assert not answer.take()
    answer.finish()
    delta = answer.take()
    assert delta.text == "\ufffd"
    assert len(delta.tokens) == 1
