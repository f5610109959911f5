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
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum, auto

from headrace.data_line import STRIPES
from headrace.kvtransfer.base import PageId, PageStore
from headrace.kvtransfer.messages import (
    MAX_PAGES_PER_MESSAGE,
    Abort,
    Ack,
    Commit,
    Credit,
    Grant,
    Offer,
    Refuse,
    RefuseCause,
    Released,
    Renew,
    ToSender,
    TransportName,
    WireDtype,
)
from headrace.kvtransfer.on_the_way import Flight, OnTheWay, Outgoing
from headrace.kvtransfer.segments import Batch, Segment, Segments
from headrace.kvtransfer.staging import Staged, Staging
from headrace.messages.stream import TokenLogprobs

MESSAGE_BYTES: dict[TransportName, int] = {
    "tcp": 2**22,
    "shm": 8 * 2**20,
    "nixl": 8 * 2**20,
    "cuda_ipc": 2**26,
    "local": 2**26,
}
"""Page bytes of one message. Over TCP, smaller ones stay in a processor's cache from checksum to socket, but wake up
threads more often, which costs more."""


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
        self._segments = Segments(store.page_bytes)
        self._sequence = 0
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
        self._segments.add(segment)
        self._changed.set()

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
            try:
                self._segments.cut(grant.parts, self.offer.layout)
            except ValueError as error:
                self.fail(f"{self.receiver} {error}")
                return
        message_bytes, most = MESSAGE_BYTES[grant.transport], MAX_PAGES_PER_MESSAGE
        if self._staging is not None:
            most = self._staging.num_blocks
        elif grant.transport == "shm":  # names travel, and each of the receiver's threads had best copy all its part
            num_pages = (len(self.pages) - self.held_pages) * self.offer.layout.num_layers
            message_bytes = max(message_bytes, num_pages * self._segments.page_bytes // STRIPES)
        self._segments.bound(min(grant.window_bytes // 4, message_bytes), most)

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
        if (batch := self._segments.next_batch(self.held_pages)) is not None:
            return self._outgoing(batch) if self._take_room(batch) else None
        if self._next_token is None:
            return None
        return self._committed(*self._next_token)

    def _take_room(self, batch: Batch) -> bool:
        """Whether there was room for the next message, on the way and where `shm` reads it."""
        if not self._on_the_way.has_room(batch.size):
            return False
        if self._staging is not None:
            staged = self._staging.take(batch.num_pages)
            if staged is None:
                return False
            self._staged[self._sequence] = staged
        return True

    def _outgoing(self, batch: Batch) -> Outgoing:
        self._segments.take(batch)
        credit_wanted = self._on_the_way.take_room(batch.size, self._segments.largest_message)
        segment = batch.segments[0]
        outgoing = Outgoing(
            sequence=self._sequence,
            layers=range(segment.layer, segment.layer + len(batch.segments)),
            first_page=batch.first,
            page_ids=self.pages[batch.first : batch.stop],
            credit_wanted=credit_wanted or self._staging is not None,  # others may wait for that memory
            ready=[each.ready for each in batch.segments if each.ready is not None],
            rank=segment.rank,
            part=segment.part,
            heads=batch.heads,
            staged=self._staged.get(self._sequence),
        )
        self._sequence += 1
        self.sent_bytes += batch.size
        self.sent_pages += batch.num_pages
        self._on_the_way.add(outgoing, batch.size)
        return outgoing

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
