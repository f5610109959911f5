"""Drives the handoffs that leave one prefill worker."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Awaitable, Callable
from typing import Protocol

from headrace.kvtransfer.handoff import Handoff, HandoffFailed, State
from headrace.kvtransfer.messages import Abort, Refuse, Renew, ToSender
from headrace.mesh import PeerGone
from headrace.wire import Message

RENEW_SECONDS = 2.5
"""A quarter of the receiver's lease."""


class Send(Protocol):
    """Sends one message to a peer; raises `PeerGone`."""

    def __call__(self, peer_id: str, message: Message, payload: tuple[memoryview, ...] = (), /) -> Awaitable[None]: ...


class Sender:
    """All handoffs that leave one worker."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._open: dict[tuple[str, int], Handoff] = {}

    @property
    def num_open(self) -> int:
        """Handoffs that are not acknowledged yet."""
        return len(self._open)

    def pages_promised(self, receiver: str) -> int:
        """Pages of open handoffs that go to `receiver` and that its own figures may not show yet."""
        return sum(handoff.num_pages for handoff in self._open.values() if handoff.receiver == receiver)

    async def deliver(self, handoff: Handoff, choose: Callable[[Handoff], Awaitable[str]]) -> None:
        """Offer until granted, send each layer as it is computed, commit; returns when the receiver has acknowledged.

        `choose` names the next receiver to try (`handoff.refused` says who would not). Raises `HandoffFailed`.
        Whatever ends it, cancellation included, the receiver is told.
        """
        self._open[handoff.key] = handoff
        try:
            while handoff.state is not State.DONE:
                if handoff.state is State.UNPLACED:
                    receiver = await choose(handoff)
                    await self._send(receiver, handoff.offer_to(receiver))
                while (item := handoff.next_message()) is not None:
                    assert handoff.receiver is not None
                    await self._send(handoff.receiver, *item)
                await handoff.changed()
        except PeerGone as error:
            raise HandoffFailed(str(error)) from error
        finally:
            del self._open[handoff.key]
            if handoff.state is not State.DONE and handoff.receiver is not None:
                await self._tell_aborted(handoff)

    async def _tell_aborted(self, handoff: Handoff) -> None:
        request_id, attempt = handoff.key
        assert handoff.receiver is not None
        try:
            await self._send(handoff.receiver, Abort(request_id=request_id, attempt=attempt, cause="sender_failed"))
        except PeerGone:
            pass

    def handle(self, receiver: str, message: ToSender) -> None:
        """Apply a message of a decode worker; one about a handoff that is over is dropped."""
        handoff = self._open.get((message.request_id, message.attempt))
        if handoff is not None and handoff.receiver == receiver:
            handoff.handle(message)

    def receiver_left(self, receiver: str) -> None:
        """A decode worker is gone, and all that was on its way there."""
        for handoff in list(self._open.values()):
            if handoff.receiver == receiver:
                if handoff.state is State.OFFERED:
                    request_id, attempt = handoff.key
                    gone = Refuse(request_id=request_id, attempt=attempt, cause="stopping", message="it left")
                    handoff.handle(gone)
                else:
                    handoff.fail(f"{receiver} left")

    async def renew(self) -> None:
        """Tell each receiver which handoffs are still wanted, so that it repeats what was lost on the way here.

        To be called every `RENEW_SECONDS`.
        """
        messages: list[tuple[str, Message]] = []
        under_way = defaultdict(list)
        for handoff in self._open.values():
            if handoff.state is State.COMMITTED:
                assert handoff.receiver is not None
                assert handoff.commit is not None
                messages.append((handoff.receiver, handoff.commit))
            elif handoff.receiver is not None:
                under_way[handoff.receiver].append((*handoff.key, handoff.num_sent))
        messages += [(receiver, Renew(handoffs=handoffs)) for receiver, handoffs in under_way.items()]
        for receiver, message in messages:
            try:
                await self._send(receiver, message)
            except PeerGone:
                self.receiver_left(receiver)
