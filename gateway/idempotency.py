"""`Idempotency-Key`: a retry gets the first one's answer, at whichever gateway it arrives, instead of a second one.

A whole answer is computed to its end even where its client has gone, for that is when clients retry, and is kept in
Redis for `KEPT_SECONDS`. A retry while it is computed waits for it. What failed is not kept: a retry tries again. The
same key with another request is a 422.

A stream can't be told twice: while one runs, another with its key is a 409; once it is over, or its client has gone, a
retry is a new request.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from headrace.gateway.errors import Conflict, DeadlineExceeded, KeyReused, QueueFull, Unavailable
from headrace.gateway.terms import Terms
from headrace.node import Node
from headrace.redis_client import RedisError
from headrace.tasks import end_task
from headrace.wire import Decoder, MeshId, Message, encode

log = logging.getLogger(__name__)

KEPT_SECONDS = 600.0
MAX_KEPT_BYTES = 2**20
"""A larger answer is not kept: a retry computes it again."""
MAX_RUNNING = 1024
"""Answers under way that have a key; their clients may have gone."""
GRACE_SECONDS = 10.0
"""What a claim outlives its request's deadline by."""
LOOK_SECONDS = 0.25
"""Between two looks whether another gateway has finished; within one, a retry waits for the answer itself."""
REPLACE = "if redis.call('get', KEYS[1]) == ARGV[1] then return redis.call('set', KEYS[1], ARGV[2], 'px', ARGV[3]) end"


class Outcome(Message, frozen=True, kw_only=True):
    """What Redis knows of a key. `body` is missing while the answer is computed."""

    fingerprint: bytes
    """Of path and body."""
    gateway: MeshId
    epoch: int
    is_stream: bool
    body: bytes | None = None


class Idempotency:
    """All requests of this gateway that have a key."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._running: dict[str, asyncio.Task[bytes]] = {}
        """By name in Redis."""
        self._decode: Decoder[Outcome] = Decoder(Outcome)

    async def once(self, terms: Terms, fingerprint: bytes, compute: Callable[[], Awaitable[bytes]]) -> bytes:
        """What `compute` returns, or did for an earlier request of the same key. Raises `ApiError` as it does."""
        if terms.idempotency_key is None:
            return await compute()
        name, claim = self._claim(terms, fingerprint, is_stream=False)
        if (known := await self._take(name, claim, terms.timeout)) is not None:
            return known
        task = self._running.get(name)
        if task is None:
            if len(self._running) >= MAX_RUNNING:
                await self._forget(name)
                raise QueueFull(f"{MAX_RUNNING} answers with an Idempotency-Key are under way: try again later.")
            task = self._running[name] = asyncio.create_task(self._compute(name, claim, compute))
            task.add_done_callback(lambda task: self._ended(name, task))
        return await asyncio.shield(task)

    @asynccontextmanager
    async def alone(self, terms: Terms, fingerprint: bytes) -> AsyncIterator[None]:
        """Around a stream: raises `Conflict` where one with its key runs, and `KeyReused`."""
        if terms.idempotency_key is None:
            yield
            return
        name, claim = self._claim(terms, fingerprint, is_stream=True)
        await self._take(name, claim, terms.timeout)
        try:
            yield
        finally:
            await asyncio.shield(self._forget(name))

    async def close(self) -> None:
        """End what still runs."""
        for task in list(self._running.values()):
            await end_task(task)

    def _claim(self, terms: Terms, fingerprint: bytes, is_stream: bool) -> tuple[str, Outcome]:
        me = self._node.registry.me
        digest = hashlib.sha256(f"{terms.caller.name}\0{terms.idempotency_key}".encode()).hexdigest()
        claim = Outcome(fingerprint=fingerprint, gateway=me.id, epoch=me.epoch, is_stream=is_stream)
        return self._node.keys.outcome(digest), claim

    async def _take(self, name: str, claim: Outcome, timeout: float) -> bytes | None:
        """Claim a key, or return the answer that is known. None also where this gateway computes it already."""
        deadline = time.monotonic() + timeout
        milliseconds = int((timeout + GRACE_SECONDS) * 1000)
        try:
            while time.monotonic() < deadline:
                if await self._node.redis.set(name, encode(claim), nx=True, px=milliseconds):
                    return None
                data: bytes | None = await self._node.redis.get(name)  # type: ignore[assignment]
                if data is None:
                    continue
                found = self._decode(data)
                if found.fingerprint != claim.fingerprint:
                    raise KeyReused("This Idempotency-Key came with another request before: use a new one.")
                if found.body is not None:
                    return found.body
                if self._is_gone(found):
                    if await self._node.redis.eval(REPLACE, 1, name, data, encode(claim), str(milliseconds)):
                        return None
                    continue
                if found.is_stream:
                    raise Conflict("A stream with this Idempotency-Key is running.")
                if name in self._running:
                    return None
                await asyncio.sleep(LOOK_SECONDS)
        except RedisError as error:
            raise Unavailable(f"Idempotency-Key can't be looked up: {error}.", code="queue_unavailable") from error
        raise DeadlineExceeded("The request with the same Idempotency-Key was not answered in time.")

    def _is_gone(self, found: Outcome) -> bool:
        registry = self._node.registry
        owner = registry.me if found.gateway == registry.me.id else registry.members.get(found.gateway)
        return owner is None or owner.epoch != found.epoch

    async def _compute(self, name: str, claim: Outcome, compute: Callable[[], Awaitable[bytes]]) -> bytes:
        kept = False
        try:
            body = await compute()
            kept = len(body) <= MAX_KEPT_BYTES and await self._keep(name, claim, body)
            return body
        finally:
            if not kept:
                await self._forget(name)

    async def _keep(self, name: str, claim: Outcome, body: bytes) -> bool:
        outcome = Outcome(
            fingerprint=claim.fingerprint, gateway=claim.gateway, epoch=claim.epoch, is_stream=False, body=body
        )
        try:
            await self._node.redis.set(name, encode(outcome), px=int(KEPT_SECONDS * 1000))
        except RedisError as error:
            log.warning("an answer could not be kept for its Idempotency-Key: %s", error)
            return False
        return True

    async def _forget(self, name: str) -> None:
        try:
            await self._node.redis.delete(name)
        except RedisError as error:
            log.warning("an Idempotency-Key could not be given free, it ends by itself: %s", error)

    def _ended(self, name: str, task: asyncio.Task[bytes]) -> None:
        del self._running[name]
        if not task.cancelled():
            task.exception()  # whoever waited has it; where nobody did, there is nobody to tell
