"""What a receiver keeps of requests: those under way, those that are here, and the attempts that it has seen."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from headrace.kvtransfer.base import PageId
from headrace.kvtransfer.landing import Landing
from headrace.kvtransfer.messages import Commit, Grant, Offer
from headrace.messages.stream import TokenLogprobs

MAX_REMEMBERED = 16384
"""Requests whose newest attempt is remembered, so that a stale one is told from a new one."""

Key = tuple[str, int]


@dataclass(frozen=True)
class ReceivedRequest:
    """A request whose KV is complete in this worker's cache. Whoever takes it owns `pages`."""

    offer: Offer
    pages: list[PageId]
    commit: Commit
    token_ids: list[int]
    """Those whose KV it is: the offered ones and those that came since."""
    generated: int
    """How many of these are output."""


@dataclass(eq=False)
class OwnPrompt:
    """A prompt that this worker is to compute itself: the last `missing` tokens, for the others' KV is in its pages."""

    offer: Offer
    pages: list[PageId]
    missing: int
    _landing: Landing
    _ended: Callable[[Commit | None], None]

    def begin(self) -> bool:
        """Its pages are about to be written to, until `end`; False where nobody wants it any more."""
        return self._landing.begin()

    def end(self, token_id: int | None, logprobs: TokenLogprobs | None = None) -> None:
        """It is computed, and this is the token that follows; None where that failed."""
        request_id, attempt = self.offer.request_id, self.offer.attempt
        self._landing.end()
        if token_id is None:
            self._ended(None)
        else:
            commit = Commit(request_id=request_id, attempt=attempt, sequence=0, token_id=token_id, logprobs=logprobs)
            self._ended(commit)


@dataclass(eq=False)
class Incoming:
    """One handoff between Offer and Commit. `pages` is empty and `landing` None while it waits for room."""

    sender: str
    offer: Offer
    lease_ends: float
    hashes: list[bytes]
    """Of the prompt's full pages."""
    grant: Grant | None = None
    pages: list[PageId] = field(default_factory=list)
    landing: Landing | None = None
    commit: Commit | None = None

    @property
    def key(self) -> Key:
        """(request id, attempt)."""
        return self.offer.request_id, self.offer.attempt


@dataclass(frozen=True)
class _Seen:
    attempt: int
    taken_from: str | None


class NewestAttempts:
    """The newest attempt of each request, and the worker that it was taken from, if it was."""

    def __init__(self) -> None:
        self._seen: OrderedDict[str, _Seen] = OrderedDict()

    def of(self, request_id: str) -> int:
        """-1 where none has been seen."""
        return self._seen[request_id].attempt if request_id in self._seen else -1

    def remember(self, request_id: str, attempt: int, taken_from: str | None = None) -> None:
        """Every attempt below it is stale from now on, and itself."""
        self._seen[request_id] = _Seen(attempt, taken_from)
        self._seen.move_to_end(request_id)
        if len(self._seen) > MAX_REMEMBERED:
            self._seen.popitem(last=False)

    def was_taken(self, request_id: str, attempt: int, sender: str) -> bool:
        """Whether this attempt is the newest and was taken from `sender`."""
        return self._seen.get(request_id) == _Seen(attempt, sender)
