"""The receiving side of handoffs: a decode worker's incoming requests.

| state     | on                         | does                                             | next      |
| --------- | -------------------------- | ------------------------------------------------ | --------- |
| (none)    | Offer, pages free          | reserve, Grant                                   | RECEIVING |
| (none)    | Offer, pool full           | queue, first come first served                   | WAITING   |
| (none)    | Offer, unusable            | Refuse                                           | (none)    |
| (none)    | Commit or Renew, taken before | Ack again                                     | (none)    |
| (none)    | Commit or Renew, unknown   | Abort `unknown`                                  | (none)    |
| WAITING   | pages come free            | reserve, Grant                                   | RECEIVING |
| RECEIVING | the same Offer again       | Grant again                                      | RECEIVING |
| RECEIVING | Pages, next in order       | check, write, Credit                             | RECEIVING |
| RECEIVING | Pages, seen before         | drop                                             | RECEIVING |
| RECEIVING | Pages, damaged or a gap    | free, Abort                                      | (none)    |
| RECEIVING | Commit, all pages here     | hand over to the decoder, Ack                    | (none)    |
| RECEIVING | Renew                      | start the lease again; Grant or Credit again     | RECEIVING |
| RECEIVING | Renew, nothing came since one that spoke of more | free, Abort                | (none)    |
| WAITING   | Renew                      | start the lease again                            | WAITING   |
| any       | Abort, cancel, lease ended, sender gone | free (and Abort to a living sender) | (none)    |

Nothing here waits or blocks: every method is called on the event loop and replies through `send`. A message that can't
be meant for this state, or is another worker's business, changes nothing.
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
LOST_SECONDS = 2.0
"""Less than the time between two renewals."""
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


@dataclass(frozen=True)
class _Seen:
    """The newest attempt of a request, and the worker that it was taken from, if it was."""

    attempt: int
    taken_from: str | None = None


@dataclass
class _Incoming:
    """One handoff between Offer and Commit. `pages` is empty while it waits for room."""

    sender: str
    offer: Offer
    lease_ends: float
    hashes: list[bytes]
    """Of the prompt's full pages."""
    pages: list[PageId] = field(default_factory=list)
    held_pages: int = 0
    """Pages of a known prefix, which don't travel."""
    sequence: int = 0
    behind_since: float | None = None
    """Since when the sender's renewals speak of more Pages than came."""
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
        self.refusals: Counter[RefuseCause] = Counter()
        self.late = 0
        """Messages of handoffs that were over already: they cross an Abort on its way, and are dropped."""
        self._layout = layout
        self._store = store
        self._pool = pool
        self._total_pages = total_pages
        self._send = send
        self._on_received = on_received
        self._clock = clock
        self._incoming: dict[Key, _Incoming] = {}
        self._waiting: OrderedDict[Key, _Incoming] = OrderedDict()
        self._newest: OrderedDict[str, _Seen] = OrderedDict()

    @property
    def num_waiting(self) -> int:
        """Offers that wait for free pages."""
        return len(self._waiting)

    @property
    def num_open(self) -> int:
        """Handoffs that have not been committed yet, those that wait among them."""
        return len(self._incoming)

    def handle(self, sender: str, message: ToReceiver, payload: tuple[memoryview, ...]) -> str | None:
        """Apply one message. Returns why not, where no honest worker would have sent it."""
        match message:
            case Offer():
                return self._offer(sender, message)
            case Pages():
                return self._pages(sender, message, payload)
            case Commit():
                return self._commit(sender, message)
            case Renew():
                return self._renew(sender, message)
            case Abort():
                incoming = self._incoming.get((message.request_id, message.attempt))
                if incoming is None:
                    self.late += 1
                elif incoming.sender != sender:
                    return "it aborts another worker's handoff"
                else:
                    self._free(incoming)
                    self.aborts[message.cause] += 1
                return None

    def _offer(self, sender: str, offer: Offer) -> str | None:
        key = (offer.request_id, offer.attempt)
        incoming = self._incoming.get(key)
        if incoming is not None and (incoming.sender, incoming.offer) == (sender, offer):
            if key not in self._waiting:
                self._send_grant(incoming)
            return None
        refusal = self._reason_to_refuse(offer)
        if refusal is not None:
            cause, reason = refusal
            self.refusals[cause] += 1
            self._send(sender, Refuse(request_id=offer.request_id, attempt=offer.attempt, cause=cause, message=reason))
            return reason if cause in ("invalid", "duplicate") else None
        for older in [incoming for other, incoming in self._incoming.items() if other[0] == offer.request_id]:
            self._abort(older, "cancelled", "a newer attempt began")
        self._remember(offer.request_id, _Seen(offer.attempt))
        incoming = _Incoming(sender, offer, self._clock() + LEASE_SECONDS, self._pool.hashes(offer.token_ids))
        self._incoming[key] = self._waiting[key] = incoming
        self.grant_waiting()
        return None

    def _reason_to_refuse(self, offer: Offer) -> tuple[RefuseCause, str] | None:
        if offer.layout != self._layout:
            return "layout", f"offered {offer.layout}, this worker holds {self._layout}"
        if self._pages_needed(offer) > self._total_pages:
            return "too_long", f"{len(offer.token_ids)} tokens don't fit into {self._total_pages} pages"
        if max(offer.token_ids) >= self._layout.vocab_size:
            return "invalid", f"token ids must be below {self._layout.vocab_size}"
        if offer.generated > len(offer.token_ids):
            return "invalid", f"{offer.generated} of {len(offer.token_ids)} tokens can't be generated ones"
        if (offer.request_id, offer.attempt) in self._incoming:
            return "duplicate", "this attempt is already being received"
        newest = self._newest.get(offer.request_id, _Seen(-1)).attempt
        if offer.attempt <= newest:
            return "stale", f"attempt {newest} has been seen"
        if self.stopping:
            return "stopping", "this worker is about to stop"
        if len(self._waiting) >= MAX_WAITING:
            return "full", f"{MAX_WAITING} handoffs wait for pages"
        return None

    def _remember(self, request_id: str, seen: _Seen) -> None:
        self._newest[request_id] = seen
        self._newest.move_to_end(request_id)
        if len(self._newest) > MAX_REMEMBERED:
            self._newest.popitem(last=False)

    def _pages_needed(self, offer: Offer) -> int:
        return -(-len(offer.token_ids) // self._layout.page_size)

    def grant_waiting(self) -> None:
        """Grant waiting offers in order while there is room. To be called whenever pages came free."""
        while self._waiting:
            key, incoming = next(iter(self._waiting.items()))
            held = self._pool.match_prefix(incoming.hashes)
            missing = self._pages_needed(incoming.offer) - len(held)
            if missing + self.reserve_pages > self._pool.num_free:
                self._pool.release(held)
                return
            del self._waiting[key]
            incoming.pages = held + self._pool.allocate(missing)
            incoming.held_pages = len(held)
            incoming.next_page = [len(held)] * self._layout.num_layers
            self._send_grant(incoming)

    def _send_grant(self, incoming: _Incoming) -> None:
        offer = incoming.offer
        grant = Grant(
            request_id=offer.request_id,
            attempt=offer.attempt,
            held_pages=incoming.held_pages,
            window_bytes=WINDOW_BYTES,
        )
        self._send(incoming.sender, grant)

    def _pages(self, sender: str, message: Pages, payload: tuple[memoryview, ...]) -> str | None:
        incoming = self._incoming.get((message.request_id, message.attempt))
        if incoming is None:
            self.late += 1
            return None
        if incoming.sender != sender or not incoming.pages:
            return "it sends pages that were not granted to it"
        if message.sequence < incoming.sequence:
            return "it repeats pages"
        problem = self._problem_with(incoming, message, payload)
        if problem is not None:
            self._abort(incoming, *problem)
            return problem[1]
        pages = incoming.pages[message.first_page : message.first_page + message.num_pages]
        self._store.write_pages(message.layer, pages, payload[0])
        incoming.next_page[message.layer] += message.num_pages
        incoming.sequence += 1
        incoming.behind_since = None
        incoming.lease_ends = self._clock() + LEASE_SECONDS
        incoming.uncredited_bytes += len(payload[0])
        if incoming.uncredited_bytes >= WINDOW_BYTES // 4:
            self._send_credit(incoming)
        return None

    def _send_credit(self, incoming: _Incoming) -> None:
        incoming.uncredited_bytes = 0
        offer = incoming.offer
        credit = Credit(request_id=offer.request_id, attempt=offer.attempt, sequence=incoming.sequence)
        self._send(incoming.sender, credit)

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

    def _commit(self, sender: str, commit: Commit) -> str | None:
        request_id, attempt = key = (commit.request_id, commit.attempt)
        incoming = self._incoming.get(key)
        if incoming is None:
            self._answer_over(sender, request_id, attempt)
            return None
        if incoming.sender != sender or not incoming.pages:
            return "it commits what was not granted to it"
        problem = self._problem_with_commit(incoming, commit)
        if problem is not None:
            self._abort(incoming, "sequence", problem)
            return problem
        del self._incoming[key]
        self._remember(request_id, _Seen(attempt, sender))
        for page, page_hash in zip(incoming.pages, incoming.hashes, strict=False):
            self._pool.publish(page, page_hash)
        self._send(sender, Ack(request_id=request_id, attempt=attempt))
        self._on_received(ReceivedRequest(incoming.offer, incoming.pages, commit.token_id, commit))
        return None

    def _answer_over(self, sender: str, request_id: str, attempt: int) -> None:
        """Say once more how a handoff ended that `sender` believes to be open."""
        self.late += 1
        if self._newest.get(request_id) == _Seen(attempt, sender):
            self._send(sender, Ack(request_id=request_id, attempt=attempt))
        else:
            self._send(sender, Abort(request_id=request_id, attempt=attempt, cause="unknown"))

    def _problem_with_commit(self, incoming: _Incoming, commit: Commit) -> str | None:
        total = len(incoming.pages)
        if commit.sequence != incoming.sequence or any(page != total for page in incoming.next_page):
            return "committed before all pages arrived"
        if commit.token_id >= self._layout.vocab_size:
            return f"committed token {commit.token_id}, which must be below {self._layout.vocab_size}"
        return None

    def _renew(self, sender: str, renew: Renew) -> str | None:
        for request_id, attempt, num_sent in renew.handoffs:
            incoming = self._incoming.get((request_id, attempt))
            if incoming is None:
                self._answer_over(sender, request_id, attempt)
            elif incoming.sender != sender:
                return "it renews another worker's handoff"
            else:
                self._renew_one(incoming, num_sent)
        return None

    def _renew_one(self, incoming: _Incoming, num_sent: int) -> None:
        """Start the lease again and repeat what the sender may have missed.

        Pages that were sent before one renewal and have not come by a later one, nor any others, are lost for good.
        """
        now = self._clock()
        if num_sent <= incoming.sequence:
            incoming.behind_since = None
        elif incoming.behind_since is None:
            incoming.behind_since = now
        elif now - incoming.behind_since >= LOST_SECONDS:
            self._abort(incoming, "sequence", f"message {incoming.sequence} was lost on the way")
            return
        incoming.lease_ends = now + LEASE_SECONDS
        if incoming.sequence:
            self._send_credit(incoming)
        elif incoming.pages:
            self._send_grant(incoming)

    def cancel(self, request_id: str, attempt: int) -> None:
        """Nobody waits for this request any more, in any attempt up to `attempt`."""
        for key in [key for key in self._incoming if key[0] == request_id and key[1] <= attempt]:
            self._abort(self._incoming[key], "cancelled", "")
        if attempt > self._newest.get(request_id, _Seen(-1)).attempt:
            self._remember(request_id, _Seen(attempt))

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
