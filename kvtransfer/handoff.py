"""The sending side of one handoff.

| state      | on                              | does                                 | next      |
| ---------- | ------------------------------- | ------------------------------------ | --------- |
| UNPLACED   | `offer_to`                      | Offer                                | OFFERED   |
| OFFERED    | Grant                           | remember what is held and wanted     | GRANTED   |
| OFFERED    | Grant of parts that aren't here | stop                                 | FAILED    |
| OFFERED    | Refuse, Abort `unknown`         | may be offered to another, or again  | UNPLACED  |
| GRANTED    | a layer is computed, in credit  | pages go to the data line            | GRANTED   |
| GRANTED    | Credit                          | widen the window                     | GRANTED   |
| GRANTED, COMMITTED | patience ends           | ask what came                        | same      |
| GRANTED, COMMITTED | Credit, once asked      | send what did not come again         | same      |
| GRANTED    | all sent and next token known   | Commit                               | COMMITTED |
| COMMITTED  | time to renew                   | Commit again: the Ack may be lost    | COMMITTED |
| COMMITTED  | Ack                             | (the pages may be freed)             | DONE      |
| GRANTED    | Ack of an Offer in place        |                                      | DONE      |
| OFFERED, GRANTED | time to renew             | Renew: Grant or Credit may be lost   | same      |
| any before | Abort, receiver gone            | stop (the pages may be freed)        | FAILED    |
| any before | `fail`: the line broke          | stop                                 | FAILED    |
| FAILED     | time to renew                   | Abort again: Released may be lost    | FAILED    |
| FAILED     | Released, Abort, receiver gone  | (the pages may be freed)             | FAILED    |

Pages that are on the way for longer than usual are asked for, and what has not come by then is sent again, over new
connections: a line that breaks takes some with it, and a silent one tells nobody. The receiver drops what came twice.

Layers are announced whenever they are computed, in any state: what can't be sent yet stays in this worker's cache.
Pages are read after `next_message` has named them, by the data line's threads or by the receiver itself. So they must
stay untouched until `receiver_is_done`; who gives a handoff up tells the receiver (Abort) and waits for its answer.
"""

from __future__ import annotations

import asyncio
import itertools
import operator
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto

from headrace.kvtransfer.base import PageId, PageStore, Ready
from headrace.kvtransfer.messages import (
    MAX_PAGES_PER_MESSAGE,
    Abort,
    Ack,
    Commit,
    Credit,
    Grant,
    Offer,
    Part,
    Refuse,
    RefuseCause,
    Released,
    Renew,
    ToSender,
    TransportName,
    WireDtype,
)
from headrace.kvtransfer.on_the_way import Flight, OnTheWay, Outgoing
from headrace.kvtransfer.reshard import heads_a_rank
from headrace.kvtransfer.staging import Staged, Staging
from headrace.messages.stream import TokenLogprobs

MESSAGE_BYTES: dict[TransportName, int] = {
    "tcp": 2**20,
    "shm": 8 * 2**20,
    "nixl": 8 * 2**20,
    "cuda_ipc": 2**26,
    "local": 2**26,
}
"""Page bytes of one message. Over TCP, what is small enough to stay in a processor's cache from checksum to socket."""


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
    """Consecutive pages of one layer whose KV is complete, as soon as `ready` (None: now)."""

    layer: int
    first_page: int
    num_pages: int
    ready: Ready | None = None
    rank: int = 0
    """The tensor-parallel rank whose cache they are in; each rank announces its own."""
    part: int = 0
    """Which of the Grant's this is to leave as, once there is one."""


@dataclass
class Timings:
    """Moments of one handoff, by the monotonic clock."""

    offered: float = 0.0
    granted: float = 0.0
    computed: float = 0.0
    """The token to commit was known."""
    acknowledged: float = 0.0


class Handoff:
    """One request on its way to a decode worker."""

    def __init__(
        self, offer: Offer, pages: list[PageId], store: PageStore, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`store` is the cache of any of this worker's ranks: all have the same pages."""
        self.offer = offer
        self.receiver: str | None = None
        self.state = State.UNPLACED
        self.refused: dict[str, RefuseCause] = {}
        """Why receivers did not take it, by their id."""
        self.held_pages = 0
        self.sent_bytes = 0
        self.sent_pages = 0
        self.transport: TransportName = "tcp"
        self.wire_dtype: WireDtype = "auto"
        self.receiver_is_done = True
        """It will not read another page of this handoff."""
        self.abort_cause: str = ""
        """Why it failed, in a word."""
        self.timings = Timings()
        self.pages = pages
        self._whole_page_bytes = store.page_bytes
        self._parts: list[Part] = []
        """Of each page; empty where pages travel whole."""
        self._page_bytes = [store.page_bytes]
        """By part."""
        self._segments: deque[Segment] = deque()
        """Computed, in order, and not sent."""
        self._sequence = 0
        self._most_pages = [1]
        """Of one message, by part."""
        self._largest_message = store.page_bytes
        self._on_the_way = OnTheWay(clock)
        self._clock = clock
        self._staging: Staging | None = None
        self._staged: dict[int, Staged] = {}
        """By sequence, as long as the receiver may read it."""
        self._next_token: tuple[int, TokenLogprobs | None, list[int]] | None = None
        self._commit: Commit | None = None
        self._failure = ""
        self._changed = asyncio.Event()

    @property
    def key(self) -> tuple[str, int]:
        """(request id, attempt)."""
        return self.offer.request_id, self.offer.attempt

    @property
    def repeats(self) -> int:
        """How often it sent again what did not come."""
        return self._on_the_way.repeats

    @property
    def wants_layers(self) -> bool:
        """Whether computed layers need be announced: not where the receiver is known to hold all pages."""
        return self.state is not State.GRANTED or self.held_pages < len(self.pages)

    def offer_to(self, receiver: str, flight: Flight | None = None, staging: Staging | None = None) -> Offer:
        """Begin with `receiver`, sharing the room on the way there; the caller sends what is returned.

        `staging` is what `shm` goes through where the cache itself is not host memory.
        """
        assert self.state is State.UNPLACED, self.state
        self.receiver = receiver
        self.receiver_is_done = False
        self._on_the_way.flight = flight or self._on_the_way.flight
        self._staging = staging
        self.state = State.OFFERED
        self.timings.offered = self.timings.offered or self._clock()
        return self.offer

    def layer_ready(self, segment: Segment) -> None:
        """These pages of this layer are in the cache."""
        self._segments.extend(self._by_part(segment))
        self._changed.set()

    def _by_part(self, segment: Segment) -> list[Segment]:
        if not self._parts:
            return [segment]
        return [replace(segment, part=part) for part, of in enumerate(self._parts) if of.rank == segment.rank]

    def finish(self, token_id: int, logprobs: TokenLogprobs | None, came: Sequence[int] = ()) -> None:
        """All is computed (all layers have been announced) and this is the next token, after those that were coming."""
        assert len(came) == self.offer.coming, (len(came), self.offer.coming)
        self._next_token = (token_id, logprobs, list(came))
        self.timings.computed = self._clock()
        self._changed.set()

    def commit_undrawn(self) -> Commit | None:
        """A Commit without a next token, where the receiver shares this pool: the caller delivers it, before the step
        that computes the last token. None where the pages have a way to go, or nobody has granted yet.
        """
        if self.state is not State.GRANTED or self.transport != "local":
            return None
        self.timings.computed = self._clock()
        return self._committed(None, None, [])

    def _committed(self, token_id: int | None, logprobs: TokenLogprobs | None, came: list[int]) -> Commit:
        self.state = State.COMMITTED
        self._on_the_way.committed()
        request_id, attempt = self.key
        self._commit = Commit(
            request_id=request_id,
            attempt=attempt,
            sequence=self._sequence,
            token_id=token_id,
            logprobs=logprobs,
            came=came,
        )
        return self._commit

    def handle(self, message: ToSender) -> None:
        """Apply a message of the receiver. One that doesn't fit the state is late or repeated, and is dropped."""
        match message:
            case Grant() if self.state is State.OFFERED:
                self._granted(message)
            case Refuse() if self.state is State.OFFERED:
                assert self.receiver is not None
                self.refused[self.receiver] = message.cause
                self.receiver = None
                self.receiver_is_done = True
                self.state = State.UNPLACED
            case Credit() if self.state in (State.GRANTED, State.COMMITTED):
                self._free_staged(self._on_the_way.credited(message.sequence))
            case Ack() if self.state is State.COMMITTED or (self.offer.in_place and self.state is State.GRANTED):
                if self.state is State.COMMITTED:  # or nothing was on the way that could tell how long it takes
                    self._on_the_way.acknowledged()
                self.state = State.DONE
                self.timings.acknowledged = self._clock()
                self._let_go()
            case Abort(cause="unknown") if self.state is State.OFFERED:  # the offer or its refusal was lost
                self.receiver = None
                self.receiver_is_done = True
                self.state = State.UNPLACED
            case Abort():
                self.fail(f"{self.receiver}: {message.cause} {message.message}".rstrip())
                self.abort_cause = self.abort_cause or message.cause
                self._let_go()
            case Released() if self.state is State.FAILED:
                self._let_go()
        self._changed.set()

    def _granted(self, grant: Grant) -> None:
        self.state = State.GRANTED
        self.timings.granted = self._clock()
        self.held_pages = grant.held_pages
        self.transport = grant.transport
        self.wire_dtype = grant.wire_dtype
        self._on_the_way.open_window(grant.window_bytes)
        if grant.transport != "shm":
            self._staging = None
        if grant.parts:
            self._cut(grant.parts)
        size = min(grant.window_bytes // 4, MESSAGE_BYTES[grant.transport])
        most = self._staging.num_blocks if self._staging is not None else MAX_PAGES_PER_MESSAGE
        self._most_pages = [min(max(size // page_bytes, 1), most) for page_bytes in self._page_bytes]
        self._largest_message = max(map(operator.mul, self._most_pages, self._page_bytes))

    def _cut(self, parts: list[Part]) -> None:
        """From now on pages leave in these parts, what is computed already among them."""
        layout = self.offer.layout
        heads = heads_a_rank(layout)
        for part in parts:
            if part.rank >= layout.tensor_parallel_size or part.first_head + part.num_heads > heads:
                self.fail(f"{self.receiver} wants {part}, where {layout.tensor_parallel_size} ranks hold {heads} heads")
                return
        self._parts = parts
        self._page_bytes = [self._whole_page_bytes // heads * part.num_heads for part in parts]
        self._segments = deque(cut for segment in self._segments for cut in self._by_part(segment))

    def _free_staged(self, landed: list[Outgoing]) -> None:
        for outgoing in landed:
            if (staged := self._staged.pop(outgoing.sequence, None)) is not None:
                staged.let_go()

    @property
    def lost_some(self) -> bool:
        """Whether the next messages are some that did not come."""
        return bool(self._on_the_way.lost)

    def seconds_until_overdue(self) -> float | None:
        """After which `ask` is to be called; None where nothing is waited for."""
        if self.state not in (State.GRANTED, State.COMMITTED):
            return None
        return self._on_the_way.seconds_until_overdue(self.state is State.COMMITTED)

    def ask(self) -> list[Commit | Renew]:
        """What to tell the receiver now that something is overdue: it answers with what has come."""
        self._on_the_way.ask()
        request_id, attempt = self.key
        renew = Renew(handoffs=[(request_id, attempt, self._sequence)])
        return [renew] if self._commit is None else [self._commit, renew]

    def _let_go(self) -> None:
        self.receiver_is_done = True
        self._free_staged(self._on_the_way.land(self._sequence))

    def fail(self, reason: str) -> None:
        """Give the attempt up. The receiver is to be told, and the pages to be kept until it has answered."""
        if self.state not in (State.DONE, State.FAILED):
            self.state = State.FAILED
            self._failure = reason
        self._changed.set()

    def receiver_left(self, reason: str) -> None:
        """Nobody is there any more."""
        self.fail(reason)
        self._let_go()

    def renewal(self) -> Commit | Abort | tuple[str, int, int] | None:
        """What to tell the receiver again as long as it doesn't answer; the tuple is for `Renew`."""
        request_id, attempt = self.key
        match self.state:
            case State.OFFERED | State.GRANTED:
                return request_id, attempt, self._sequence
            case State.COMMITTED:
                return self._commit
            case State.FAILED if not self.receiver_is_done:
                return Abort(request_id=request_id, attempt=attempt, cause="sender_failed")
            case _:
                return None

    def wake(self) -> None:
        """There may be room on the way again."""
        self._changed.set()

    def next_message(self) -> Outgoing | Commit | None:
        """What can be sent now, or None."""
        if self.lost_some and self.state in (State.GRANTED, State.COMMITTED):
            return self._on_the_way.lost.popleft()
        if self.state is not State.GRANTED:
            return None
        while self._segments:
            segment = self._segments.popleft()
            first, end = max(segment.first_page, self.held_pages), segment.first_page + segment.num_pages
            if first >= end:
                continue
            stop = min(end, first + self._most_pages[segment.part])
            num_layers = self._num_layers_with(segment, stop - first) if stop == end else 1
            num_pages = (stop - first) * num_layers
            size = num_pages * self._page_bytes[segment.part]
            has_room = self._on_the_way.has_room(size)
            if has_room and self._staging is not None:
                has_room = self._stage(num_pages)
            if not has_room:
                self._segments.appendleft(segment)
                return None
            if stop < end:
                rest = Segment(segment.layer, stop, end - stop, segment.ready, segment.rank, segment.part)
                self._segments.appendleft(rest)
            joined = [segment, *(self._segments.popleft() for _ in range(num_layers - 1))]
            return self._outgoing(joined, first, stop, size)
        if self._next_token is None:
            return None
        return self._committed(*self._next_token)

    def _num_layers_with(self, segment: Segment, num_pages: int) -> int:
        """How many layers leave in one message: this one and those after it that wait with the same pages.

        What is still being computed keeps back no layer that is there.
        """
        count = 1
        for other in itertools.islice(self._segments, max(self._most_pages[segment.part] // num_pages - 1, 0)):
            has_same_pages = (other.first_page, other.num_pages) == (segment.first_page, segment.num_pages)
            if not has_same_pages or (other.layer, other.part) != (segment.layer + count, segment.part):
                break
            if other.rank != segment.rank or (other.ready is not None and not other.ready.query()):
                break
            count += 1
        return count

    def _stage(self, num_pages: int) -> bool:
        """Whether there was room for the next message."""
        assert self._staging is not None
        staged = self._staging.take(num_pages)
        if staged is not None:
            self._staged[self._sequence] = staged
        return staged is not None

    def _outgoing(self, joined: list[Segment], first: int, stop: int, size: int) -> Outgoing:
        segment = joined[0]
        credit_wanted = self._on_the_way.take_room(size, self._largest_message)
        self._sequence += 1
        self.sent_bytes += size
        self.sent_pages += (stop - first) * len(joined)
        outgoing = Outgoing(
            sequence=self._sequence - 1,
            layers=range(segment.layer, segment.layer + len(joined)),
            first_page=first,
            page_ids=self.pages[first:stop],
            credit_wanted=credit_wanted or self._staging is not None,  # others may wait for that memory
            ready=[each.ready for each in joined if each.ready is not None],
            rank=segment.rank,
            part=segment.part,
            heads=self._heads_of(segment.part),
            staged=self._staged.get(self._sequence - 1),
        )
        self._on_the_way.add(outgoing, size)
        return outgoing

    def _heads_of(self, part: int) -> range | None:
        if self._page_bytes[part] == self._whole_page_bytes:
            return None
        first_head = self._parts[part].first_head
        return range(first_head, first_head + self._parts[part].num_heads)

    async def changed(self) -> None:
        """Wait until something happened. Raises `HandoffFailed` once the attempt is over."""
        await self._changed.wait()
        self._changed.clear()
        if self.state is State.FAILED:
            raise HandoffFailed(self._failure)

    async def until_receiver_is_done(self) -> None:
        """Wait until the pages may be freed."""
        while not self.receiver_is_done:
            await self._changed.wait()
            self._changed.clear()
