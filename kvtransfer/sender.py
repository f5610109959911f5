"""Drives the handoffs that leave one worker."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable
from typing import Protocol

from headrace.kvtransfer.base import PageId
from headrace.kvtransfer.handoff import Handoff, HandoffFailed, State
from headrace.kvtransfer.messages import Abort, Commit, Refuse, Renew, ToSender
from headrace.kvtransfer.on_the_way import Flight, Outgoing
from headrace.kvtransfer.staging import Staging
from headrace.kvtransfer.transfer_stats import TransferStats
from headrace.mesh import PeerGone
from headrace.wire import Message

RENEW_SECONDS = 2.5
"""A quarter of the receiver's lease."""
RELEASE_SECONDS = 10.0
"""How long pages are kept for a receiver that does not answer an Abort; by then the registry has dropped it."""
FLIGHT_BYTES = 256 * 2**20
"""Page bytes on the way to one receiver at any time, over all handoffs."""

Send = Callable[[str, Message], Awaitable[None]]
"""Sends one message to a peer; raises `PeerGone`."""


class Departures(Protocol):
    """Takes pages to receivers."""

    def send(self, handoff: Handoff, outgoing: Outgoing) -> None:
        """Put pages on the line to the handoff's receiver, without waiting; calls `handoff.fail` where it breaks."""

    def reconnect(self, receiver: str) -> None:
        """What is put on the line to this receiver from now on takes new connections: the old ones lost something."""


class Sender:
    """All handoffs that leave one worker."""

    def __init__(self, send: Send, departures: Departures, staging_blocks: int = 0) -> None:
        """`staging_blocks` is what the store's memory file has room for, where `shm` does not read the cache itself."""
        self.stats = TransferStats()
        self._send = send
        self._departures = departures
        self._staging = Staging(staging_blocks) if staging_blocks else None
        self._open: dict[tuple[str, int], Handoff] = {}
        self._flights: defaultdict[str, Flight] = defaultdict(lambda: Flight(FLIGHT_BYTES))

    @property
    def num_open(self) -> int:
        """Handoffs that are not acknowledged yet."""
        return len(self._open)

    def is_open(self, request_id: str, attempt: int) -> bool:
        """Whether such a handoff is under way."""
        return (request_id, attempt) in self._open

    def pages_of(self, request_id: str, attempt: int) -> list[PageId] | None:
        """A copy of an open handoff's list of pages; None where there is no such handoff."""
        handoff = self._open.get((request_id, attempt))
        return list(handoff.pages) if handoff is not None else None

    async def deliver(self, handoff: Handoff, choose: Callable[[Handoff], Awaitable[str]]) -> None:
        """Offer until granted, send each layer as it is computed, commit; returns when the receiver has acknowledged.

        `choose` names the next receiver to try (`handoff.refused` says who would not). Raises `HandoffFailed`.
        Whatever ends it, cancellation included, the receiver is told, and the pages are free when this returns.
        """
        self._open[handoff.key] = handoff
        try:
            while handoff.state is not State.DONE:
                if handoff.state is State.UNPLACED:
                    receiver = await choose(handoff)
                    await self._send(receiver, handoff.offer_to(receiver, self._flights[receiver], self._staging))
                await self._send_what_is_ready(handoff)
                try:
                    async with asyncio.timeout(handoff.seconds_until_overdue()):
                        await handoff.changed()
                except TimeoutError:
                    assert handoff.receiver is not None
                    for question in handoff.ask():
                        await self._send(handoff.receiver, question)
        except PeerGone as error:
            handoff.receiver_left(str(error))
            raise HandoffFailed(str(error)) from error
        except asyncio.CancelledError:
            handoff.fail("cancelled")
            handoff.abort_cause = handoff.abort_cause or "cancelled"
            raise
        finally:
            try:
                await self._let_go(handoff)
            finally:
                del self._open[handoff.key]
                if not handoff.offer.in_place:
                    self.stats.count(handoff)

    async def _send_what_is_ready(self, handoff: Handoff) -> None:
        if handoff.lost_some:
            assert handoff.receiver is not None
            self._departures.reconnect(handoff.receiver)
        while (item := handoff.next_message()) is not None:
            assert handoff.receiver is not None
            if isinstance(item, Commit):
                await self._send(handoff.receiver, item)
            else:
                self._departures.send(handoff, item)

    async def _let_go(self, handoff: Handoff) -> None:
        """Wait until the receiver is done with the pages of a handoff that failed."""
        if handoff.receiver is None or handoff.receiver_is_done:
            return
        request_id, attempt = handoff.key
        try:
            await self._send(handoff.receiver, Abort(request_id=request_id, attempt=attempt, cause="sender_failed"))
            async with asyncio.timeout(RELEASE_SECONDS):
                await handoff.until_receiver_is_done()
        except (PeerGone, TimeoutError):
            handoff.receiver_left("it does not answer")

    def handle(self, receiver: str, message: ToSender) -> None:
        """Apply a message of a decode worker; one about a handoff that is over is dropped."""
        handoff = self._open.get((message.request_id, message.attempt))
        if handoff is not None and handoff.receiver == receiver:
            handoff.handle(message)
            self._wake(receiver)

    def _wake(self, receiver: str) -> None:
        """Bytes may have landed: handoffs that share the way, or the staging memory, go on."""
        if self._flights[receiver].size or self._staging is not None:
            for handoff in self._open.values():
                if handoff.receiver == receiver or self._staging is not None:
                    handoff.wake()

    def receiver_left(self, receiver: str) -> None:
        """A decode worker is gone, and all that was on its way there."""
        for handoff in list(self._open.values()):
            if handoff.receiver == receiver:
                if handoff.state is State.OFFERED:
                    request_id, attempt = handoff.key
                    gone = Refuse(request_id=request_id, attempt=attempt, cause="stopping", message="it left")
                    handoff.handle(gone)
                else:
                    handoff.abort_cause = handoff.abort_cause or "receiver_failed"
                    handoff.receiver_left(f"{receiver} left")
        self._flights.pop(receiver, None)

    async def renew(self) -> None:
        """Tell each receiver what is still wanted, so that it repeats what was lost on the way here.

        To be called every `RENEW_SECONDS`.
        """
        messages: list[tuple[str, Message]] = []
        for handoff in self._open.values() if self._staging is not None else ():
            handoff.wake()  # a data line's thread, or a receiver that left, may have freed staging memory
        under_way = defaultdict(list)
        for handoff in self._open.values():
            renewal = handoff.renewal()
            if renewal is None or handoff.receiver is None:
                continue
            if isinstance(renewal, tuple):
                under_way[handoff.receiver].append(renewal)
            else:
                messages.append((handoff.receiver, renewal))
        messages += [(receiver, Renew(handoffs=handoffs)) for receiver, handoffs in under_way.items()]
        for receiver, message in messages:
            try:
                await self._send(receiver, message)
            except PeerGone:
                self.receiver_left(receiver)
