"""Prefill worker <-> decode worker: the handoff protocol (`Offer -> Grant | Refuse -> Pages* -> Commit -> Ack`).

`Abort` may come from either side at any point. Each message names its (request, attempt); within one, `Pages` carry a
sequence number and are applied once, in order.

Any message may be lost: a line that breaks takes some with it. Every `Renew` is answered with what its handoffs may
have missed, and a `Commit` is repeated until it is acknowledged, so a loss costs one renewal and not the request's
deadline.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from headrace.messages.request import MAX_PROMPT_TOKENS, SamplingParams
from headrace.messages.stream import TokenLogprobs
from headrace.wire import Attempt, Count, MeshId, Message, Record, RequestId, TokenId

MAX_RENEWED = 1024
"""Handoffs in one `Renew`: more than a prefill worker can have open."""


class Layout(Record, frozen=True, kw_only=True):
    """The shape of the pages. Two workers can hand over to each other only where all of it agrees."""

    model_fingerprint: Annotated[str, msgspec.Meta(max_length=64)]
    dtype: Annotated[str, msgspec.Meta(max_length=32)]
    num_layers: Count
    kv_heads: Count
    head_dim: Count
    page_size: Count
    tensor_parallel_size: Count
    vocab_size: Count
    """Token ids are below it."""


class Offer(Message, frozen=True, kw_only=True):
    """The sender is about to compute this prompt's KV. Everything that decoding needs to know is here."""

    request_id: RequestId
    attempt: Attempt
    gateway: MeshId
    layout: Layout
    token_ids: Annotated[list[TokenId], msgspec.Meta(min_length=1, max_length=MAX_PROMPT_TOKENS)]
    """The prompt, followed by the `generated` tokens of earlier attempts."""
    generated: Count
    sampling: SamplingParams
    deadline: float
    """Unix time in seconds."""


class Grant(Message, frozen=True, kw_only=True):
    """Pages are reserved: send. The first `held_pages` pages of the prompt are already here and need not travel."""

    request_id: RequestId
    attempt: Attempt
    held_pages: Count
    window_bytes: Count
    """Page bytes that may be on the way, unacknowledged by a `Credit`, at any time."""


RefuseCause = Literal["layout", "full", "duplicate", "stale", "stopping", "too_long", "invalid"]


class Refuse(Message, frozen=True, kw_only=True):
    """Nothing is reserved and nothing may be sent."""

    request_id: RequestId
    attempt: Attempt
    cause: RefuseCause
    message: str


class Pages(Message, frozen=True, kw_only=True):
    """KV of consecutive pages of one layer; one payload frame follows."""

    request_id: RequestId
    attempt: Attempt
    sequence: Count
    layer: Count
    first_page: Count
    """Index within the prompt, not a page id of either cache."""
    num_pages: Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]
    checksum: Annotated[bytes, msgspec.Meta(min_length=8, max_length=8)]
    """XXH3-64 of the payload."""


class Credit(Message, frozen=True, kw_only=True):
    """All `Pages` below `sequence` have been written; their bytes are no longer on the way."""

    request_id: RequestId
    attempt: Attempt
    sequence: Count


class Commit(Message, frozen=True, kw_only=True):
    """All pages have been sent (`sequence` messages of them) and here is the first token: decode."""

    request_id: RequestId
    attempt: Attempt
    sequence: Count
    token_id: TokenId
    logprobs: TokenLogprobs | None


class Ack(Message, frozen=True, kw_only=True):
    """The request is the receiver's now; the sender may free its pages."""

    request_id: RequestId
    attempt: Attempt


class Renew(Message, frozen=True, kw_only=True):
    """These handoffs are still wanted: their leases start again.

    The receiver repeats the `Grant` or the newest `Credit` of each, and aborts those that it doesn't know.
    """

    handoffs: Annotated[list[tuple[RequestId, Attempt, Count]], msgspec.Meta(max_length=MAX_RENEWED)]
    """Request, attempt, and how many `Pages` have been sent."""


AbortCause = Literal["cancelled", "lease", "checksum", "sequence", "unknown", "sender_failed", "receiver_failed"]


class Abort(Message, frozen=True, kw_only=True):
    """This attempt is over; both sides free what they hold for it."""

    request_id: RequestId
    attempt: Attempt
    cause: AbortCause
    message: str = ""


ToReceiver = Offer | Pages | Commit | Renew | Abort
ToSender = Grant | Refuse | Credit | Ack | Abort
