"""Which decode worker gets a request."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Container, Sequence
from dataclasses import dataclass

from headrace.kvtransfer.handoff import Handoff, HandoffFailed
from headrace.kvtransfer.prefix_holders import PrefixHolders
from headrace.registry import Member, Registry

RETRY_SECONDS = 0.2
FINAL_CAUSES = {"layout", "too_long", "invalid"}
"""Causes for a refusal that asking again can't change."""
CROWDED = 0.9
AFFINITY = 0.1
"""By how much more of its room a worker may have spoken for that holds the whole prompt already."""
STALE_SECONDS = 2.0
"""A worker's figures are believed after that, even if they are the same as before."""


@dataclass
class _Placed:
    """What went to a worker since it published `stats`."""

    stats: dict[str, float]
    at: float
    requests: int = 0
    tokens: int = 0


class Placement:
    """Chooses the decode worker with the smallest part of its room, pages or places, spoken for.

    One that was given the same prefix before has an advantage: what it still holds need not travel, and takes no new
    pages. One in the same process comes first, unless it is crowded: pages need not travel to it at all.
    """

    def __init__(self, registry: Registry, beside: str | None = None) -> None:
        self._registry = registry
        self._beside = beside
        self._placed: dict[str, _Placed] = {}
        self._holders = PrefixHolders()
        self._joined = asyncio.Event()
        registry.on_join.append(lambda _: self._joined.set())
        registry.on_leave.append(self._forget)

    async def choose(self, handoff: Handoff, page_hashes: Sequence[bytes] = ()) -> str:
        """The id of the receiver to try next, waiting for one. Raises `HandoffFailed` where none will ever do.

        `page_hashes`: of the prompt's full pages.
        """
        while True:
            if "stale" in handoff.refused.values():  # a newer attempt, or its Cancel, that did not come here was seen
                raise HandoffFailed("the attempt is over")
            if (best := self.best(handoff, page_hashes)) is not None:
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

    def best(self, handoff: Handoff, page_hashes: Sequence[bytes] = ()) -> str | None:
        """The same without waiting; None where nobody is left to ask."""
        found = self.likely(page_hashes, handoff.refused)
        if found is None:
            return None
        self.place(found[0], len(handoff.offer.token_ids), page_hashes)
        return found[0].id

    def likely(self, page_hashes: Sequence[bytes], refused: Container[str] = ()) -> tuple[Member, int] | None:
        """Who would be chosen now, and how many of the pages it was given before."""
        willing = [worker for worker in self._workers() if worker.id not in refused]
        if not willing:
            return None
        holder, pages = self._holders.longest(page_hashes)
        held = pages / max(len(page_hashes), 1)
        chosen = min(willing, key=lambda worker: self._rank(worker, held if worker.id == holder else 0.0))
        return chosen, pages if chosen.id == holder else 0

    def _workers(self) -> list[Member]:
        return [worker for worker in self._registry.tier("decode") if not worker.draining]

    def _rank(self, worker: Member, held: float) -> tuple[bool, float, str]:
        stats, placed = worker.stats, self._placed_since(worker)
        new_pages = placed.tokens / stats.get("kv_page_tokens", 1.0)
        pages = (stats.get("kv_pages_in_use", 0.0) + new_pages) / (stats.get("kv_pages_total", 1.0) or 1.0)
        requests = stats.get("requests_running", 0.0) + stats.get("requests_waiting", 0.0) + placed.requests
        load = max(pages, requests / stats["max_num_seqs"] if "max_num_seqs" in stats else 0.0)
        return worker.id != self._beside or load > CROWDED, load - AFFINITY * held, worker.id

    def _placed_since(self, worker: Member) -> _Placed:
        placed = self._placed.get(worker.id)
        if placed is None or placed.stats != worker.stats or time.monotonic() - placed.at > STALE_SECONDS:
            placed = self._placed[worker.id] = _Placed(worker.stats, time.monotonic())
        return placed

    def place(self, worker: Member, tokens: int, page_hashes: Sequence[bytes]) -> None:
        """A prompt goes to this worker."""
        placed = self._placed_since(worker)
        placed.requests += 1
        placed.tokens += tokens
        self._holders.remember(worker.id, page_hashes)

    def _forget(self, member: Member) -> None:
        if self._placed.pop(member.id, None) is not None:
            self._holders.forget(member.id)
