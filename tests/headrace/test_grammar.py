"""What grammars allow, without a model: walks at random through the built-in model's vocabulary."""

from __future__ import annotations

import json
import random
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headrace import grammar
from headrace.grammar import (
    MAX_COMPILED,
    Grammars,
    Matcher,
    of_choice,
    of_grammar,
    of_json_schema,
    of_regex,
)
from headrace.grammar import GrammarError as Error
from headrace.messages.request import MAX_GRAMMAR_CHARACTERS, SamplingParams
from headrace.models.locate import locate_model

VOCABULARY, WORDS, END = 49152, 1536, 2


@pytest.fixture(scope="module")
def folder() -> Path:
    """The built-in model's."""
    return locate_model("smollm2").path


@pytest.fixture(scope="module")
def grammars(folder: Path) -> Grammars:
    """Its vocabulary."""
    return Grammars(folder, VOCABULARY)


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> tokenizers.Tokenizer:
    """Its tokenizer."""
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


def started(grammars: Grammars, grammar: str, **fields: Any) -> Matcher:
    """A matcher at the start of an output."""
    values = {"max_tokens": 99, "stop_token_ids": (END,), "grammar": grammar, **fields}
    matcher = grammars.matcher(SamplingParams(**values))
    assert matcher is not None
    matcher.start([])
    return matcher


def allowed(matcher: Matcher, draft: list[int] | None = None) -> list[np.ndarray]:
    """The tokens that may come next, and after each token of a draft."""
    masks = np.zeros((1 + len(draft or ()), WORDS), np.int32)
    matcher.fill(masks, draft or [])
    return [np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little")) for row in masks]


def walk(grammars: Grammars, grammar: str, seed: int, longest: int = 600) -> list[int]:
    """Tokens at random, the end as soon as it may come; without the end token."""
    chance, matcher, output = random.Random(seed), started(grammars, grammar), list[int]()
    while len(output) < longest:
        (choices,) = allowed(matcher)
        assert len(choices), output
        if END in choices:
            return output
        output.append(int(choices[chance.randrange(len(choices))]))
        matcher.advance(output[-1:])
        assert matcher.error is None
    raise AssertionError("no end")


TEXTS = st.text(st.characters(codec="utf-8", max_codepoint=0xFFFF), max_size=5)
"""The vocabulary has no token for some bytes that only rarer characters have."""
LEAVES = st.one_of(
    st.builds(
        lambda low, more: {"type": "integer", "minimum": low, "maximum": low + more},
        st.integers(-50, 50),
        st.integers(0, 99),
    ),
    st.builds(lambda longest: {"type": "string", "maxLength": longest}, st.integers(0, 6)),
    st.builds(lambda values: {"enum": values}, st.lists(TEXTS | st.integers(-9, 9), min_size=1)),
    st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"const": {"a": [1, "é"]}}, {"type": ["boolean", "null"]}]),
    st.sampled_from([{"type": "string", "format": "date"}, {"type": "string", "pattern": "^[a-c]{2,4}$"}]),
)


def objects(values: Any) -> Any:
    """Schemas of objects with these values, some of them required."""
    names = st.text('abé"\\ ', min_size=1, max_size=4)
    return st.dictionaries(names, values, max_size=3).flatmap(
        lambda properties: st.builds(
            lambda required: {
                "type": "object",
                "properties": properties,
                "required": required,
                "additionalProperties": False,
            },
            st.lists(st.sampled_from(sorted(properties)), unique=True) if properties else st.just([]),
        )
    )


def nested(values: Any) -> Any:
    """One level more."""
    arrays = st.builds(
        lambda items, least, more: {"type": "array", "items": items, "minItems": least, "maxItems": least + more},
        values,
        st.integers(0, 2),
        st.integers(0, 2),
    )
    return st.one_of(arrays, objects(values), st.builds(lambda some: {"anyOf": some}, st.lists(values, min_size=1)))


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(schema=st.recursive(LEAVES, nested, max_leaves=6), seed=st.integers(0, 2**32))
def test_any_walk_through_a_schema_is_json_that_it_accepts(
    grammars: Grammars, tokenizer: tokenizers.Tokenizer, schema: dict[str, Any], seed: int
) -> None:
    """Also where a model is of no help."""
    output = walk(grammars, of_json_schema(schema), seed)
    jsonschema.validate(json.loads(tokenizer.decode(output)), schema)


@pytest.mark.parametrize("seed", range(5))
def test_other_grammars_are_followed_to_the_letter(
    grammars: Grammars, tokenizer: tokenizers.Tokenizer, seed: int
) -> None:
    """Regular expressions match the whole text, choices are exact, and both notations of grammars are read."""
    assert re.fullmatch(r"[a-z]{3}-\d{2,4}", tokenizer.decode(walk(grammars, of_regex("[a-z]{3}-[0-9]{2,4}"), seed)))
    choices = ["yes", 'no "maybe"', "ja\n", "はい"]
    assert tokenizer.decode(walk(grammars, of_choice(choices), seed)) in choices
    for notation in ('start: "a" | "(" start ")"', 'root ::= "a" | "(" root ")"'):
        assert re.fullmatch(r"(\(*)a(\)*)", tokenizer.decode(walk(grammars, of_grammar(notation), seed)))


def test_whitespace_comes_to_an_end(grammars: Grammars, tokenizer: tokenizers.Tokenizer) -> None:
    """Where a weak model would write blanks for ever."""
    matcher = started(grammars, of_json_schema({"type": "object"}))
    (opening,) = tokenizer.encode("{").ids
    (blank,) = tokenizer.encode(" ").ids
    matcher.advance([opening])
    written = 0
    while blank in allowed(matcher)[0]:
        matcher.advance([blank])
        written += 1
    assert written == 20


def test_masks_along_a_draft_are_those_of_its_tokens_one_by_one(
    grammars: Grammars, tokenizer: tokenizers.Tokenizer
) -> None:
    """Up to a token that is not allowed; and the draft leaves no trace."""
    grammar = of_json_schema({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]})
    draft = tokenizer.encode('{"a": 12}').ids
    matcher, single = started(grammars, grammar), started(grammars, grammar)
    along = allowed(matcher, [*draft, END, END])
    for step, token in enumerate([*draft, END]):
        assert along[step].tolist() == allowed(single)[0].tolist()
        single.advance([token])
    wrong = tokenizer.encode("x").ids
    assert allowed(matcher, [draft[0], *wrong, *draft])[1].tolist() == along[1].tolist()
    assert matcher.standing([*draft[:3], *wrong, *draft]) == 3
    assert matcher.standing([*draft, END]) == len(draft) + 1
    assert matcher.error is None
    assert allowed(matcher)[0].tolist() == along[0].tolist()


@pytest.mark.parametrize("form", [of_choice(["ab"]), of_regex("ab+"), of_regex("ab?")])
def test_after_the_end_there_are_only_ends(grammars: Grammars, tokenizer: tokenizers.Tokenizer, form: str) -> None:
    """As many as one likes, also in drafts."""
    matcher, single = started(grammars, form), started(grammars, form)
    draft = [*tokenizer.encode("ab").ids, END, END, END]
    along = allowed(matcher, draft)
    matcher.advance(draft)
    for step, token in enumerate(draft):
        assert along[step].tolist() == allowed(single)[0].tolist()
        single.advance([token])
    assert (matcher.error, single.error) == (None, None)
    assert [choices.tolist() for choices in allowed(matcher, [END, END])] == [[END]] * 3


def test_a_matcher_may_start_again_anywhere(grammars: Grammars, tokenizer: tokenizers.Tokenizer) -> None:
    """As after a failover, or a move that failed."""
    grammar = of_json_schema({"type": "array", "items": {"type": "string"}})
    output = tokenizer.encode('["abc", "d", "').ids
    one = started(grammars, grammar)
    one.advance(output)
    other = started(grammars, grammar)
    other.advance(output[:5])
    other.start(output)
    assert allowed(one)[0].tolist() == allowed(other)[0].tolist()


def test_before_min_tokens_the_end_comes_only_where_nothing_else_can(
    grammars: Grammars, tokenizer: tokenizers.Tokenizer
) -> None:
    """The grammar wins."""
    matcher = started(grammars, of_regex("a{1,3}"), min_tokens=4)
    (letter,) = tokenizer.encode("a").ids
    matcher.advance([letter])
    assert END not in allowed(matcher)[0]
    assert [END in choices for choices in allowed(matcher, [letter])] == [False, False]
    matcher.advance([letter, letter])
    assert allowed(matcher)[0].tolist() == [END]


def test_what_does_not_follow_is_told_and_only_the_end_may_come(grammars: Grammars) -> None:
    """Nothing is raised on the thread that runs the model."""
    matcher = started(grammars, of_choice(["yes"]))
    matcher.advance([5000])
    assert matcher.error
    assert allowed(matcher)[0].tolist() == [END]
    assert matcher.standing([5000]) == 0
    broken = started(grammars, of_regex("("))
    assert "unclosed group" in (broken.error or "")
    assert allowed(broken)[0].tolist() == [END]


def write_letters(matcher: Matcher, tokenizer: tokenizers.Tokenizer, seed: int, count: int) -> None:
    """At random, until the output has to end; a pattern's states may double with each."""
    letters, chance = [tokenizer.encode(letter).ids[0] for letter in "ab"], random.Random(seed)
    for _ in range(count):
        matcher.advance([letters[chance.randrange(2)]])
        if allowed(matcher)[0].tolist() == [END]:
            break


def test_an_output_that_fills_its_lexer_at_once_ends(
    folder: Path, tokenizer: tokenizers.Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory is bounded."""
    monkeypatch.setattr(grammar, "MAX_LEXER_STATES", 200)
    matcher = started(Grammars(folder, VOCABULARY), of_regex("(a|b)*a(a|b){18}c"))
    write_letters(matcher, tokenizer, 0, 1000)
    assert "too many states" in (matcher.error or "")
    assert allowed(matcher)[0].tolist() == [END]


def test_outputs_that_fill_their_lexer_together_go_on_with_a_new_one(
    folder: Path, tokenizer: tokenizers.Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often a grammar is used, and also while one of its outputs is long."""
    monkeypatch.setattr(grammar, "MAX_LEXER_STATES", 4000)
    grammars, pattern = Grammars(folder, VOCABULARY), of_regex("(a|b)*a(a|b){18}c")
    first = grammars.compile(pattern)
    long = started(grammars, pattern)
    for seed in range(12):
        other = started(grammars, pattern)
        write_letters(other, tokenizer, seed, 60)
        write_letters(long, tokenizer, seed, 60)
        assert (other.error, long.error) == (None, None)
    assert grammars.compile(pattern) is not first
    fresh = started(Grammars(folder, VOCABULARY), pattern)
    fresh.advance(long._output)
    assert allowed(fresh)[0].tolist() == allowed(long)[0].tolist()


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "objekt"}, "Invalid type: objekt"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"$ref": "https://example.org/schema"}, "does not fetch"),
        ({"$ref": "#/nowhere"}, "does not exist"),
        ({"allOf": [{"type": "string"}, {"type": "number"}]}, "Unsatisfiable"),
        ({"description": "x" * MAX_GRAMMAR_CHARACTERS}, "longer than"),
        ({"enum": [float("nan")]}, "not JSON compliant"),
    ],
)
def test_a_schema_that_cannot_be_followed_is_refused(grammars: Grammars, schema: Any, reason: str) -> None:
    """With a reason."""
    with pytest.raises(Error, match=reason):
        grammars.compile(of_json_schema(schema))


def test_a_grammar_is_compiled_once_and_few_are_kept(grammars: Grammars) -> None:
    """Also where several threads ask at once; a wrong one stays wrong."""
    grammar, together = of_choice(["once"]), threading.Barrier(4)

    def compile_together(_: int) -> object:
        together.wait(10)
        return grammars.compile(grammar)

    with ThreadPoolExecutor(4) as threads:
        first, *others = threads.map(compile_together, range(4))
    assert all(other is first for other in others)
    for number in range(MAX_COMPILED):
        grammars.compile(of_choice([str(number)]))
    assert grammars.compile(grammar) is not first
    assert len(grammars._compiled) == MAX_COMPILED
    for _ in range(2):
        with pytest.raises(Error):
            grammars.compile(of_regex("("))


def test_a_process_that_starts_reads_the_tokenizer_for_those_to_come(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside what it does then. Where that fails, those hear of it who come with a grammar."""

    def loaded(folder: Path) -> Grammars:
        grammars = Grammars(folder, VOCABULARY)
        grammars.load_soon()
        for thread in threading.enumerate():
            if thread.name == "grammars":
                thread.join()
        return grammars

    grammars = loaded(folder)
    with monkeypatch.context() as patched:
        patched.setattr(grammar, "tokenizers", None)
        grammars.compile(of_choice(["yes"]))
    with pytest.raises(Error, match="does not suit structured output"):
        loaded(tmp_path).compile(of_choice(["yes"]))


def test_a_model_without_a_usable_tokenizer_says_so(tmp_path: Path, folder: Path) -> None:
    """None at all, and one that names no end."""
    with pytest.raises(Error, match="does not suit structured output"):
        Grammars(tmp_path, VOCABULARY).compile(of_choice(["yes"]))
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    with pytest.raises(Error, match="no token that ends an output"):
        Grammars(tmp_path, VOCABULARY).compile(of_choice(["yes"]))
