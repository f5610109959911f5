"""Who is in the mesh: each process registers in Redis under a lease and hears of the others by push.

A process is `(id, epoch)`; the epoch is its start time in nanoseconds, so a restarted worker is a new peer and
whatever was held for the old one is released. Every renewal is published with the registration in it, so joins, drains
and figures are heard at once, and who is silent for a lease is looked for in Redis, which alone decides: no clocks are
compared. Whoever finds the registration expired *buries* that epoch, which publishes it to all and leaves a mark; the
buried process, should it have only slept, finds the mark, lets go of everything and registers anew as another peer.

    a member:  absent ── heard ──▶ present ── says so, buried, or a newer epoch heard ──▶ absent

Redis that is away, stopped or emptied proves nothing about anybody: the last known membership stays in force, and when
it is back every process gets three quarters of a lease to register again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Annotated, Literal

import msgspec

from headrace import registry_store
from headrace.errors import StartError
from headrace.redis_client import Client, Keys, RedisError
from headrace.registry_store import RegistryStore
from headrace.tasks import run_beside
from headrace.wire import Count, Decoder, Epoch, MeshId, Message, WireError, encode

log = logging.getLogger(__name__)

RENEWALS_PER_LEASE = 4
GRACE = 0.75
"""Part of a lease that all have to register again when Redis is back."""
LATE_SECONDS = 0.005
"""How much later than a lease's end it is looked for: Redis expires by the millisecond."""
MAX_BURIED = 4096

Tier = Literal["gateway", "prefill", "decode"]


class Member(Message, frozen=True, kw_only=True):
    """One process as the registry knows it."""

    id: MeshId
    epoch: Epoch
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


class Left(Message, frozen=True, kw_only=True):
    """This epoch of a process is over, because it said so or because its lease ended."""

    id: MeshId
    epoch: Epoch


class MeshMismatch(StartError):
    """This process and an earlier one disagree on model or version; the message names both sides."""


class Registry:
    """Keeps this process registered and `members` (everyone else, by id) current."""

    def __init__(self, client: Client, keys: Keys, me: Member, lease_seconds: float) -> None:
        """`client` must not try commands again by itself: a failure is news here."""
        self.me = me
        self.members: dict[str, Member] = {}
        self.on_join: list[Callable[[Member], None]] = []
        self.on_leave: list[Callable[[Member], None]] = []
        self.on_outage: list[Callable[[], None]] = []
        """Called when Redis is back after it was away or has lost what it knew."""
        self.on_buried: list[Callable[[], None]] = []
        """Called where the others took this process for dead, before everybody leaves and joins again in its view."""
        self._store = RegistryStore(client, keys)
        self._lease_seconds = lease_seconds
        self._decode: Decoder[Member | Left] = Decoder(Member | Left)
        self._touched = asyncio.Event()
        self._leases: dict[str, float] = {}
        """When each member's lease ends, as far as this process has heard."""
        self._absent: set[str] = set()
        """Members whose lease had ended at the last look."""
        self._buried: OrderedDict[str, int] = OrderedDict()
        """The newest epoch by id that is known to be over."""
        self._zombies: set[tuple[str, int]] = set()
        """Buried epochs that were heard again."""
        self._tiers: dict[Tier, list[Member]] = {}
        """What `tier` found since the last change."""
        self._has_joined = False
        self._reachable = True
        self._grace_ends = 0.0
        self._is_buried = False
        self._reported: set[tuple[str, int]] = set()

    async def join(self) -> None:
        """Register. Raises `MeshMismatch` where an earlier process serves another model or version."""
        await self._store.renew(self.me.id, self.me.epoch, encode(self.me), self._lease_seconds, [])
        await self.refresh()
        self._has_joined = True

    async def run(self) -> None:
        """Renew the lease and follow the others until cancelled."""
        await run_beside(self._renew_loop(), [self._listen_loop()])

    def update_stats(self, stats: dict[str, float]) -> None:
        """Publish new figures soon (within an eighth of a lease), beside those of other names."""
        if not stats.items() <= self.me.stats.items():
            self.me = msgspec.structs.replace(self.me, stats=self.me.stats | stats)
            self._touched.set()

    def drain(self) -> None:
        """Tell the others to send nothing new."""
        self.me = msgspec.structs.replace(self.me, draining=True)
        self._touched.set()

    async def leave(self) -> None:
        """Unregister, so that peers need not wait for the lease to end."""
        await self._store.leave(self.me.id, encode(Left(id=self.me.id, epoch=self.me.epoch)))

    async def refresh(self) -> None:
        """Read the whole membership now. Who is missing there is not gone yet: its lease may be on the way."""
        for member_id, value in (await self._store.read()).items():
            self._hear(value, member_id)

    def tier(self, tier: Tier) -> list[Member]:
        """The live members of one tier, in order of id. The list stays as it is: a change makes another."""
        if tier not in self._tiers:
            found = (member for member in self.members.values() if member.tier == tier)
            self._tiers[tier] = sorted(found, key=lambda member: member.id)
        return self._tiers[tier]

    async def _renew_loop(self) -> None:
        interval = self._lease_seconds / RENEWALS_PER_LEASE
        while True:
            started = time.monotonic()
            try:
                await self._renew()
            except RedisError as error:
                if self._reachable:
                    log.warning("Redis is away, going on with the members known so far: %s", error)
                self._reachable = False
            due = min([started + interval, *(ends + LATE_SECONDS for ends in self._leases.values())])
            # One write for a burst of changes, and no more where Redis fails at once.
            await asyncio.sleep(max(started + interval / 2 - time.monotonic(), 0))
            try:
                await asyncio.wait_for(self._touched.wait(), max(due - time.monotonic(), 0))
            except TimeoutError:
                pass
            self._touched.clear()

    async def _renew(self) -> None:
        """Renew, look for those whose leases seem to have ended, and bury whose leases have."""
        started = time.monotonic()
        silent = [member for member in self.members.values() if self._leases[member.id] <= started]
        ids = [member.id for member in silent]
        me = self.me
        renewal = await self._store.renew(me.id, me.epoch, encode(me), self._lease_seconds, ids)
        if renewal.is_buried or self._is_buried:
            await self._start_anew()
            return
        if not self._reachable or not renewal.was_held:
            self._outage_ended()
        for member, lease in zip(silent, renewal.leases, strict=True):
            if lease is not None:
                self._hear(lease.value, member.id, lease.seconds)
            elif self._is_silent(member):
                if member.id not in self._absent:
                    # Where Redis itself was stopped, the renewals of others come in just behind this one.
                    self._absent.add(member.id)
                elif time.monotonic() >= self._grace_ends:
                    await self._bury(member)
        for member_id, epoch in list(self._zombies):
            await self._store.bury(member_id, epoch, encode(Left(id=member_id, epoch=epoch)), only_if_silent=False)
            self._zombies.discard((member_id, epoch))

    def _is_silent(self, member: Member) -> bool:
        current = self.members.get(member.id)
        return current is not None and current.epoch == member.epoch and self._leases[member.id] <= time.monotonic()

    def _outage_ended(self) -> None:
        """Redis was away or lost its memory: for three renewals, nobody who is missing there counts as gone."""
        if not self._reachable:
            log.info("Redis is back")
        self._reachable = True
        self._grace_ends = time.monotonic() + GRACE * self._lease_seconds
        for callback in self.on_outage:
            callback()

    async def _bury(self, member: Member) -> None:
        left = Left(id=member.id, epoch=member.epoch)
        if await self._store.bury(member.id, member.epoch, encode(left), only_if_silent=True):
            self._hear_left(left)

    async def _start_anew(self) -> None:
        """The others did elsewhere what this process held: it lets go of everything and is a new peer."""
        log.warning("this process was silent for more than a lease and was given up: it registers anew")
        for callback in self.on_buried:
            callback()
        for member in list(self.members.values()):
            self._drop(member)
        self.me = msgspec.structs.replace(self.me, epoch=time.time_ns())
        self._is_buried = False
        await self.join()

    async def _listen_loop(self) -> None:
        while True:
            try:
                async with self._store.subscription() as messages:
                    await self.refresh()
                    while True:
                        # Our own renewals come by here, too, so a silent line is a broken one.
                        self._hear(await messages.next(self._lease_seconds))
            except (RedisError, TimeoutError) as error:
                log.debug("the registry's news can't be heard: %s", error)
                await asyncio.sleep(registry_store.RETRY_SECONDS)

    def _hear(self, value: bytes, member_id: str = "a member", lease_seconds: float | None = None) -> None:
        """Take a registration or a leave, in the order in which Redis has it. Raises `MeshMismatch`."""
        try:
            heard = self._decode(value)
        except WireError as error:
            if not self._has_joined:
                raise MeshMismatch(f"{member_id} registered in a form that this version can't read: {error}") from error
            if (member_id, -1) not in self._reported:
                self._reported.add((member_id, -1))
                log.error("ignoring %s, who registered in a form that this version can't read: %s", member_id, error)
            return
        if isinstance(heard, Left):
            self._hear_left(heard)
        elif heard.id != self.me.id and self._is_compatible(heard):
            self._hear_member(heard, self._lease_seconds if lease_seconds is None else lease_seconds)

    def _hear_member(self, member: Member, lease_seconds: float) -> None:
        known = self.members.get(member.id)
        if self._buried.get(member.id, -1) >= member.epoch:
            self._zombies.add((member.id, member.epoch))
            self._touched.set()
            return
        if known is not None and known.epoch > member.epoch:
            return
        if known is not None and known.epoch < member.epoch:
            self._drop(known)
            known = None
        self.members[member.id] = member
        self._tiers.clear()
        self._leases[member.id] = time.monotonic() + lease_seconds
        self._absent.discard(member.id)
        if known is None:
            log.info("%s joined at %s", member.id, member.address)
            for callback in self.on_join:
                callback(member)

    def _hear_left(self, left: Left) -> None:
        if left.id == self.me.id:
            if left.epoch == self.me.epoch:
                self._is_buried = True
                self._touched.set()
            return
        self._buried[left.id] = max(left.epoch, self._buried.pop(left.id, -1))
        if len(self._buried) > MAX_BURIED:
            self._buried.popitem(last=False)
        member = self.members.get(left.id)
        if member is not None and member.epoch <= left.epoch:
            self._drop(member)

    def _drop(self, member: Member) -> None:
        del self.members[member.id]
        self._tiers.clear()
        del self._leases[member.id]
        self._absent.discard(member.id)
        log.info("%s left", member.id)
        for callback in self.on_leave:
            callback(member)

    def _is_compatible(self, member: Member) -> bool:
        """Of two processes that don't fit together the younger gives way."""
        mine, theirs = _identity(self.me), _identity(member)
        if mine == theirs:
            return True
        if member.epoch < self.me.epoch:
            raise MeshMismatch(
                f"{self.me.id} serves {mine} but {member.id}, which was here first, serves {theirs}: start both "
                "with the same --model and version, or give this mesh its own --namespace"
            )
        if (member.id, member.epoch) not in self._reported:
            self._reported.add((member.id, member.epoch))
            log.error("ignoring %s: it serves %s, this mesh serves %s", member.id, theirs, mine)
        return False


def _identity(member: Member) -> str:
    return f"{member.model} ({member.model_fingerprint[:12]}) on headrace {member.version}"
