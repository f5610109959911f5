"""Who may come in: refuses at once what can't be served, instead of letting it wait for nothing."""

from __future__ import annotations

import asyncio

from headrace.gateway.errors import QueueFull, Unavailable
from headrace.node import Node
from headrace.redis_client import RedisError
from headrace.registry import Member, Tier

WORKER_TIERS: tuple[Tier, ...] = ("prefill", "decode")
PATIENCE_SECONDS = 3.0
"""How long a request waits for the first worker of a tier to appear."""


class Admission:
    """Watches the mesh's membership and the queue's length."""

    def __init__(self, node: Node, max_queued_requests: int) -> None:
        self.stopping = False
        """Once true, nobody is admitted."""
        self._node = node
        self._max_queued = max_queued_requests
        self._changed = asyncio.Event()
        node.registry.on_join.append(self._on_change)
        node.registry.on_leave.append(self._on_change)

    async def admit(self, choices: int) -> int:
        """Let `choices` new entries into the queue; return the context length of the mesh in tokens.

        Raises `Unavailable` (no workers, no Redis, stopping) and `QueueFull`.
        """
        if self.stopping:
            raise Unavailable("This server is stopping.", code="stopping")
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                await self.until(complete=True)
        except TimeoutError:
            raise Unavailable(f"No {self.missing_tier()} worker is running.", code="no_workers") from None
        context_length = min(worker.max_model_len for tier in WORKER_TIERS for worker in self._takers(tier))
        try:
            waiting = await self._node.queue.depth()
        except RedisError as error:
            raise Unavailable(f"The request queue can't be reached: {error}.", code="queue_unavailable") from error
        if waiting + choices > self._max_queued:
            raise QueueFull(f"{waiting} requests are waiting and {self._max_queued} may: try again later.")
        return context_length

    def missing_tier(self) -> Tier | None:
        """A tier without a live worker, if there is one."""
        return next((tier for tier in WORKER_TIERS if not self._takers(tier)), None)

    async def until(self, complete: bool) -> None:
        """Wait until both tiers have a worker, or (`complete` False) until one has none."""
        while (self.missing_tier() is None) != complete:
            self._changed.clear()
            await self._changed.wait()

    def _takers(self, tier: Tier) -> list[Member]:
        return [member for member in self._node.registry.tier(tier) if not member.draining]

    def _on_change(self, member: Member) -> None:
        self._changed.set()
