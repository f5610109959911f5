"""Structured output: which tokens a grammar lets a request say next.

The work is `llguidance`'s: a lexer of regex derivatives under an Earley parser, which goes through the tree of all
tokens' bytes. Grammars travel as its own text, which the gateway makes and checks and the workers compile once more.
Every bound of theirs is here: the text's length, what compiling may take, what one mask may take, the lexer's states.

A matcher follows the output alone. So a request that another worker goes on with has its tokens so far replayed there.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tokenizers

from headrace.messages.request import MAX_GRAMMAR_CHARACTERS, MAX_GRAMMAR_TEXT, SamplingParams
from headrace.models.end_tokens import end_tokens

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MAX_COMPILED = 32
"""Grammars kept; a matcher in use keeps its own."""
MAX_GBNF_CHARACTERS = 8192
"""Some tenths of a second: it is turned into Lark's notation in a time that grows with the square."""
MAX_LEXER_STATES = 10_000
"""Of one grammar, 1 to 2 kB each; found as outputs need them, and shared by these."""
RENEWAL_TOKENS = 256
"""An output that fills a new lexer sooner is given up."""
WHITESPACE = r"[\x20\x0A\x0D\x09]{1,20}"
"""Between two tokens of JSON at most: enough for a line break and five levels of indentation, and a model that loops
comes to an end."""


class GrammarError(ValueError):
    """A grammar that can't be used; the message says why."""


def of_json_schema(schema: Any) -> str:
    """The grammar of a JSON schema's texts. Raises `GrammarError` where it is too long, and no object."""
    from llguidance import LLMatcher

    try:
        text = _check_length(json.dumps(schema, ensure_ascii=False, allow_nan=False))
        return LLMatcher.grammar_from_json_schema(text, overrides={"whitespace_pattern": WHITESPACE})
    except RecursionError as error:
        raise GrammarError("it is nested too deep") from error
    except ValueError as error:
        raise GrammarError(str(error)) from error


def of_regex(pattern: str) -> str:
    """The grammar of a regular expression in Rust's syntax, of the whole text."""
    from llguidance import LLMatcher

    return LLMatcher.grammar_from_regex(_check_length(pattern))


def of_choice(texts: Sequence[str]) -> str:
    """The grammar of exactly these texts."""
    from llguidance import LLMatcher

    return LLMatcher.grammar_from_lark("start: " + " | ".join(map(json.dumps, texts)))


def of_grammar(text: str) -> str:
    """A context-free grammar, in Lark's notation or llama.cpp's (GBNF). Raises `GrammarError`."""
    from llguidance import grammar_from

    if "::=" in text and len(text) > MAX_GBNF_CHARACTERS:
        raise GrammarError(f"in llama.cpp's notation it may have {MAX_GBNF_CHARACTERS} characters: write it in Lark's")
    try:
        return grammar_from("grammar", _check_length(text))
    except ValueError as error:
        raise GrammarError(str(error)) from error


def _check_length(text: str) -> str:
    if len(text) > MAX_GRAMMAR_CHARACTERS:
        raise GrammarError(f"it is longer than {MAX_GRAMMAR_CHARACTERS} characters")
    return text


class Grammars:
    """The grammars of one model's requests, compiled. Safe in any thread; compiling and reading leave others theirs.

    The tokenizer is read when the first grammar comes, if not before (`load_soon`): half a second and 45 MB with
    49,152 tokens.
    """

    def __init__(self, folder: Path, vocabulary: int) -> None:
        """`vocabulary`: of the model's logits; ids that its tokenizer does not have are never allowed."""
        self._folder = folder
        self.vocabulary = vocabulary
        self._loading = threading.Lock()
        self._tokenizer: LLTokenizer | None = None
        self._lock = threading.Lock()
        self._compiled: OrderedDict[str, Future[LLMatcher]] = OrderedDict()

    def load_soon(self) -> None:
        """Read the tokenizer on a thread of its own; what is wrong with it those will hear who come with a grammar.

        Both libraries let no other thread of the process run Python meanwhile: for a process that does not serve yet.
        """
        threading.Thread(target=self._load_quietly, name="grammars").start()

    def _load_quietly(self) -> None:
        with contextlib.suppress(GrammarError):
            self._load_tokenizer()

    def compile(self, grammar: str) -> LLMatcher:
        """A matcher at its start, to be copied; the copies share a lexer.

        Raises `GrammarError`. Takes milliseconds, or some tenths of a second.
        """
        if len(grammar) > MAX_GRAMMAR_TEXT:
            raise GrammarError(f"as a grammar it is longer than {MAX_GRAMMAR_TEXT} characters")
        with self._lock:
            found = self._compiled.get(grammar)
            if is_new := found is None:
                found = self._compiled[grammar] = Future()
                if len(self._compiled) > MAX_COMPILED:
                    self._compiled.popitem(last=False)
            self._compiled.move_to_end(grammar)
        assert found is not None
        if is_new:
            try:
                found.set_result(self._compile(grammar))
            except GrammarError as error:
                found.set_exception(error)
            except BaseException as error:  # which a panic in the library is
                found.set_exception(GrammarError(f"it can't be compiled: {error!r}"))
        return found.result()

    def renew(self, grammar: str, full: LLMatcher) -> LLMatcher:
        """The same without the states that outputs have brought to the lexer of `full`, an earlier one."""
        with self._lock:
            found = self._compiled.get(grammar)
            if found is not None and found.done() and found.exception() is None and found.result() is full:
                del self._compiled[grammar]
        return self.compile(grammar)

    def prepare(self, grammar: str) -> None:
        """Compile it for those who will ask; what is wrong with it they will hear."""
        with contextlib.suppress(GrammarError):
            self.compile(grammar)

    def matcher(self, sampling: SamplingParams) -> Matcher | None:
        """For one request; None where it may say what it likes."""
        return None if sampling.grammar is None else Matcher(self, sampling.grammar, sampling)

    def _compile(self, grammar: str) -> LLMatcher:
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(max_lexer_states=MAX_LEXER_STATES, verbose_errors=False)
        matcher = LLMatcher(self._load_tokenizer(), grammar, log_level=0, limits=limits)
        if matcher.is_error():
            raise GrammarError(_reason(matcher))
        return matcher

    def _load_tokenizer(self) -> LLTokenizer:
        from llguidance import LLTokenizer

        with self._loading:
            if self._tokenizer is None:
                try:
                    tokenizer = tokenizers.Tokenizer.from_file(str(self._folder / "tokenizer.json"))
                    ends = list(end_tokens(self._folder, tokenizer))
                    if not ends:
                        raise ValueError("it names no token that ends an output")
                    tokenizer.no_truncation()
                    tokenizer.no_padding()
                    self._tokenizer = LLTokenizer(tokenizer.to_str(), n_vocab=self.vocabulary, eos_token=ends)
                except Exception as error:  # both libraries raise bare Exceptions
                    raise GrammarError(f"the model's tokenizer does not suit structured output: {error}") from error
            return self._tokenizer


class Matcher:
    """Where one request's output stands in its grammar. It belongs to one thread at a time, and never raises.

    Once something went wrong `error` says what, and only tokens that end the output are allowed.
    """

    def __init__(self, grammars: Grammars, grammar: str, sampling: SamplingParams) -> None:
        self._grammars = grammars
        self._grammar = grammar
        self._compiled: LLMatcher | None = None
        self._matcher: LLMatcher | None = None
        """A copy of that."""
        self._min_tokens = sampling.min_tokens
        self._ends = sampling.stop_token_ids
        self._output: list[int] = []
        self._renewed_at = -RENEWAL_TOKENS
        self.error: str | None = None

    def start(self, output: Sequence[int]) -> None:
        """Begin anew, after these output tokens. Compiles the grammar where nobody has."""
        self.error, self._output = None, []
        try:
            self._compiled = self._grammars.compile(self._grammar)
        except GrammarError as error:
            self.error = str(error)
        else:
            self._matcher = self._compiled.deep_copy()
            self.advance(output)

    def advance(self, token_ids: Sequence[int]) -> None:
        """Take output tokens. After the end of the grammar's text there can only be more tokens that end the output."""
        self._output += token_ids
        if self._matcher is not None:
            _consume(self._matcher, token_ids)
            if self._matcher.is_error() and not self._renew():
                self.error = self.error or _reason(self._matcher)

    def standing(self, draft: Sequence[int]) -> int:
        """How many tokens of a draft are allowed, one after the other."""
        return 0 if self._matcher is None else self._matcher.validate_tokens(list(draft))

    def fill(self, masks: np.ndarray, draft: Sequence[int]) -> None:
        """Which tokens are allowed next, and after each token of a draft, up to one that is not.

        masks [1 + draft's length, ceil(V / 32)] int32, a bit a token, the lowest one first. Before `min_tokens` the
        output ends only where the grammar has nothing else.
        """
        if self._matcher is None:
            masks[:] = _bits(self._ends, masks.shape[1])
            return
        self._fill(self._matcher, masks, draft)
        if self._matcher.is_error() and self._renew():
            self._fill(self._matcher, masks, draft)
        if self._matcher.is_error():
            self.error = self.error or _reason(self._matcher)

    def _fill(self, matcher: LLMatcher, masks: np.ndarray, draft: Sequence[int]) -> None:
        taken = 0
        for row in masks:
            row[:] = np.frombuffer(matcher.compute_bitmask(), np.int32)[: len(row)]
            is_early = len(self._output) + taken < self._min_tokens
            if is_early and (without := row & ~_bits(self._ends, len(row))).any():
                row[:] = without
            if taken == len(draft) or not matcher.try_consume_tokens([draft[taken]]):
                break
            taken += 1
        masks[taken + 1 :] = masks[taken]  # where the text is at its end; elsewhere nothing is drawn with these
        matcher.rollback(taken)

    def _renew(self) -> bool:
        """Where the lexer is full, of what all outputs of the grammar brought to it, go on with a new one.

        False where that is not what is wrong, or where this output alone fills one too soon.
        """
        assert self._matcher is not None
        assert self._compiled is not None
        too_soon = len(self._output) - self._renewed_at < RENEWAL_TOKENS
        if too_soon or "too many states" not in self._matcher.get_error():
            return False
        self._renewed_at = len(self._output)
        try:
            self._compiled = self._grammars.renew(self._grammar, self._compiled)
        except GrammarError:
            return False
        self._matcher = self._compiled.deep_copy()
        _consume(self._matcher, self._output)
        return not self._matcher.is_error()


def _consume(matcher: LLMatcher, token_ids: Sequence[int]) -> None:
    taken = matcher.try_consume_tokens(list(token_ids))
    if not matcher.is_stopped() and taken < len(token_ids):
        matcher.consume_token(token_ids[taken])  # which is an error, for good


def _reason(matcher: LLMatcher) -> str:
    return matcher.get_error().removesuffix("<non-verbose/>").strip()


def _bits(token_ids: Sequence[int], words: int) -> np.ndarray:
    """[words] int32: these tokens' bits."""
    bits = np.zeros(words * 32, np.uint8)
    bits[[token for token in token_ids if token < len(bits)]] = 1
    return np.packbits(bits, bitorder="little").view(np.int32)
