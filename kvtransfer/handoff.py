"""The sending side of one handoff.

| state     | on                              | does                                 | next      |
| --------- | ------------------------------- | ------------------------------------ | --------- |
| UNPLACED  | `offer_to`                      | Offer                                | OFFERED   |
| OFFERED   | Grant                           | remember what is held there          | GRANTED   |
| OFFERED   | Refuse, Abort `unknown`         | may be offered to another, or again  | UNPLACED  |
| GRANTED   | a layer is computed, in credit  | Pages                                | GRANTED   |
| GRANTED   | Credit                          | widen the window                     | GRANTED   |
| GRANTED   | all sent and first token known  | Commit                               | COMMITTED |
| COMMITTED | time to renew                   | Commit again: the Ack may be lost    | COMMITTED |
| COMMITTED | Ack                             | (the pages may be freed)             | DONE      |
| any other | time to renew                   | Renew: Grant or Credit may be lost   | same      |
| any       | Abort, receiver gone            | stop                                 | FAILED    |

Layers are announced whenever they are computed, in any state: what can't be sent yet stays in this worker's cache.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass
from enum import Enum, auto

import xxhash

from headrace.kvtransfer.base import PageId, PageStore
from headrace.kvtransfer.messages import Abort, Ack, Commit, Credit, Grant, Offer, Pages, Refuse, RefuseCause, ToSender
from headrace.messages.stream import TokenLogprobs
from headrace.wire import Message

NO_PAYLOAD: tuple[memoryview, ...] = ()


class HandoffFailed(RuntimeError):
    """The attempt is over; another one may succeed."""


class State(Enum):
    """See the table above."""

    UNPLACED = auto()
    OFFERED = auto()
    GRANTED = auto()
    COMMITTED = auto()
    DONE = auto()
    FAILED = auto()


@dataclass(frozen=True)
class Segment:
    """Consecutive pages of one layer whose KV is complete."""

    layer: int
    first_page: int
    num_pages: int


class Handoff:
    """One request on its way to a decode worker. `pages` must stay untouched until it is DONE or FAILED."""

    def __init__(self, offer: Offer, pages: list[PageId], store: PageStore) -> None:
        self.offer = offer
        self.receiver: str | None = None
        self.state = State.UNPLACED
        self.refused: dict[str, RefuseCause] = {}
        """Why receivers did not take it, by their id."""
        self.held_pages = 0
        self.sent_bytes = 0
        self._pages = pages
        self._store = store
        self._segments: deque[Segment] = deque()
        """Computed, in order, and not sent."""
        self._sequence = 0
        self._window_bytes = 0
        self._most_pages = 1
        """In one message: a quarter of the window, because the receiver credits by quarters. A larger one could
        wait for ever for the credit of a small one before it."""
        self._on_the_way: deque[tuple[int, int]] = deque()
        """(sequence, bytes) of the Pages that no Credit has covered."""
        self._first_token: tuple[int, TokenLogprobs | None] | None = None
        self.commit: Commit | None = None
        """What was sent last, once COMMITTED."""
        self._failure = ""
        self._changed = asyncio.Event()

    @property
    def key(self) -> tuple[str, int]:
        """(request id, attempt)."""
        return self.offer.request_id, self.offer.attempt

    @property
    def num_pages(self) -> int:
        """Pages of the prompt here."""
        return len(self._pages)

    @property
    def num_sent(self) -> int:
        """`Pages` messages so far."""
        return self._sequence

    def offer_to(self, receiver: str) -> Offer:
        """Begin with `receiver`; the caller sends what is returned."""
        assert self.state is State.UNPLACED, self.state
        self.receiver = receiver
        self.state = State.OFFERED
        return self.offer

    def layer_ready(self, segment: Segment) -> None:
        """These pages of this layer are in the cache."""
        self._segments.append(segment)
        self._changed.set()

    def finish(self, token_id: int, logprobs: TokenLogprobs | None) -> None:
        """The prompt is computed (all its layers have been announced) and this is the first token."""
        self._first_token = (token_id, logprobs)
        self._changed.set()

    def handle(self, message: ToSender) -> None:
        """Apply a message of the receiver. One that doesn't fit the state is late or repeated, and is dropped."""
        match message:
            case Grant() if self.state is State.OFFERED:
                self.state = State.GRANTED
                self.held_pages = message.held_pages
                self._window_bytes = message.window_bytes
                self._most_pages = max(message.window_bytes // 4 // self._store.page_bytes, 1)
            case Refuse() if self.state is State.OFFERED:
                assert self.receiver is not None
                self.refused[self.receiver] = message.cause
                self.receiver = None
                self.state = State.UNPLACED
            case Credit() if self.state in (State.GRANTED, State.COMMITTED):
                while self._on_the_way and self._on_the_way[0][0] < message.sequence:
                    self._window_bytes += self._on_the_way.popleft()[1]
            case Ack() if self.state is State.COMMITTED:
                self.state = State.DONE
            case Abort(cause="unknown") if self.state is State.OFFERED:  # the offer or its refusal was lost
                self.receiver = None
                self.state = State.UNPLACED
            case Abort():
                self.fail(f"{self.receiver}: {message.cause} {message.message}".rstrip())
        self._changed.set()

    def fail(self, reason: str) -> None:
        """Give the attempt up."""
        if self.state is not State.DONE:
            self.state = State.FAILED
            self._failure = reason
        self._changed.set()

    def next_message(self) -> tuple[Message, tuple[memoryview, ...]] | None:
        """What can be sent now, or None. Reads the pages it returns at this very moment."""
        if self.state is not State.GRANTED:
            return None
        while self._segments:
            segment = self._segments.popleft()
            first, end = max(segment.first_page, self.held_pages), segment.first_page + segment.num_pages
            if first >= end:
                continue
            stop = min(end, first + self._most_pages)
            size = (stop - first) * self._store.page_bytes
            if size > self._window_bytes and self._on_the_way:
                self._segments.appendleft(segment)
                return None
            if stop < end:
                self._segments.appendleft(Segment(segment.layer, stop, end - stop))
            return self._pages_message(Segment(segment.layer, first, stop - first), size)
        if self._first_token is None:
            return None
        self.state = State.COMMITTED
        token_id, logprobs = self._first_token
        request_id, attempt = self.key
        self.commit = Commit(
            request_id=request_id, attempt=attempt, sequence=self._sequence, token_id=token_id, logprobs=logprobs
        )
        return self.commit, NO_PAYLOAD

    def _pages_message(self, segment: Segment, size: int) -> tuple[Message, tuple[memoryview, ...]]:
        page_ids = self._pages[segment.first_page : segment.first_page + segment.num_pages]
        payload = self._store.read_pages(segment.layer, page_ids)
        request_id, attempt = self.key
        message = Pages(
            request_id=request_id,
            attempt=attempt,
            sequence=self._sequence,
            layer=segment.layer,
            first_page=segment.first_page,
            num_pages=segment.num_pages,
            checksum=xxhash.xxh3_64_digest(payload),
        )
        self._on_the_way.append((self._sequence, size))
        self._window_bytes -= size
        self._sequence += 1
        self.sent_bytes += size
        return message, (payload,)

    async def changed(self) -> None:
        """Wait until something happened. Raises `HandoffFailed` once the attempt is over."""
        await self._changed.wait()
        self._changed.clear()
        if self.state is State.FAILED:
            raise HandoffFailed(self._failure)
