"""Which decode worker gets a request."""

from __future__ import annotations

import asyncio

from headrace.kvtransfer.handoff import Handoff, HandoffFailed
from headrace.kvtransfer.sender import Sender
from headrace.registry import Member, Registry

RETRY_SECONDS = 0.2
FINAL_CAUSES = {"layout", "too_long", "invalid"}
"""Causes for a refusal that asking again can't change."""
CROWDED = 0.9


class Placement:
    """Chooses the decode worker with the smallest share of its pages spoken for.

    One in the same process comes first, unless it is crowded: pages need not travel to it.
    """

    def __init__(self, registry: Registry, sender: Sender, beside: str | None = None) -> None:
        self._registry = registry
        self._sender = sender
        self._beside = beside
        self._joined = asyncio.Event()
        registry.on_join.append(lambda _: self._joined.set())

    async def choose(self, handoff: Handoff) -> str:
        """The id of the receiver to try next, waiting for one. Raises `HandoffFailed` where none will ever do."""
        while True:
            if (best := self.best(handoff)) is not None:
                return best
            workers = self._workers()
            causes = {handoff.refused[worker.id] for worker in workers}
            if causes and causes <= FINAL_CAUSES:
                raise HandoffFailed(f"no decode worker can take it: {', '.join(sorted(causes))}")
            self._joined.clear()
            try:
                await asyncio.wait_for(self._joined.wait(), RETRY_SECONDS)
            except TimeoutError:
                handoff.refused = {id: cause for id, cause in handoff.refused.items() if cause in FINAL_CAUSES}

    def best(self, handoff: Handoff) -> str | None:
        """The same without waiting; None where nobody is left to ask."""
        willing = [worker for worker in self._workers() if worker.id not in handoff.refused]
        return min(willing, key=self._rank).id if willing else None

    def _workers(self) -> list[Member]:
        return [worker for worker in self._registry.tier("decode") if not worker.draining]

    def _rank(self, worker: Member) -> tuple[bool, float, str]:
        total = worker.stats.get("kv_pages_total", 1.0) or 1.0
        promised = self._sender.tokens_promised(worker.id) / worker.stats.get("kv_page_tokens", 1.0)
        load = (worker.stats.get("kv_pages_in_use", 0.0) + promised) / total
        return worker.id != self._beside or load > CROWDED, load, worker.id
