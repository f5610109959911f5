"""Gateway -> Redis Stream -> prefill worker: one request to be prefilled."""

from __future__ import annotations

from typing import Annotated

import msgspec

from headrace.wire import Attempt, Count, MeshId, Message, Record, RequestId, TokenId, TraceParent

MAX_TOP_LOGPROBS = 20
MAX_PROMPT_TOKENS = 4_000_000
MAX_GRAMMAR_CHARACTERS = 65_536
"""Of a schema, a regular expression or a grammar, as a client may send it."""
MAX_GRAMMAR_TEXT = 2 * MAX_GRAMMAR_CHARACTERS
"""What is made of it for the workers."""


class SamplingParams(Record, frozen=True, kw_only=True):
    """How to choose each next token. All defaults mean "off", but for `temperature`.

    Sampling is keyed by (`seed`, position), so the same request gives the same tokens on every worker, in every batch
    and in every attempt; the gateway draws a seed where the client gave none.
    """

    max_tokens: Count
    """Output tokens at most, counted from the end of the client's prompt. 0 asks for prompt logprobs alone."""
    temperature: Annotated[float, msgspec.Meta(ge=0, le=100)] = 1.0
    """0 is greedy."""
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0
    top_k: Count = 0
    """0 keeps all tokens."""
    min_p: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0
    seed: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)] = 0
    presence_penalty: Annotated[float, msgspec.Meta(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, msgspec.Meta(ge=-2, le=2)] = 0.0
    repetition_penalty: Annotated[float, msgspec.Meta(gt=0, le=100)] = 1.0
    """Divides (positive) or multiplies (negative) logits of tokens in the prompt or output (CTRL, arXiv:1909.05858)."""
    logit_bias: Annotated[dict[TokenId, float], msgspec.Meta(max_length=1024)] = {}
    stop_token_ids: Annotated[tuple[TokenId, ...], msgspec.Meta(max_length=256)] = ()
    """Any of these ends the output with finish reason `stop`. The gateway puts the end-of-sequence tokens in here."""
    min_tokens: Count = 0
    """Until this many output tokens exist, `stop_token_ids` cannot be sampled."""
    logprobs: Annotated[int, msgspec.Meta(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    """None: none. k: the chosen token's log probability and those of the k likeliest tokens."""
    prompt_logprobs: Annotated[int, msgspec.Meta(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    """The same for each prompt token but the first."""
    grammar: Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_GRAMMAR_TEXT)] | None = None
    """Each token must go on with a text of this grammar, see `headrace.grammar`; the output ends where one is whole."""


class QueueEntry(Message, frozen=True, kw_only=True):
    """One request as it lies in the Redis Stream."""

    request_id: RequestId
    attempt: Attempt
    gateway: MeshId
    """Registry id of the gateway that waits for the tokens."""
    token_ids: Annotated[list[TokenId], msgspec.Meta(min_length=1, max_length=MAX_PROMPT_TOKENS)]
    """Prompt tokens, followed by the `generated` tokens of earlier attempts."""
    generated: Count = 0
    sampling: SamplingParams
    enqueued_at: float
    """Unix time in seconds."""
    deadline: float
    """Unix time in seconds after which nobody waits for the answer."""
    traceparent: TraceParent | None = None
    """The gateway's span of this attempt; None where the request is not traced."""
