"""The request queue: a Redis Stream with one consumer group, read by the prefill workers.

An entry is acknowledged, and deleted, only after its handoff committed. A worker renews the entries that it holds; one
that falls silent loses them to whoever claims next. Every delivery has its own attempt number: the gateway counts in
steps of `DELIVERIES_PER_ATTEMPT`, redeliveries of one entry count by one, so a higher number is always the newer.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import redis.asyncio
from redis.exceptions import ResponseError

from headrace.messages.request import QueueEntry
from headrace.redis_client import Keys
from headrace.wire import Decoder, WireError, encode

log = logging.getLogger(__name__)

GROUP = "prefill"
FIELD = b"entry"
DELIVERIES_PER_ATTEMPT = 16
"""After so many deliveries an entry is given up: it has killed or lost as many workers."""
MAX_RENEWED = 4096
GIVEN_BACK_MS = 3_600_000
"""Idle time of an entry that was given back: longer than anybody waits before it claims."""


@dataclass(frozen=True)
class Delivery:
    """One entry in this worker's hands."""

    entry_id: str
    entry: QueueEntry
    attempt: int
    exhausted: bool = False
    """True where this was the last delivery allowed; the receiver fails the request instead of trying again."""
    is_new: bool = False
    """Nobody had it before."""


class RequestQueue:
    """The gateway puts and removes; prefill workers take, renew, claim and acknowledge."""

    def __init__(self, client: redis.asyncio.Redis, keys: Keys) -> None:
        self._client = client
        self._stream = keys.queue
        self._decode: Decoder[QueueEntry] = Decoder(QueueEntry)

    async def create(self) -> None:
        """Make the stream and its group where they don't exist."""
        try:
            await self._client.xgroup_create(self._stream, GROUP, id="0", mkstream=True)
        except ResponseError as error:
            if "BUSYGROUP" not in str(error):
                raise

    async def put(self, entry: QueueEntry) -> str:
        """Append an entry and return its id."""
        entry_id: bytes = await self._client.xadd(self._stream, {FIELD: encode(entry)})  # type: ignore[assignment]
        return entry_id.decode()

    async def remove(self, entry_id: str) -> None:
        """Acknowledge and delete an entry, whoever holds it."""
        async with self._client.pipeline(transaction=True) as pipeline:
            pipeline.xack(self._stream, GROUP, entry_id)
            pipeline.xdel(self._stream, entry_id)
            await pipeline.execute()

    async def missing(self, entry_ids: Sequence[str]) -> set[str]:
        """Those of these entries that are not in the queue (any more)."""
        async with self._client.pipeline(transaction=False) as pipeline:
            for entry_id in entry_ids:
                pipeline.xrange(self._stream, entry_id, entry_id)
            found = await pipeline.execute()
        return {entry_id for entry_id, entries in zip(entry_ids, found, strict=True) if not entries}

    async def depth(self) -> int:
        """Entries that are waiting or in a prefill worker's hands."""
        return int(await self._client.xlen(self._stream))

    async def take(self, consumer: str, count: int, block_ms: int) -> list[Delivery]:
        """Up to `count` new entries, waiting up to `block_ms` for the first."""
        try:
            reply = await self._client.xreadgroup(GROUP, consumer, {self._stream: ">"}, count=count, block=block_ms)
        except ResponseError as error:
            if "NOGROUP" not in str(error):
                raise
            await self.create()  # the server was emptied
            return []
        entries = [entry for _, stream in _streams(reply) for entry in stream]
        taken = [await self._delivery(entry_id, fields, 1) for entry_id, fields in entries]
        return [replace(delivery, is_new=True) for delivery in taken if delivery]

    async def claim(self, consumer: str, count: int, min_idle_ms: int) -> list[Delivery]:
        """Take over up to `count` entries that nobody renewed for `min_idle_ms`."""
        try:
            reply = await self._client.xautoclaim(self._stream, GROUP, consumer, min_idle_ms, "0-0", count=count)
        except ResponseError as error:
            if "NOGROUP" not in str(error):
                raise
            return []
        deliveries = []
        for entry_id, fields in reply[1]:
            if not fields:  # Redis 6.2 reports deleted entries without fields
                continue
            pending = await self._client.xpending_range(self._stream, GROUP, min=entry_id, max=entry_id, count=1)
            if pending and (delivery := await self._delivery(entry_id, fields, int(pending[0]["times_delivered"]))):
                deliveries.append(delivery)
        return deliveries

    async def claim_from(self, dead: str, consumer: str, min_idle_ms: int) -> Delivery | None:
        """Take over one entry of a consumer that is dead, if it holds one that nobody has taken over just now."""
        try:
            pending = await self._client.xpending_range(
                self._stream, GROUP, min="-", max="+", count=1, consumername=dead, idle=min_idle_ms
            )
        except ResponseError as error:
            if "NOGROUP" not in str(error):
                raise
            return None
        if not pending:
            return None
        entry_id, times = pending[0]["message_id"], int(pending[0]["times_delivered"])
        claimed: Any = await self._client.xclaim(self._stream, GROUP, consumer, min_idle_ms, [entry_id])
        for claimed_id, fields in claimed:
            if fields:
                return await self._delivery(claimed_id, fields, times + 1)
        return None

    async def renew(self, consumer: str, entry_ids: list[str]) -> None:
        """Restart the idle time of those of `entry_ids` that are still `consumer`'s."""
        pending = await self._client.xpending_range(
            self._stream, GROUP, min="-", max="+", count=MAX_RENEWED, consumername=consumer
        )
        mine = {bytes(item["message_id"]).decode() for item in pending}.intersection(entry_ids)  # type: ignore[arg-type]
        if mine:
            await self._client.xclaim(self._stream, GROUP, consumer, min_idle_time=0, message_ids=[*mine], justid=True)

    async def give_back(self, consumer: str, delivery: Delivery, is_untouched: bool) -> None:
        """Have the next `claim` of anybody take this entry, if it still is `consumer`'s.

        One that `is_untouched` comes with the same attempt number again: nothing of this delivery is anywhere.
        """
        entry_id = delivery.entry_id
        pending = await self._client.xpending_range(self._stream, GROUP, min=entry_id, max=entry_id, count=1)
        if not pending or pending[0]["consumer"] != consumer.encode():
            return
        times = int(pending[0]["times_delivered"])
        await self._client.xclaim(
            self._stream,
            GROUP,
            consumer,
            min_idle_time=0,
            message_ids=[entry_id],
            idle=GIVEN_BACK_MS,
            retrycount=times - 1 if is_untouched else times,
            justid=True,
        )

    async def pass_on(self, consumer: str, delivery: Delivery, to: str) -> bool:
        """Have another consumer hold this entry, as if it had taken it; False where it is not `consumer`'s any more.

        Where that one dies, or never hears of it, the entry is claimed as any other.
        """
        entry_id = delivery.entry_id
        pending = await self._client.xpending_range(self._stream, GROUP, min=entry_id, max=entry_id, count=1)
        if not pending or pending[0]["consumer"] != consumer.encode():
            return False
        claimed: Any = await self._client.xclaim(
            self._stream, GROUP, to, min_idle_time=0, message_ids=[entry_id], justid=True
        )
        return bool(claimed)

    async def _delivery(self, entry_id: bytes, fields: dict[bytes, bytes], times: int) -> Delivery | None:
        try:
            entry = self._decode(fields[FIELD])
        except (WireError, KeyError) as error:
            log.error("dropping queue entry %s, which can't be read: %s", entry_id.decode(), error)
            await self.remove(entry_id.decode())
            return None
        attempt = entry.attempt + min(times, DELIVERIES_PER_ATTEMPT) - 1
        return Delivery(entry_id.decode(), entry, attempt, exhausted=times >= DELIVERIES_PER_ATTEMPT)


def _streams(reply: object) -> list[tuple[bytes, list[tuple[bytes, dict[bytes, bytes]]]]]:
    """XREADGROUP's reply as pairs, whether the connection speaks RESP2 (a list) or RESP3 (a map)."""
    if not reply:
        return []
    if isinstance(reply, dict):
        return [(name, [entry for part in parts for entry in part]) for name, parts in reply.items()]
    assert isinstance(reply, list)
    return reply
