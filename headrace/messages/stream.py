"""Workers -> gateway: tokens, and how a request's prefill went or why it failed."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from headrace.wire import Attempt, Count, MeshId, Message, Milliseconds, Record, RequestId, TokenId

MAX_EVENT_TOKENS = 4096
FinishReason = Literal["stop", "length"]


class TokenLogprobs(Record, frozen=True, kw_only=True):
    """Log probabilities (natural) at one position: of the model's own distribution, before temperature, penalties and
    filters, but among the tokens that the request's grammar allows.
    """

    token_id: TokenId
    logprob: float
    top: list[tuple[TokenId, float]]
    """Likeliest tokens first."""


class TokenEvent(Record, frozen=True, kw_only=False, array_like=True, gc=False):
    """New tokens of one request. Without names on the wire: most messages by far are these.

    `position` is the index of `token_ids[0]` in the output, counted from 0 over all attempts. With finish reason
    `stop` the last token is the stop token itself; it counts as generated and is not part of the text.
    """

    request_id: RequestId
    attempt: Attempt
    position: Count
    token_ids: Annotated[list[TokenId], msgspec.Meta(min_length=1, max_length=MAX_EVENT_TOKENS)]
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None


class TokenBatch(Message, frozen=True, kw_only=True):
    """Tokens for one gateway: first ones, those of a decode step with drafts, and those that were asked for again."""

    events: list[TokenEvent]


class TokenColumns(Message, frozen=True, kw_only=True):
    """What a decode step without drafts made for one gateway: the `TokenEvent`s of a token each, in columns.

    Raises `ValueError` where columns differ in length.
    """

    requests: list[tuple[RequestId, Attempt]]
    positions: list[Count]
    token_ids: list[TokenId]
    logprobs: dict[int, TokenLogprobs] = {}
    """By index, as are the finish reasons."""
    finish_reasons: dict[int, FinishReason] = {}

    def __post_init__(self) -> None:
        if not len(self.requests) == len(self.positions) == len(self.token_ids):
            raise ValueError("columns of different lengths")

    @property
    def events(self) -> list[TokenEvent]:
        """The same, one after the other."""
        scores_of, reason_of = self.logprobs.get, self.finish_reasons.get
        columns = zip(self.requests, self.positions, self.token_ids, strict=True)
        return [
            TokenEvent(
                request_id,
                attempt,
                position,
                [token_id],
                None if (scores := scores_of(index)) is None else [scores],
                reason_of(index),
            )
            for index, ((request_id, attempt), position, token_id) in enumerate(columns)
        ]


class PrefillReport(Message, frozen=True, kw_only=True):
    """How a prefill went, once its handoff is acknowledged, or once a request with `max_tokens` 0 is computed."""

    request_id: RequestId
    attempt: Attempt
    decode_worker: MeshId | None
    """None where there was nothing to decode (`max_tokens` 0): the report is then the end of the request."""
    queue_ms: Milliseconds
    """From the gateway's append to the worker's take."""
    prefill_ms: Milliseconds
    """From the take to the first token."""
    handoff_ms: Milliseconds
    """From the first token to the decode worker's acknowledgement."""
    cached_tokens: Count
    """Prompt tokens found in the prefix cache."""
    in_place: bool = False
    """The decode worker computed the prompt itself; `prefill_ms` is until it had, and `handoff_ms` 0."""
    prompt_logprobs: list[TokenLogprobs] | None = None
    """One for each prompt token but the first. May arrive before or after the first `TokenEvent`."""


FailureCode = Literal["invalid_request", "overloaded", "deadline", "preempted", "worker_stopping", "worker_error"]


class RequestFailed(Message, frozen=True, kw_only=True):
    """The worker gives the request up. `retryable` says that another attempt may succeed."""

    request_id: RequestId
    attempt: Attempt
    code: FailureCode
    message: str
    retryable: bool


class Moved(Message, frozen=True, kw_only=True):
    """Another decode worker has the request now and goes on with it, in the same attempt."""

    request_id: RequestId
    attempt: Attempt
    decode_worker: MeshId


class Flush(Message, frozen=True):
    """The sender is about to leave: answer with `Flushed` when all that it sent before has been taken."""


ToGateway = TokenBatch | TokenColumns | PrefillReport | RequestFailed | Moved | Flush
