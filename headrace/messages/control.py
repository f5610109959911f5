"""Gateway -> workers, and between workers of a tier."""

from __future__ import annotations

from typing import Annotated

import msgspec

from headrace.messages.request import QueueEntry
from headrace.wire import Attempt, Count, Message, RequestId

MAX_HELD_PAGES = 2**18


class Cancel(Message, frozen=True, kw_only=True):
    """Nobody waits for this request any more: free all that is held for it, in every attempt up to `attempt`."""

    request_id: RequestId
    attempt: Attempt


class Flushed(Message, frozen=True):
    """The answer to a worker's `Flush`."""


class GivenBack(Message, frozen=True):
    """From one prefill worker to the others: it stops, and there are entries of its in the queue to be claimed now."""


class PassedOn(Message, frozen=True, kw_only=True):
    """From one prefill worker to another: this queue entry is yours now, for you hold more of its prompt."""

    entry_id: Annotated[str, msgspec.Meta(max_length=64)]
    """In the queue."""
    entry: QueueEntry
    attempt: Attempt


class Holds(Message, frozen=True, kw_only=True):
    """From one prefill worker to the others: it has computed these pages of a prompt, named by their hashes."""

    waiting: Count
    """Prompt tokens that it has yet to compute."""
    page_hashes: Annotated[list[Annotated[bytes, msgspec.Meta(max_length=16)]], msgspec.Meta(max_length=MAX_HELD_PAGES)]


class Repeat(Message, frozen=True, kw_only=True):
    """The gateway has heard nothing of this attempt for a while: send again what follows output token `position`.

    A decode worker that does not know the attempt answers with `RequestFailed`.
    """

    request_id: RequestId
    attempt: Attempt
    position: Count
