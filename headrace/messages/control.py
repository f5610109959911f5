"""Gateway -> workers."""

from __future__ import annotations

from headrace.wire import Attempt, Message, RequestId


class Cancel(Message, frozen=True, kw_only=True):
    """Nobody waits for this request any more: free all that is held for it, in every attempt up to `attempt`."""

    request_id: RequestId
    attempt: Attempt


class Flushed(Message, frozen=True):
    """The answer to a worker's `Flush`."""
