"""What the registry keeps in Redis: a key a member that expires with its lease, a set of ids, marks, and a channel.

Each step is one script, so it is atomic and one round trip on a single server, behind Sentinel and in a Cluster, where
all keys of a mesh share a slot.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from headrace.redis_client import Client, Keys

RETRY_SECONDS = 0.1
"""Between two attempts to subscribe."""
MARK_SECONDS = 3600
"""How long a buried epoch is marked; a process that slept longer is buried again by those who remember it."""

RENEW = """
if redis.call('EXISTS', KEYS[3]) == 1 then return {1, 0} end
local held = redis.call('EXISTS', KEYS[1])
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
redis.call('SADD', KEYS[2], ARGV[3])
redis.call('PUBLISH', ARGV[4], ARGV[1])
local reply = {0, held}
for i = 4, #KEYS do
  reply[#reply + 1] = redis.call('GET', KEYS[i])
  reply[#reply + 1] = redis.call('PTTL', KEYS[i])
end
return reply
"""
"""Keys: my registration, the set, my mark, others' registrations. Arguments: registration, lease in ms, id, channel."""

BURY = """
if ARGV[5] == '1' and redis.call('EXISTS', KEYS[1]) == 1 then return 0 end
redis.call('SET', KEYS[3], '', 'EX', ARGV[4])
if ARGV[5] == '1' then redis.call('SREM', KEYS[2], ARGV[1]) end
redis.call('PUBLISH', ARGV[3], ARGV[2])
return 1
"""
"""Keys: registration, the set, mark. Arguments: id, message, channel, seconds of the mark, 1 to spare the living."""

LEAVE = """
redis.call('DEL', KEYS[1])
redis.call('SREM', KEYS[2], ARGV[1])
redis.call('PUBLISH', ARGV[3], ARGV[2])
"""
"""Keys: registration, the set. Arguments: id, message, channel."""


@dataclass(frozen=True)
class Lease:
    """Another member's registration as Redis has it."""

    value: bytes
    seconds: float
    """Until it expires."""


@dataclass(frozen=True)
class Renewal:
    """What a renewal found."""

    is_buried: bool
    """This epoch was given up by the others; nothing was renewed."""
    was_held: bool
    """The lease had not expired."""
    leases: list[Lease | None]
    """Of those who were looked for; None where it has ended."""


class RegistryStore:
    """All methods raise `RedisError`."""

    def __init__(self, client: Client, keys: Keys) -> None:
        self._client = client
        self._keys = keys

    async def renew(
        self, member_id: str, epoch: int, registration: bytes, lease_seconds: float, look_for: Sequence[str]
    ) -> Renewal:
        """Register for another lease, publish it, and look for others."""
        names = [*self._names(member_id, epoch), *map(self._keys.member, look_for)]
        milliseconds = int(lease_seconds * 1000)
        reply = await self._run(RENEW, names, registration, milliseconds, member_id, self._keys.news)
        found = zip(reply[2::2], reply[3::2], strict=True)
        leases = [Lease(value, max(left, 0) / 1000) if value else None for value, left in found]
        return Renewal(bool(reply[0]), bool(reply[1]), leases)

    async def bury(self, member_id: str, epoch: int, left: bytes, only_if_silent: bool) -> bool:
        """Mark an epoch as over and publish that; False where its process turned out to be registered."""
        spare = int(only_if_silent)
        names = self._names(member_id, epoch)
        return bool(await self._run(BURY, names, member_id, left, self._keys.news, MARK_SECONDS, spare))

    async def leave(self, member_id: str, left: bytes) -> None:
        """Take a registration back and publish that."""
        await self._run(LEAVE, [self._keys.member(member_id), self._keys.members], member_id, left, self._keys.news)

    async def look(self) -> dict[str, bytes | None]:
        """All registrations in order of id; None where the lease has ended. Changes nothing."""
        client: Any = self._client
        ids = sorted(member_id.decode() for member_id in await client.smembers(self._keys.members))
        if not ids:
            return {}
        values = await client.mget([self._keys.member(member_id) for member_id in ids])
        return dict(zip(ids, values, strict=True))

    async def read(self) -> dict[str, bytes]:
        """All registrations by id. Ids without one are taken off the set: nobody may know them who would bury them."""
        client: Any = self._client
        found = await self.look()
        if expired := [member_id for member_id, value in found.items() if value is None]:
            await client.srem(self._keys.members, *expired)
        return {member_id: value for member_id, value in found.items() if value is not None}

    @asynccontextmanager
    async def subscription(self) -> AsyncIterator[Subscription]:
        """Hear inside the block what the others publish from its beginning on."""
        pubsub: Any = self._client.pubsub()
        try:
            await pubsub.subscribe(self._keys.news)
            subscription = Subscription(pubsub)
            await subscription.begin()
            yield subscription
        finally:
            await pubsub.aclose()

    def _names(self, member_id: str, epoch: int) -> list[str]:
        return [self._keys.member(member_id), self._keys.members, self._keys.mark(member_id, epoch)]

    async def _run(self, script: str, names: list[str], *arguments: bytes | str | int) -> Any:
        client: Any = self._client
        return await client.eval(script, len(names), *names, *arguments)


class Subscription:
    """The channel, as it is heard."""

    def __init__(self, pubsub: Any) -> None:
        self._pubsub = pubsub

    async def begin(self) -> None:
        """Wait until Redis has confirmed the subscription. Raises `TimeoutError`."""
        if await self._pubsub.get_message(timeout=5.0) is None:
            raise TimeoutError("Redis did not confirm the subscription")

    async def next(self, seconds: float) -> bytes:
        """The next message. Raises `TimeoutError` where none comes in time."""
        while (message := await self._pubsub.get_message(timeout=seconds)) is not None:
            if message["type"] == "message":
                return bytes(message["data"])
        raise TimeoutError(f"nothing was heard for {seconds} s")
