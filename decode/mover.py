"""Hands running requests to other decode workers, without computing anything again: what a worker does that is to stop.

A move offers a request as it is, and says how many tokens it will have more when it comes (`coming`). So its full
pages travel while it runs on, it leaves the batch at a token known in advance, and the client waits for the last few
pages only.

| state    | on                                             | does                                   | next     |
| -------- | ---------------------------------------------- | -------------------------------------- | -------- |
| (none)   | `after_step`, and it has more tokens left      | Offer, announce its full pages         | RUNNING  |
| RUNNING  | it has all tokens that were coming, is granted | take it out of the batch               | STOPPED  |
| RUNNING  | it has them and is not granted                 | Abort, it runs on                      | LEAVING  |
| RUNNING  | it ended, was cancelled or given up            | Abort                                  | LEAVING  |
| RUNNING  | nobody takes it, the handoff failed            | it runs on, to be offered again        | (none)   |
| STOPPED  | steps that may write to its pages have ended   | announce the other pages, Commit       | SENDING  |
| STOPPED, SENDING | it was cancelled                       | Abort                                  | LEAVING  |
| STOPPED, SENDING | the handoff failed                     | into the batch again, when steps ended | (none)   |
| SENDING  | Ack                                            | tell the gateway, free its pages       | (none)   |
| LEAVING  | the receiver is done with its pages            | free what the move held                | (none)   |

A failure costs a pause and nothing else: until the Ack the request and its pages are still here. Should both workers
go on with it (this one believes that the other died), they make the same tokens, and the gateway drops those it has.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, auto

from headrace.decode.scheduler import DecodeScheduler
from headrace.decode.sequence import Key, Sequence
from headrace.engine.page_pool import PagePool
from headrace.kvtransfer.base import PageStore
from headrace.kvtransfer.handoff import Handoff, HandoffFailed, State
from headrace.kvtransfer.messages import Layout, Offer, WireDtype
from headrace.kvtransfer.placement import Placement
from headrace.kvtransfer.segments import Segment
from headrace.kvtransfer.sender import Sender
from headrace.kvtransfer.transports import Exports
from headrace.tasks import end_task

log = logging.getLogger(__name__)

COMING_TOKENS = 16
"""Made here while the pages travel. Who has fewer left ends here."""
MAX_MOVES = 16
"""At a time. More would share the same way, and all of them would stop before the first has arrived."""
RETRY_SECONDS = 0.2
"""After nobody took a request."""


class Stage(Enum):
    """See the table above."""

    RUNNING = auto()
    STOPPED = auto()
    SENDING = auto()
    LEAVING = auto()


@dataclass(eq=False)
class _Move:
    sequence: Sequence
    handoff: Handoff
    shared: list[int]
    """Full pages on which the move has references of its own."""
    stage: Stage = Stage.RUNNING
    is_owner: bool = False
    """The request is out of the batch, and its pages are the move's."""
    is_cancelled: bool = False
    steps: int = 0
    """Started before it left the batch."""
    task: asyncio.Task[None] | None = field(default=None, repr=False)


class Mover:
    """All moves of one worker. Its methods are called between two steps, on the scheduler's thread."""

    def __init__(
        self,
        scheduler: DecodeScheduler,
        pool: PagePool,
        store: PageStore,
        layout: Layout,
        exports: Exports,
        wire_dtype: WireDtype,
        sender: Sender,
        placement: Placement,
        moved: Callable[[Sequence, str], None],
        changed: Callable[[], None],
    ) -> None:
        """`moved` is told of each request that another worker, by its id, has now; `changed` whenever a move ended."""
        self._scheduler = scheduler
        self._pool = pool
        self._store = store
        self._layout = layout
        self._exports = exports
        self._wire_dtype: WireDtype = wire_dtype
        self._sender = sender
        self._placement = placement
        self._moved = moved
        self._changed = changed
        self._moves: dict[Key, _Move] = {}
        self._returning: list[_Move] = []
        """Failed ones whose requests are to join the batch again."""
        self._next_try = 0.0
        self.is_active = False

    @property
    def num_open(self) -> int:
        """Moves that have not ended."""
        return len(self._moves) + len(self._returning)

    def after_step(self) -> None:
        """Begin what can begin, and stop what has come to its token."""
        for move in list(self._moves.values()):
            if move.stage is Stage.RUNNING:
                self._follow(move)
            if move.stage is Stage.STOPPED and self._scheduler.steps.collected >= move.steps:
                self._send_rest(move)
        self._return()
        if self.is_active and time.monotonic() >= self._next_try:
            for sequence in self._scheduler.sequences():
                if len(self._moves) >= MAX_MOVES:
                    break
                is_computed = sequence.generated > sequence.offer.generated
                if is_computed and sequence.key not in self._moves and sequence.tokens_left > COMING_TOKENS:
                    self._begin(sequence)

    def _begin(self, sequence: Sequence) -> None:
        with_kv = len(sequence.token_ids) - 1  # the newest one's is written by the next step
        shared = sequence.pages[: with_kv // self._layout.page_size]
        offer = Offer(
            request_id=sequence.offer.request_id,
            attempt=sequence.offer.attempt,
            gateway=sequence.gateway,
            layout=self._layout,
            token_ids=sequence.token_ids[:with_kv],
            generated=sequence.generated - 1,
            sampling=sequence.offer.sampling,
            deadline=sequence.offer.deadline,
            host=self._exports.host,
            cuda_ipc=self._exports.cuda_ipc,
            shm=self._exports.shm,
            nixl=self._exports.nixl,
            wire_dtype=self._wire_dtype,
            coming=COMING_TOKENS,
            may_wait=False,
        )
        self._pool.share(shared)
        sequence.is_moving = True
        move = self._moves[sequence.key] = _Move(sequence, Handoff(offer, list(shared), self._store), shared)
        if shared:
            self._announce(move, 0, len(shared))
        move.task = asyncio.create_task(self._deliver(move), name=f"move {sequence.key}")
        move.task.add_done_callback(lambda task: self._end(move, task))

    def _announce(self, move: _Move, first_page: int, num_pages: int) -> None:
        for layer in range(self._layout.num_layers):
            move.handoff.layer_ready(Segment(layer, first_page, num_pages))

    def _follow(self, move: _Move) -> None:
        sequence, offer = move.sequence, move.handoff.offer
        if not self._scheduler.holds(sequence):
            self._give_up(move)
        elif len(sequence.token_ids) - 1 == len(offer.token_ids) + offer.coming:
            if move.handoff.state is State.GRANTED:
                self._scheduler.take_out(sequence.key)
                move.is_owner = True
                move.steps = self._scheduler.steps.started
                move.stage = Stage.STOPPED
            else:
                self._give_up(move)

    def _send_rest(self, move: _Move) -> None:
        sequence, offer = move.sequence, move.handoff.offer
        pages = sequence.pages[: self._pool.pages_for(len(sequence.token_ids) - 1)]
        move.handoff.pages.extend(pages[len(move.shared) :])
        self._announce(move, len(move.shared), len(pages) - len(move.shared))
        came = sequence.token_ids[len(offer.token_ids) : -1]
        move.handoff.finish(sequence.token_ids[-1], sequence.newest_logprobs, came)
        move.stage = Stage.SENDING

    def _give_up(self, move: _Move) -> None:
        if move.stage is not Stage.LEAVING and move.handoff.state is not State.FAILED:  # or it ends by itself
            assert move.task is not None
            move.task.cancel()
        move.stage = Stage.LEAVING

    async def _deliver(self, move: _Move) -> None:
        try:
            await self._sender.deliver(move.handoff, self._choose)
        except HandoffFailed as error:
            log.debug("%s stays here: %s", move.sequence.key, error)
            self._next_try = time.monotonic() + RETRY_SECONDS

    async def _choose(self, handoff: Handoff) -> str:
        receiver = self._placement.best(handoff)
        if receiver is None:
            raise HandoffFailed("no other decode worker has room")
        return receiver

    def _end(self, move: _Move, task: asyncio.Task[None]) -> None:
        """The receiver has the request, or will never read another page of it."""
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("%s could not be moved", move.sequence.key, exc_info=error)
        sequence = move.sequence
        self._moves.pop(sequence.key)
        self._pool.release(move.shared)
        sequence.is_moving = False
        if not move.is_owner:
            pass  # it runs on, or has ended
        elif move.handoff.state is State.DONE:
            assert move.handoff.receiver is not None
            self._pool.release(sequence.pages)
            self._moved(sequence, move.handoff.receiver)
        else:
            self._returning.append(move)
            self._return()
        self._changed()

    def _return(self) -> None:
        """Go on here with requests whose moves failed, as soon as no step that was started with them is under way."""
        for move in [move for move in self._returning if self._scheduler.steps.collected >= move.steps]:
            self._returning.remove(move)
            if move.is_cancelled:
                self._pool.release(move.sequence.pages)
            else:
                self._scheduler.add(move.sequence)

    def cancel(self, key: Key) -> None:
        """Nobody waits for this request any more. Where it still is in the batch, the scheduler is told by others."""
        for move in self._returning:
            move.is_cancelled = move.is_cancelled or move.sequence.key == key
        if (moving := self._moves.get(key)) is not None:
            moving.is_cancelled = True
            self._give_up(moving)

    def sequences(self) -> list[Sequence]:
        """Requests that are out of the batch, or about to leave it."""
        return [move.sequence for move in [*self._moves.values(), *self._returning]]

    async def stop(self) -> None:
        """Begin no more, and give up those that have not ended: their requests are the scheduler's again."""
        self.is_active = False
        tasks = [move.task for move in self._moves.values() if move.task is not None]
        await asyncio.gather(*[end_task(task) for task in tasks])
        await asyncio.sleep(0)  # their callbacks
        while self._returning:
            self._scheduler.add(self._returning.pop().sequence)
