"""One way to connect to Redis, and the names of all keys that Headrace uses there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import redis.asyncio
from redis.asyncio.cluster import ClusterNode, RedisCluster
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import ExponentialBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError

from headrace.redis_url import RedisUrl

__all__ = ["Client", "Keys", "RedisError", "connect"]

SOCKET_TIMEOUT_SECONDS = 5.0
"""Longer than any blocking read (see `RequestQueue.take`), so that a dead server is told from a quiet one."""
IMPATIENT_TIMEOUT_SECONDS = 2.0
MAX_CONNECTIONS = 64
"""Of one process; more commands at once take turns, each waiting `SOCKET_TIMEOUT_SECONDS` at most."""

Client = redis.asyncio.Redis
"""A Redis Cluster's client counts as one: it has the same commands."""


@dataclass(frozen=True)
class Keys:
    """Redis keys of one mesh. Their common hash tag puts all into one slot of a Redis Cluster."""

    namespace: str

    @property
    def queue(self) -> str:
        """Stream of requests to be prefilled."""
        return f"{{{self.namespace}}}:queue"

    @property
    def members(self) -> str:
        """Set of the ids that registered and have not left."""
        return f"{{{self.namespace}}}:members"

    @property
    def news(self) -> str:
        """Channel of renewed registrations and of those that ended."""
        return f"{{{self.namespace}}}:news"

    def outcome(self, digest: str) -> str:
        """The answer to a request that had an idempotency key; expires."""
        return f"{{{self.namespace}}}:outcome:{digest}"

    def member(self, member_id: str) -> str:
        """One process's registration; expires with its lease."""
        return f"{{{self.namespace}}}:member:{member_id}"

    def mark(self, member_id: str, epoch: int) -> str:
        """Tells a process that slept for too long that the others have given it up."""
        return f"{{{self.namespace}}}:buried:{member_id}@{epoch}"

    def finished(self, gateway: str) -> str:
        """What a gateway finished lately."""
        return f"{{{self.namespace}}}:finished:{gateway}"


def connect(url: str, patient: bool = True) -> Client:
    """A client for `url`; connects at the first command and never hangs. Raises `SettingsError` for a bad URL.

    A patient one tries again where a connection broke, but not where an answer is late: the command may still be done.
    The other one reports every failure at once.
    """
    parsed = RedisUrl.parse(url)
    options: dict[str, Any] = dict(parsed.options)
    timeout = SOCKET_TIMEOUT_SECONDS if patient else IMPATIENT_TIMEOUT_SECONDS
    options |= {"socket_timeout": timeout, "socket_connect_timeout": timeout, "health_check_interval": 10}
    backoff = ExponentialBackoff(cap=0.5, base=0.05)
    options["retry"] = Retry(backoff, 3 if patient else 0, supported_errors=(RedisConnectionError,))
    match parsed.form:
        case "cluster":
            nodes = [ClusterNode(host, port) for host, port in parsed.hosts]
            options |= {"startup_nodes": nodes, "max_connections": MAX_CONNECTIONS, "ssl": parsed.is_encrypted}
            return RedisCluster(**options)  # type: ignore[return-value]
        case "sentinel":
            options |= {"ssl": parsed.is_encrypted, "max_connections": MAX_CONNECTIONS}
            sentinel_options: dict[str, Any] = {
                "socket_timeout": IMPATIENT_TIMEOUT_SECONDS,
                "socket_connect_timeout": IMPATIENT_TIMEOUT_SECONDS,
                "ssl": parsed.is_encrypted,
                **parsed.sentinel_options,
            }
            sentinel: Any = cast(Any, Sentinel)(list(parsed.hosts), sentinel_kwargs=sentinel_options)
            return cast(Client, sentinel.master_for(parsed.service, redis_class=_FoundBySentinels, **options))
        case "server":
            options |= {"max_connections": MAX_CONNECTIONS, "timeout": timeout}
            return redis.asyncio.Redis.from_pool(redis.asyncio.BlockingConnectionPool.from_url(url, **options))


class _FoundBySentinels(redis.asyncio.Redis):
    """The primary's client; closes those of the sentinels, too."""

    async def aclose(self, close_connection_pool: bool | None = None) -> None:
        await super().aclose(close_connection_pool)
        pool: Any = self.connection_pool
        for sentinel in pool.sentinel_manager.sentinels:
            await sentinel.aclose()
