"""Text to learn from: what the target says, to prompts that it makes itself.

A chat model that is given the opening of a user's turn writes that turn (arXiv:2406.08464), and then the answer.
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from headrace.engine.decode_batch import new_batch
from headrace.engine.engine import Engine, PrefillChunk
from headrace.messages.request import SamplingParams

MARK = "\N{OBJECT REPLACEMENT CHARACTER}"
"""Stands for a message when the chat template is taken apart."""
OPENINGS = (
    "",
    *("What is", "What are", "What should I", "How do I", "How does", "How can I", "Why do", "Why is", "When", "Where"),
    *("Who", "Which", "Can you", "Could you explain", "Explain", "Write a", "Write a short", "Write a story about"),
    *("Give me", "List", "Tell me about", "Describe", "Summarize", "Translate", "Plan", "Suggest", "Help me", "I am"),
    *("I want to", "I need", "My", "Is it", "Are there", "Compare", "Create a", "Make a", "Please", "Hello", "Let's"),
    *("What are some", "What is the best way", "Write an email", "Write a poem", "Tell me a story", "I have", "Do you"),
    *("In Python,", "Write a Python function", "Fix this code:", "Rewrite", "Correct the", "Given", "Imagine", "If"),
)
"""How a user's turn begins, so that turns differ."""
USER_TOKENS = 96
"""A user's turn that has not ended by then is cut."""
JOIN_AT_ONCE = 64
"""So many prompts are computed together: each forward costs the same time to start."""
USER_TEMPERATURE = 0.8
ANSWER_TEMPERATURES = (0.0, 0.0, 0.0, 0.8)


@dataclass(frozen=True)
class Conversation:
    """A prompt and the target's answer."""

    token_ids: list[int]
    answer_start: int
    """Index of the answer's first token."""
    greedy: bool


@dataclass
class _Request:
    token_ids: list[int]
    """So far."""
    turn_start: int
    pages: list[int]
    answers: bool
    temperature: float
    max_tokens: int


@dataclass(frozen=True)
class ChatFrame:
    """The tokens around a user's message. A model without a chat template continues a line of text."""

    before: list[int]
    after: list[int]
    stop_token_ids: frozenset[int]

    @classmethod
    def of(cls, tokenizer: Any) -> ChatFrame:
        """Take the chat template of a `transformers` tokenizer apart."""
        stops = frozenset(token for token in (tokenizer.eos_token_id,) if token is not None)
        if tokenizer.chat_template is None:
            return cls([tokenizer.bos_token_id or 0], tokenizer.encode("\n", add_special_tokens=False), stops)
        message = [{"role": "user", "content": MARK}]
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        before, _, after = text.partition(MARK)
        framed = [tokenizer.encode(part, add_special_tokens=False) for part in (before, after)]
        return cls(framed[0], framed[1], stops)


class ConversationMaker:
    """Keeps a batch of an engine full with conversations, for as long as it is asked for more."""

    def __init__(self, engine: Engine, tokenizer: Any, answer_tokens: int, seed: int, prompts: Sequence[str]) -> None:
        """`prompts`: users' messages to take in turn; without any, the target makes them."""
        self._engine = engine
        self._tokenizer = tokenizer
        self._frame = ChatFrame.of(tokenizer)
        self._answer_tokens = answer_tokens
        self._random = random.Random(seed)
        self._prompts = prompts
        self._running: dict[int, _Request] = {}
        self._waiting: deque[_Request] = deque()
        self._next = 0
        frame = len(self._frame.before) + len(self._frame.after)
        self.longest = min(frame + USER_TOKENS + answer_tokens, engine.max_model_len)
        """Tokens of a conversation at most."""

    def make(self, until: float, limit: int, progress: Callable[[int, int], None]) -> Iterator[Conversation]:
        """Conversations until there are `limit`, or the clock (`time.monotonic`) says `until`.

        `progress` is told, now and then, how many conversations and tokens there are.
        """
        engine, batch = self._engine, new_batch(self._engine)
        conversations = tokens = 0
        while conversations < limit and time.monotonic() < until:
            free = engine.config.max_num_seqs - len(self._running)
            if free >= min(JOIN_AT_ONCE, engine.config.max_num_seqs):
                self._join(batch, min(free, JOIN_AT_ONCE))
            batch.start()
            if batch.in_flight <= batch.lookahead:
                continue
            for key, token in batch.collect():
                request = self._running.get(key)
                if request is None:
                    continue
                request.token_ids.append(token.token_id)
                if not self._is_over(request):
                    continue
                batch.leave(key)
                del self._running[key]
                engine.pool.release(request.pages)
                if request.answers:
                    conversations += 1
                    tokens += len(request.token_ids)
                    yield Conversation(request.token_ids, request.turn_start, request.temperature == 0)
                    if conversations == limit:
                        break
                elif len(request.token_ids) + len(self._frame.after) < self.longest:
                    self._waiting.append(self._answer(request))
            progress(conversations, tokens)
        while batch.in_flight:
            batch.collect()
        for request in self._running.values():
            engine.pool.release(request.pages)
        self._running.clear()

    def _is_over(self, request: _Request) -> bool:
        made = len(request.token_ids) - request.turn_start
        length = len(request.token_ids)
        return (
            request.token_ids[-1] in self._frame.stop_token_ids or made >= request.max_tokens or length >= self.longest
        )

    def _answer(self, request: _Request) -> _Request:
        """What follows a user's turn."""
        tokens = request.token_ids
        while tokens[-1] in self._frame.stop_token_ids:
            tokens = tokens[:-1]
        return self._answer_to([*tokens, *self._frame.after])

    def _answer_to(self, prompt: list[int]) -> _Request:
        temperature = self._random.choice(ANSWER_TEMPERATURES)
        return _Request(prompt, len(prompt), [], True, temperature, self._answer_tokens)

    def _new_request(self) -> _Request:
        before = self._frame.before
        if self._prompts:
            text = self._random.choice(self._prompts)
            own = self._tokenizer.encode(text, add_special_tokens=False)
            room = self.longest - len(before) - len(self._frame.after) - self._answer_tokens
            return self._answer_to([*before, *own[:room], *self._frame.after])
        opening = self._tokenizer.encode(self._random.choice(OPENINGS), add_special_tokens=False)
        return _Request([*before, *opening], len(before), [], False, USER_TEMPERATURE, USER_TOKENS)

    def _join(self, batch: Any, count: int) -> None:
        engine = self._engine
        requests = [self._waiting.popleft() if self._waiting else self._new_request() for _ in range(count)]
        chunks = []
        for request in requests:
            sampling = SamplingParams(
                max_tokens=request.max_tokens, temperature=request.temperature, seed=self._random.randrange(2**31)
            )
            request.pages = engine.pool.allocate(engine.pool.pages_for(self.longest))
            chunks.append(PrefillChunk(request.token_ids, 0, len(request.token_ids), request.pages, sampling))
        for request, chunk, output in zip(requests, chunks, engine.prefill(chunks), strict=True):
            assert output.token is not None, "a whole prompt was computed"
            if output.token.token_id in self._frame.stop_token_ids:  # nothing to learn from
                engine.pool.release(request.pages)
                continue
            request.token_ids = [*request.token_ids, output.token.token_id]
            batch.join(self._next, request.token_ids, 1, request.pages, chunk.sampling)
            self._running[self._next] = request
            self._next += 1
