"""Gateway -> workers, and between workers of a tier."""

from __future__ import annotations

from headrace.wire import Attempt, Count, Message, RequestId


class Cancel(Message, frozen=True, kw_only=True):
    """Nobody waits for this request any more: free all that is held for it, in every attempt up to `attempt`."""

    request_id: RequestId
    attempt: Attempt


class Flushed(Message, frozen=True):
    """The answer to a worker's `Flush`."""


class GivenBack(Message, frozen=True):
    """From one prefill worker to the others: it stops, and there are entries of its in the queue to be claimed now."""


class Repeat(Message, frozen=True, kw_only=True):
    """The gateway has heard nothing of this attempt for a while: send again what follows output token `position`.

    A decode worker that does not know the attempt answers with `RequestFailed`.
    """

    request_id: RequestId
    attempt: Attempt
    position: Count
