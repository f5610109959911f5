"""The receiving side of handoffs: a decode worker's incoming requests.

| state     | on                         | does                                             | next      |
| --------- | -------------------------- | ------------------------------------------------ | --------- |
| (none)    | Offer, pages free          | reserve, Grant                                   | RECEIVING |
| (none)    | Offer, pool full           | queue, first come first served                   | WAITING   |
| (none)    | Offer, unusable            | Refuse                                           | (none)    |
| WAITING   | pages come free            | reserve, Grant                                   | RECEIVING |
| RECEIVING | Pages, next in order       | check, write, Credit                             | RECEIVING |
| RECEIVING | Pages, seen before         | drop                                             | RECEIVING |
| RECEIVING | Pages, damaged or a gap    | free, Abort                                      | (none)    |
| RECEIVING | Commit, all pages here     | hand over to the decoder, Ack                    | (none)    |
| any       | Renew                      | start the lease again                            | same      |
| any       | Abort, cancel, lease ended, sender gone | free (and Abort to a living sender) | (none)    |

Nothing here waits or blocks: every method is called on the event loop and replies through `send`.
"""

from __future__ import annotations

import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

import xxhash

from headrace.kvtransfer.base import PageAllocator, PageId, PageStore
from headrace.kvtransfer.messages import (
    Abort,
    AbortCause,
    Ack,
    Commit,
    Credit,
    Grant,
    Layout,
    Offer,
    Pages,
    Refuse,
    RefuseCause,
    Renew,
    ToReceiver,
)
from headrace.wire import Message

LEASE_SECONDS = 10.0
WINDOW_BYTES = 64 * 2**20
MAX_WAITING = 4096
MAX_REMEMBERED = 16384
"""Requests whose newest attempt is remembered, so that a stale one is told from a new one."""

Key = tuple[str, int]


@dataclass(frozen=True)
class ReceivedRequest:
    """A prompt whose KV is complete in this worker's cache. Whoever takes it owns `pages`."""

    offer: Offer
    pages: list[PageId]
    token_id: int
    commit: Commit


@dataclass
class _Incoming:
    """One handoff between Offer and Commit. `pages` is empty while it waits for room."""

    sender: str
    offer: Offer
    lease_ends: float
    pages: list[PageId] = field(default_factory=list)
    sequence: int = 0
    next_page: list[int] = field(default_factory=list)
    """By layer: the first page of the prompt that has not arrived."""
    uncredited_bytes: int = 0


class Receiver:
    """All handoffs that arrive at one worker."""

    def __init__(
        self,
        layout: Layout,
        store: PageStore,
        pool: PageAllocator,
        total_pages: int,
        send: Callable[[str, Message], None],
        on_received: Callable[[ReceivedRequest], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.stopping = False
        self.reserve_pages = 0
        """Free pages that grants leave alone, for running requests to grow into."""
        self.aborts: Counter[str] = Counter()
        self._layout = layout
        self._store = store
        self._pool = pool
        self._total_pages = total_pages
        self._send = send
        self._on_received = on_received
        self._clock = clock
        self._incoming: dict[Key, _Incoming] = {}
        self._waiting: OrderedDict[Key, _Incoming] = OrderedDict()
        self._newest_attempt: OrderedDict[str, int] = OrderedDict()

    @property
    def num_waiting(self) -> int:
        """Offers that wait for free pages."""
        return len(self._waiting)

    @property
    def num_open(self) -> int:
        """Handoffs that have not been committed yet, those that wait among them."""
        return len(self._incoming)

    def handle(self, sender: str, message: ToReceiver, payload: tuple[memoryview, ...]) -> None:
        """Apply one message."""
        match message:
            case Offer():
                self._offer(sender, message)
            case Pages():
                self._pages(sender, message, payload)
            case Commit():
                self._commit(sender, message)
            case Renew():
                self._renew(sender, message)
            case Abort():
                incoming = self._incoming.get((message.request_id, message.attempt))
                if incoming is not None and incoming.sender == sender:
                    self._free(incoming)
                    self.aborts[message.cause] += 1

    def _offer(self, sender: str, offer: Offer) -> None:
        refusal = self._reason_to_refuse(offer)
        if refusal is not None:
            cause, message = refusal
            self._send(sender, Refuse(request_id=offer.request_id, attempt=offer.attempt, cause=cause, message=message))
            return
        older = [key for key in self._incoming if key[0] == offer.request_id]
        for key in older:
            self._abort(self._incoming[key], "cancelled", "a newer attempt began")
        self._remember(offer.request_id, offer.attempt)
        incoming = _Incoming(sender, offer, self._clock() + LEASE_SECONDS)
        self._incoming[offer.request_id, offer.attempt] = incoming
        self._waiting[offer.request_id, offer.attempt] = incoming
        self.grant_waiting()

    def _reason_to_refuse(self, offer: Offer) -> tuple[RefuseCause, str] | None:
        if offer.layout != self._layout:
            return "layout", f"offered {offer.layout}, this worker holds {self._layout}"
        if self._pages_needed(offer) > self._total_pages:
            return "too_long", f"{len(offer.token_ids)} tokens don't fit into {self._total_pages} pages"
        if (offer.request_id, offer.attempt) in self._incoming:
            return "duplicate", "this attempt is already being received"
        newest = self._newest_attempt.get(offer.request_id, -1)
        if offer.attempt <= newest:
            return "stale", f"attempt {newest} has been seen"
        if self.stopping:
            return "stopping", "this worker is about to stop"
        if len(self._waiting) >= MAX_WAITING:
            return "full", f"{MAX_WAITING} handoffs wait for pages"
        return None

    def _remember(self, request_id: str, attempt: int) -> None:
        self._newest_attempt[request_id] = attempt
        self._newest_attempt.move_to_end(request_id)
        if len(self._newest_attempt) > MAX_REMEMBERED:
            self._newest_attempt.popitem(last=False)

    def _pages_needed(self, offer: Offer) -> int:
        return -(-len(offer.token_ids) // self._layout.page_size)

    def grant_waiting(self) -> None:
        """Grant waiting offers in order while there is room. To be called whenever pages came free."""
        while self._waiting:
            key, incoming = next(iter(self._waiting.items()))
            held = self._pool.match_prefix(incoming.offer.page_hashes)
            missing = self._pages_needed(incoming.offer) - len(held)
            if missing + self.reserve_pages > self._pool.num_free:
                self._pool.release(held)
                return
            del self._waiting[key]
            incoming.pages = held + self._pool.allocate(missing)
            incoming.next_page = [len(held)] * self._layout.num_layers
            request_id, attempt = key
            grant = Grant(request_id=request_id, attempt=attempt, held_pages=len(held), window_bytes=WINDOW_BYTES)
            self._send(incoming.sender, grant)

    def _pages(self, sender: str, message: Pages, payload: tuple[memoryview, ...]) -> None:
        incoming = self._granted(sender, message)
        if incoming is None or message.sequence < incoming.sequence:
            return
        problem = self._problem_with(incoming, message, payload)
        if problem is not None:
            self._abort(incoming, *problem)
            return
        pages = incoming.pages[message.first_page : message.first_page + message.num_pages]
        self._store.write_pages(message.layer, pages, payload[0])
        incoming.next_page[message.layer] += message.num_pages
        incoming.sequence += 1
        incoming.lease_ends = self._clock() + LEASE_SECONDS
        incoming.uncredited_bytes += len(payload[0])
        if incoming.uncredited_bytes >= WINDOW_BYTES // 4:
            incoming.uncredited_bytes = 0
            self._send(
                sender, Credit(request_id=message.request_id, attempt=message.attempt, sequence=incoming.sequence)
            )

    def _problem_with(
        self, incoming: _Incoming, message: Pages, payload: tuple[memoryview, ...]
    ) -> tuple[AbortCause, str] | None:
        if message.sequence != incoming.sequence:
            return "sequence", f"expected message {incoming.sequence}, got {message.sequence}"
        if message.layer >= self._layout.num_layers or message.first_page != incoming.next_page[message.layer]:
            return "sequence", f"layer {message.layer} can't go on at page {message.first_page}"
        if message.first_page + message.num_pages > len(incoming.pages):
            return "sequence", f"{message.num_pages} pages from {message.first_page} are more than were granted"
        if len(payload) != 1 or len(payload[0]) != message.num_pages * self._store.page_bytes:
            return "checksum", "the payload is not one frame of the announced size"
        if xxhash.xxh3_64_digest(payload[0]) != message.checksum:
            return "checksum", f"layer {message.layer}, page {message.first_page}: the payload was damaged on the way"
        return None

    def _commit(self, sender: str, commit: Commit) -> None:
        incoming = self._granted(sender, commit)
        if incoming is None:
            return
        total = len(incoming.pages)
        if commit.sequence != incoming.sequence or any(page != total for page in incoming.next_page):
            self._abort(incoming, "sequence", "committed before all pages arrived")
            return
        del self._incoming[commit.request_id, commit.attempt]
        for page, page_hash in zip(incoming.pages, incoming.offer.page_hashes, strict=False):
            self._pool.publish(page, page_hash)
        self._send(sender, Ack(request_id=commit.request_id, attempt=commit.attempt))
        self._on_received(ReceivedRequest(incoming.offer, incoming.pages, commit.token_id, commit))

    def _granted(self, sender: str, message: Pages | Commit) -> _Incoming | None:
        key = (message.request_id, message.attempt)
        incoming = self._incoming.get(key)
        if incoming is None or incoming.sender != sender or key in self._waiting:
            return None
        return incoming

    def _renew(self, sender: str, renew: Renew) -> None:
        for request_id, attempt in renew.handoffs:
            incoming = self._incoming.get((request_id, attempt))
            if incoming is not None and incoming.sender == sender:
                incoming.lease_ends = self._clock() + LEASE_SECONDS
            else:
                self._send(sender, Abort(request_id=request_id, attempt=attempt, cause="unknown"))

    def cancel(self, request_id: str, attempt: int) -> None:
        """Nobody waits for this request any more, in any attempt up to `attempt`."""
        for key in [key for key in self._incoming if key[0] == request_id and key[1] <= attempt]:
            self._abort(self._incoming[key], "cancelled", "")
        self._remember(request_id, max(attempt, self._newest_attempt.get(request_id, -1)))

    def cancel_gateway(self, gateway: str) -> None:
        """A gateway is gone, and with it all who waited for its requests."""
        for incoming in [i for i in self._incoming.values() if i.offer.gateway == gateway]:
            self._abort(incoming, "cancelled", "the gateway is gone")

    def sender_left(self, sender: str) -> None:
        """A prefill worker is gone: nothing it began will end."""
        for incoming in [i for i in self._incoming.values() if i.sender == sender]:
            self._free(incoming)
            self.aborts["sender_failed"] += 1

    def reap(self) -> None:
        """End the handoffs whose lease has run out. To be called on a timer of its own."""
        now = self._clock()
        for incoming in [i for i in self._incoming.values() if i.lease_ends < now]:
            self._abort(incoming, "lease", f"no progress for {LEASE_SECONDS} s")

    def _abort(self, incoming: _Incoming, cause: AbortCause, message: str) -> None:
        self._free(incoming)
        self.aborts[cause] += 1
        offer = incoming.offer
        self._send(
            incoming.sender, Abort(request_id=offer.request_id, attempt=offer.attempt, cause=cause, message=message)
        )

    def _free(self, incoming: _Incoming) -> None:
        key = (incoming.offer.request_id, incoming.offer.attempt)
        self._waiting.pop(key, None)
        del self._incoming[key]
        self._pool.release(incoming.pages)
        incoming.pages = []
        self.grant_waiting()

    def check_integrity(self) -> None:
        """Assert that what waits holds nothing and that what was granted holds its pages."""
        for key, incoming in self._incoming.items():
            if key in self._waiting:
                assert not incoming.pages, f"{key} waits and holds pages"
            else:
                assert len(incoming.pages) == self._pages_needed(incoming.offer), f"{key} holds the wrong pages"
