"""When a decode worker had better compute a prompt itself: from what was measured, not from the prompt's length alone.

Two times are compared. Here: what is left of the running pass, a pass of all that waits and of this prompt, and what a
handoff adds to that. There: half a decode step, a pass of what waits there and of what that worker does not hold of the
prompt, and that pass once more for each stream that runs there, since all of them wait for it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from headrace.engine.prompt_cost import CostLine, PromptCost
from headrace.kvtransfer.placement import Placement
from headrace.kvtransfer.transfer_stats import TransferStats
from headrace.registry import Member

SURE = 0.8
"""There must take so much less time than here: estimates are off, and what is computed here serves later prompts."""


@dataclass(frozen=True)
class Backlog:
    """What a prefill worker has to do before it can compute one more prompt."""

    waiting_tokens: int
    running: Sequence[tuple[int, float]]
    """Passes on the device: prompt tokens of each, and for how many seconds it has run."""


class InPlaceChoice:
    """What one prefill worker knows of its own speed and of the decode workers'."""

    def __init__(self, placement: Placement, transfers: TransferStats, page_size: int) -> None:
        self.cost = PromptCost()
        """Of passes here."""
        self._placement = placement
        self._transfers = transfers
        self._page_size = page_size
        self._under_way: Counter[str] = Counter()
        """Tokens that are computed in place for this worker, by decode worker."""

    def choose(
        self, page_hashes: Sequence[bytes], tokens: int, held: int, backlog: Backlog
    ) -> tuple[Member, int] | None:
        """The decode worker to compute a prompt of so many tokens, and how many it will have to; None: compute it here.

        `page_hashes` are of the pages that may be found in a cache, of which this worker has the first `held`.
        """
        here, found = self.cost.line(), self._placement.likely(page_hashes)
        if here is None or found is None:
            return None
        worker, held_there = found
        missing = tokens - held_there * self._page_size
        if missing > worker.stats.get("in_place_most_tokens", 0.0):
            return None
        there = self._seconds_there(worker, missing, here)
        return (worker, missing) if there < SURE * self._seconds_here(tokens, held, backlog, here) else None

    def _seconds_here(self, tokens: int, held: int, backlog: Backlog, line: CostLine) -> float:
        left = sum(max(line.seconds(running) - elapsed, 0.0) for running, elapsed in backlog.running)
        to_compute = backlog.waiting_tokens + tokens - held * self._page_size
        return left + line.seconds(to_compute) + self._transfers.exposed_mean

    def _seconds_there(self, worker: Member, missing: int, line: CostLine) -> float:
        stats = worker.stats
        if "in_place_pass_seconds" in stats:
            line = CostLine(stats["in_place_pass_seconds"], stats["in_place_token_seconds"])
        waiting = max(stats.get("in_place_tokens_waiting", 0.0), self._under_way[worker.id])
        until_step_ends = stats.get("inter_token_seconds", 0.0) / 2
        before = self._transfers.grant_wait_mean + until_step_ends + line.per_token * waiting
        return before + line.seconds(missing) * (1 + stats.get("requests_running", 0.0))

    @contextmanager
    def under_way(self, worker: Member, missing: int) -> Iterator[None]:
        """Inside the block so many tokens are computed there."""
        self._under_way[worker.id] += missing
        try:
            yield
        finally:
            self._under_way[worker.id] -= missing
            if not self._under_way[worker.id]:
                del self._under_way[worker.id]
