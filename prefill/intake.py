"""The prefill worker's end of the request queue."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Iterable

from headrace.queue import Delivery, RequestQueue
from headrace.redis_client import RedisError
from headrace.registry import Member, Registry

log = logging.getLogger(__name__)

TAKE_BLOCK_MS = 500
RETRY_SECONDS = 0.5
MAX_CANCELLED = 4096
"""Cancelled requests remembered, for entries that are on their way from Redis while the cancel arrives."""


class Intake:
    """Pulls entries one at a time, those of dead workers first, and keeps hold of them until acknowledged."""

    def __init__(self, queue: RequestQueue, registry: Registry, lease_seconds: float) -> None:
        self._queue = queue
        self._registry = registry
        self._lease_seconds = lease_seconds
        self._next_claim = 0.0
        self._held: set[str] = set()
        self._cancelled: OrderedDict[str, int] = OrderedDict()
        self._dead: list[str] = []
        """Consumers that left and may have held entries."""
        registry.on_leave.append(self._member_left)
        registry.on_buried.append(self._held.clear)  # others have claimed what this worker held

    @property
    def _consumer(self) -> str:
        return _consumer(self._registry.me)

    def _member_left(self, member: Member) -> None:
        if member.tier == "prefill":
            self._dead.append(_consumer(member))

    async def next(self) -> Delivery | None:
        """The next entry, or None after `TAKE_BLOCK_MS` without one. A cancelled entry is acknowledged and skipped."""
        try:
            delivery = await self._claim_or_take()
        except RedisError as error:
            log.debug("the queue can't be read: %s", error)
            await asyncio.sleep(RETRY_SECONDS)
            return None
        return delivery if delivery is not None and await self.accept(delivery) else None

    async def accept(self, delivery: Delivery) -> bool:
        """Keep hold of an entry that is this worker's in the queue; False where it is held already, or cancelled."""
        if delivery.entry_id in self._held:
            return False
        self._held.add(delivery.entry_id)
        if self._cancelled.get(delivery.entry.request_id, -1) >= delivery.attempt:
            await self.acknowledge(delivery)
            return False
        return True

    async def pass_on(self, delivery: Delivery, worker: Member) -> bool:
        """Make an entry another worker's, which is then to be told; False where it stays this one's."""
        try:
            is_passed = await self._queue.pass_on(self._consumer, delivery, _consumer(worker))
        except RedisError as error:
            log.debug("%s could not be passed on: %s", delivery.entry_id, error)
            return False
        if is_passed:
            self.let_go(delivery)
        return is_passed

    async def _claim_or_take(self) -> Delivery | None:
        while self._dead:
            claimed = await self._queue.claim_from(self._dead[0], self._consumer, int(self._lease_seconds * 500))
            if claimed is not None:
                log.info("claimed %s from a worker that left", claimed.entry.request_id)
                return claimed
            self._dead.pop(0)
        if time.monotonic() >= self._next_claim:
            self._next_claim = time.monotonic() + self._lease_seconds / 2
            # Of a worker that renews nothing and yet is there, or that left while nobody heard of it.
            silent = await self._queue.claim(self._consumer, 1, int(self._lease_seconds * 2000))
            if silent:
                self._next_claim = 0.0
                log.info("claimed %s from a silent worker", silent[0].entry.request_id)
                return silent[0]
        taken = await self._queue.take(self._consumer, 1, TAKE_BLOCK_MS)
        return taken[0] if taken else None

    async def acknowledge(self, delivery: Delivery) -> None:
        """Take the entry off the queue, where it is still this worker's.

        While Redis is away, keep trying until nobody waits for the request.
        """
        try:
            while delivery.entry_id in self._held:
                try:
                    await self._queue.remove(delivery.entry_id)
                    return
                except RedisError as error:
                    if time.time() > delivery.entry.deadline:
                        log.warning("entry %s could not be acknowledged: %s", delivery.entry_id, error)
                        return
                    await asyncio.sleep(RETRY_SECONDS)
        finally:
            self.let_go(delivery)

    def let_go(self, delivery: Delivery) -> None:
        """Stop caring for an entry without acknowledging it: whoever claims it serves it."""
        self._held.discard(delivery.entry_id)

    async def give_back(self, deliveries: Iterable[Delivery], is_untouched: bool) -> None:
        """Let others have these entries at once; while Redis is away, when this worker has been silent for a lease."""
        for delivery in deliveries:
            self.let_go(delivery)
            try:
                await self._queue.give_back(self._consumer, delivery, is_untouched)
            except RedisError as error:
                log.warning("entry %s could not be given back: %s", delivery.entry_id, error)

    def hurry(self) -> None:
        """Somebody has given entries back: claim before anything else is taken."""
        self._next_claim = 0.0

    def cancel(self, request_id: str, attempt: int) -> None:
        """Skip this request, up to `attempt`, should it still come."""
        self._cancelled[request_id] = attempt
        if len(self._cancelled) > MAX_CANCELLED:
            self._cancelled.popitem(last=False)

    async def renew(self) -> None:
        """Show that this worker is alive; nobody can claim what it holds for another lease."""
        if not self._held:
            return
        try:
            await self._queue.renew(self._consumer, list(self._held))
        except RedisError as error:
            log.debug("entries could not be renewed: %s", error)


def _consumer(member: Member) -> str:
    """A name in the queue's group that no other life of the process has."""
    return f"{member.id}@{member.epoch}"
