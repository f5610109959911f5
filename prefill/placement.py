"""Which decode worker gets a request."""

from __future__ import annotations

import asyncio

from headrace.kvtransfer.handoff import Handoff, HandoffFailed
from headrace.kvtransfer.sender import Sender
from headrace.registry import Member, Registry

RETRY_SECONDS = 0.2
FINAL_CAUSES = {"layout", "too_long", "invalid"}
"""Causes for a refusal that asking again can't change."""


class Placement:
    """Chooses the decode worker with the smallest share of its pages spoken for."""

    def __init__(self, registry: Registry, sender: Sender) -> None:
        self._registry = registry
        self._sender = sender
        self._joined = asyncio.Event()
        registry.on_join.append(lambda _: self._joined.set())

    async def choose(self, handoff: Handoff) -> str:
        """The id of the receiver to try next, waiting for one. Raises `HandoffFailed` where none will ever do."""
        while True:
            workers = [worker for worker in self._registry.tier("decode") if not worker.draining]
            willing = [worker for worker in workers if worker.id not in handoff.refused]
            if willing:
                return min(willing, key=self._load).id
            causes = {handoff.refused[worker.id] for worker in workers}
            if causes and causes <= FINAL_CAUSES:
                raise HandoffFailed(f"no decode worker can take it: {', '.join(sorted(causes))}")
            self._joined.clear()
            try:
                await asyncio.wait_for(self._joined.wait(), RETRY_SECONDS)
            except TimeoutError:
                handoff.refused = {id: cause for id, cause in handoff.refused.items() if cause in FINAL_CAUSES}

    def _load(self, worker: Member) -> tuple[float, str]:
        total = worker.stats.get("kv_pages_total", 1.0) or 1.0
        promised = self._sender.tokens_promised(worker.id) / worker.stats.get("kv_page_tokens", 1.0)
        spoken_for = worker.stats.get("kv_pages_in_use", 0.0) + promised
        return spoken_for / total, worker.id
