"""Who is in the mesh: each process registers in Redis under a lease and watches the others.

A process is `(id, epoch)`; the epoch is its start time in nanoseconds, so a restarted worker is a new peer and
whatever was held for the old one is released. Redis expires a registration that is not renewed, so no clocks are
compared. While Redis is away the last known membership stays in force, and after it is back every process gets one
lease of grace to register again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Annotated, Literal

import msgspec
import redis.asyncio

from headrace.errors import StartError
from headrace.redis_client import Keys, RedisError
from headrace.wire import Count, Decoder, MeshId, Message, WireError, encode

log = logging.getLogger(__name__)

LOOKS_PER_LEASE = 4
"""How often, in one lease, a process renews its own registration and reads the others'."""

Tier = Literal["gateway", "prefill", "decode"]


class Member(Message, frozen=True, kw_only=True):
    """One process as the registry knows it."""

    id: MeshId
    epoch: Annotated[int, msgspec.Meta(ge=0)]
    tier: Tier
    address: Annotated[str, msgspec.Meta(max_length=256)]
    """ZeroMQ address of the process's mailbox."""
    data_address: Annotated[str, msgspec.Meta(max_length=256)] = ""
    """`host:port` that takes data lines; empty where none does."""
    metrics_address: Annotated[str, msgspec.Meta(max_length=256)] = ""
    """`host:port` of its `/metrics`, `/health` and `/ready`; empty where it has none."""
    version: Annotated[str, msgspec.Meta(max_length=64)]
    model: Annotated[str, msgspec.Meta(max_length=256)]
    model_fingerprint: Annotated[str, msgspec.Meta(max_length=64)]
    max_model_len: Count
    draining: bool = False
    """It finishes what it holds and takes nothing new."""
    stats: dict[str, float] = {}
    """Gauges and counters by metric name (`headrace.telemetry` lists them)."""


class MeshMismatch(StartError):
    """This process and an earlier one disagree on model or version; the message names both sides."""


class Registry:
    """Keeps this process registered and `members` (everyone else, by id) current."""

    def __init__(self, client: redis.asyncio.Redis, keys: Keys, me: Member, lease_seconds: float) -> None:
        self.me = me
        self.members: dict[str, Member] = {}
        self.on_join: list[Callable[[Member], None]] = []
        self.on_leave: list[Callable[[Member], None]] = []
        self._client = client
        self._keys = keys
        self._lease_seconds = lease_seconds
        self._decode: Decoder[Member] = Decoder(Member)
        self._touched = asyncio.Event()
        self._refreshing = asyncio.Lock()
        self._outage_ended = 0.0
        self._reported: set[tuple[str, int]] = set()

    async def join(self) -> None:
        """Register. Raises `MeshMismatch` where an earlier process serves another model or version."""
        await self._renew()
        await self.refresh()

    async def run(self) -> None:
        """Renew the lease and watch the others until cancelled."""
        interval = self._lease_seconds / LOOKS_PER_LEASE
        reachable = True
        while True:
            try:
                await self._renew()
                if not reachable:  # before the refresh, which would find nobody yet
                    log.info("Redis is back")
                    self._excuse_absence()
                reachable = True
                await self.refresh()
            except RedisError as error:
                if reachable:
                    log.warning("Redis is away, going on with the members known so far: %s", error)
                reachable = False
            try:
                await asyncio.wait_for(self._touched.wait(), interval)
                await asyncio.sleep(interval / 2)  # one write for a burst of changes
            except TimeoutError:
                pass
            self._touched.clear()

    def update_stats(self, stats: dict[str, float]) -> None:
        """Publish new figures soon (within a tenth of a lease)."""
        if stats != self.me.stats:
            self.me = msgspec.structs.replace(self.me, stats=stats)
            self._touched.set()

    def drain(self) -> None:
        """Tell the others to send nothing new."""
        self.me = msgspec.structs.replace(self.me, draining=True)
        self._touched.set()

    async def leave(self) -> None:
        """Unregister, so that peers need not wait for the lease to end."""
        async with self._client.pipeline(transaction=True) as pipeline:
            pipeline.delete(self._keys.member(self.me.id))
            pipeline.srem(self._keys.members, self.me.id)
            await pipeline.execute()

    async def refresh(self) -> None:
        """Read the membership now and report who joined and who left."""
        async with self._refreshing:  # an older read must not be applied over a newer one
            self._apply(await self._read())

    def _apply(self, found: dict[str, Member]) -> None:
        if time.monotonic() - self._outage_ended < self._lease_seconds:
            found = {**self.members, **found}
        for member in list(self.members.values()):
            current = found.get(member.id)
            if current is None or current.epoch != member.epoch:
                del self.members[member.id]
                log.info("%s left", member.id)
                for callback in self.on_leave:
                    callback(member)
        for member in found.values():
            joined = member.id not in self.members
            self.members[member.id] = member
            if joined:
                log.info("%s joined at %s", member.id, member.address)
                for callback in self.on_join:
                    callback(member)

    def tier(self, tier: Tier) -> list[Member]:
        """The live members of one tier, in order of id."""
        return sorted((m for m in self.members.values() if m.tier == tier), key=lambda member: member.id)

    async def _renew(self) -> None:
        async with self._client.pipeline(transaction=True) as pipeline:
            pipeline.set(self._keys.member(self.me.id), encode(self.me), px=int(self._lease_seconds * 1000))
            pipeline.sadd(self._keys.members, self.me.id)
            _, was_absent = await pipeline.execute()
        if was_absent:
            self._excuse_absence()

    def _excuse_absence(self) -> None:
        """Redis was away or lost its memory: for one lease, nobody who is missing there counts as gone."""
        if self.members:
            self._outage_ended = time.monotonic()

    async def _read(self) -> dict[str, Member]:
        members: set[bytes] = await self._client.smembers(self._keys.members)  # type: ignore[assignment]
        ids = sorted(member_id.decode() for member_id in members)
        if self.me.id not in ids:
            self._excuse_absence()
        if not ids:
            return {}
        names = [self._keys.member(member_id) for member_id in ids]
        values: list[bytes | None] = await self._client.mget(names)  # type: ignore[assignment]
        expired = [member_id for member_id, value in zip(ids, values, strict=True) if value is None]
        if expired:
            await self._client.srem(self._keys.members, *expired)
        found = {}
        for member_id, value in zip(ids, values, strict=True):
            if value is None or member_id == self.me.id:
                continue
            member = self._compatible(member_id, value)
            if member is not None:
                found[member_id] = member
        return found

    def _compatible(self, member_id: str, value: bytes) -> Member | None:
        """Decode a registration; the younger of two processes that don't fit together gives way."""
        try:
            member = self._decode(value)
        except WireError as error:
            raise MeshMismatch(f"{member_id} registered in a form that this version can't read: {error}") from error
        mine, theirs = _identity(self.me), _identity(member)
        if mine == theirs:
            return member
        if member.epoch < self.me.epoch:
            raise MeshMismatch(
                f"{self.me.id} serves {mine} but {member.id}, which was here first, serves {theirs}: start both "
                "with the same --model and version, or give this mesh its own --namespace"
            )
        if (member.id, member.epoch) not in self._reported:
            self._reported.add((member.id, member.epoch))
            log.error("ignoring %s: it serves %s, this mesh serves %s", member.id, theirs, mine)
        return None


def _identity(member: Member) -> str:
    return f"{member.model} ({member.model_fingerprint[:12]}) on headrace {member.version}"
