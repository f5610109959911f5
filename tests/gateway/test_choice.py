"""A choice follows its tokens through any order of messages."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.gateway.choice import MAX_REQUEUES, Choice
from headrace.gateway.job import Prompt
from headrace.gateway.news import News
from headrace.gateway.text import AnswerText
from headrace.gateway.tokenizer import Tokenizer
from headrace.messages.request import SamplingParams
from headrace.messages.stream import PrefillReport, TokenEvent
from headrace.queue import DELIVERIES_PER_ATTEMPT
from tests.members import member

OUTPUT = list(range(100, 120))


@dataclass
class _Courier:
    """Notes what it is asked to do."""

    requeued: int = 0
    dropped: int = 0
    cancelled: list[int] = field(default_factory=list)

    def requeue(self, choice: Choice) -> None:
        self.requeued += 1

    def drop(self, choice: Choice) -> None:
        self.dropped += 1

    def cancel(self, choice: Choice, attempt: int) -> None:
        self.cancelled.append(attempt)


def _choice(tokenizer: Tokenizer, **sampling: Any) -> Choice:
    params = SamplingParams(**{"max_tokens": 50, **sampling})
    text = AnswerText(tokenizer.vocabulary, (), 0)
    return Choice("r.0", Prompt([1, 2, 3], None), params, text, time.time() + 60, News())


def _event(attempt: int, start: int, end: int) -> TokenEvent:
    finish = "length" if end == len(OUTPUT) else None
    return TokenEvent(
        request_id="r.0", attempt=attempt, position=start, token_ids=OUTPUT[start:end], finish_reason=finish
    )


def _report(attempt: int, **fields: Any) -> PrefillReport:
    values = {"decode_worker": "d0", "queue_ms": 0, "prefill_ms": 0, "handoff_ms": 0, "cached_tokens": 0, **fields}
    return PrefillReport(request_id="r.0", attempt=attempt, **values)


spans = st.tuples(st.integers(0, 60), st.integers(0, 19), st.integers(1, 8))


@settings(deadline=None)
@given(events=st.lists(spans, max_size=40))
def test_no_order_of_messages_doubles_or_loses_a_token(
    tokenizer: Tokenizer, events: list[tuple[int, int, int]]
) -> None:
    """What the choice holds is always a prefix of the output, whoever sent it, and a finished one holds it all."""
    choice, courier = _choice(tokenizer), _Courier()
    for attempt, start, count in events:
        choice.on_tokens(_event(attempt, start, min(start + count, len(OUTPUT))), member("d0"), courier)
        assert choice.token_ids == OUTPUT[: len(choice.token_ids)]
        assert choice.entry_attempt <= choice.attempt <= choice.last_attempt
    assert courier.requeued == choice.requeues <= MAX_REQUEUES
    if choice.state == "finished":
        assert choice.token_ids == OUTPUT


def test_a_requeued_entry_carries_the_tokens_so_far(tokenizer: Tokenizer) -> None:
    """And an attempt number above all deliveries of the one before."""
    choice, courier = _choice(tokenizer), _Courier()
    choice.on_tokens(_event(0, 0, 3), member("d0"), courier)
    choice.on_leave(member("d1"), courier)
    choice.on_leave(member("d0", epoch=2), courier)
    assert courier.requeued == 0
    choice.on_leave(member("d0"), courier)
    entry = choice.entry("g")
    assert (entry.attempt, entry.generated) == (DELIVERIES_PER_ATTEMPT, 3)
    assert entry.token_ids == [1, 2, 3, *OUTPUT[:3]]
    assert (courier.requeued, courier.dropped) == (1, 1)


def test_a_report_that_names_a_worker_long_gone_queues_anew(tokenizer: Tokenizer) -> None:
    """Nobody else would notice that its tokens never come."""
    choice, courier = _choice(tokenizer), _Courier()
    choice.on_report(_report(0), member("p0"), None, courier)
    assert courier.requeued == 1


def test_attempts_that_were_never_issued_count_for_nothing(tokenizer: Tokenizer) -> None:
    """A worker can't push its own attempt above the gateway's numbers."""
    choice, courier = _choice(tokenizer), _Courier()
    assert choice.on_tokens(_event(DELIVERIES_PER_ATTEMPT, 0, 3), member("d0"), courier) == 0
    assert choice.token_ids == []


def test_prompt_logprobs_are_asked_for_once(tokenizer: Tokenizer) -> None:
    """A later attempt need not compute them again."""
    choice, courier = _choice(tokenizer, prompt_logprobs=0), _Courier()
    assert choice.entry("g").sampling.prompt_logprobs == 0
    scores = [{"token_id": 1, "logprob": -1.0, "top": []}] * 2
    choice.on_report(_report(0, prompt_logprobs=scores), member("p0"), member("d0"), courier)
    assert choice.entry("g").sampling.prompt_logprobs is None


def test_a_report_without_the_prompt_logprobs_asked_for_is_a_failure(tokenizer: Tokenizer) -> None:
    """Rather than an answer with holes."""
    choice, courier = _choice(tokenizer, prompt_logprobs=0), _Courier()
    choice.on_report(_report(0), member("p0"), member("d0"), courier)
    assert choice.state == "failed"
    assert courier.dropped == 1
