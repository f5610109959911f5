"""One way to connect to Redis, and the names of all keys that Headrace uses there."""

from __future__ import annotations

from dataclasses import dataclass

import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError

__all__ = ["Keys", "RedisError", "connect"]

SOCKET_TIMEOUT_SECONDS = 5.0
"""Longer than any blocking read (see `RequestQueue.take`), so that a dead server is told from a quiet one."""
MAX_CONNECTIONS = 64
"""Of one process; more commands at once take turns, each waiting `SOCKET_TIMEOUT_SECONDS` at most."""


@dataclass(frozen=True)
class Keys:
    """Redis keys of one mesh."""

    namespace: str

    @property
    def queue(self) -> str:
        """Stream of requests to be prefilled."""
        return f"{self.namespace}:queue"

    @property
    def members(self) -> str:
        """Set of the ids that registered and have not left."""
        return f"{self.namespace}:members"

    def outcome(self, digest: str) -> str:
        """The answer to a request that had an idempotency key; expires."""
        return f"{self.namespace}:outcome:{digest}"

    def member(self, member_id: str) -> str:
        """One process's registration; expires with its lease."""
        return f"{self.namespace}:member:{member_id}"

    def finished(self, gateway: str) -> str:
        """What a gateway finished lately."""
        return f"{self.namespace}:finished:{gateway}"


def connect(url: str) -> redis.asyncio.Redis:
    """A client for `url`; connects at the first command. Fails after a few quick retries, never hangs."""
    pool = redis.asyncio.BlockingConnectionPool.from_url(
        url,
        max_connections=MAX_CONNECTIONS,
        timeout=SOCKET_TIMEOUT_SECONDS,
        socket_timeout=SOCKET_TIMEOUT_SECONDS,
        socket_connect_timeout=SOCKET_TIMEOUT_SECONDS,
        retry=Retry(ExponentialBackoff(cap=0.5, base=0.05), 3),
        retry_on_error=[RedisConnectionError, RedisTimeoutError],
        health_check_interval=10,
    )
    return redis.asyncio.Redis.from_pool(pool)
