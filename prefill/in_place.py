"""When a decode worker had better compute a prompt itself: from what was measured, not from the prompt's length alone.

Two times are compared. Here: what is left of the running pass, a pass of all that waits and of this prompt, and what a
handoff adds to that. There: half a decode step, a pass of what waits there and of what that worker does not hold of the
prompt, and that pass once more for each stream that runs there, since all of them wait for it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from headrace.engine.prompt_cost import CostLine, PromptCost
from headrace.kvtransfer.handoff import Handoff, HandoffFailed
from headrace.kvtransfer.placement import Placement
from headrace.kvtransfer.sender import Sender
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

    def __init__(self, placement: Placement, sender: Sender, page_size: int, cost: PromptCost) -> None:
        """`cost`: of passes here."""
        self._cost = cost
        self._placement = placement
        self._sender = sender
        self._page_size = page_size
        self._under_way: Counter[str] = Counter()
        """Tokens that are computed in place for this worker, by decode worker."""

    def choose(
        self, page_hashes: Sequence[bytes], tokens: int, held: int, backlog: Backlog
    ) -> tuple[Member, int] | None:
        """The decode worker to compute a prompt of so many tokens, and how many it will have to; None: compute it here.

        `page_hashes` are of the pages that may be found in a cache, of which this worker has the first `held`.
        """
        here, found = self._cost.line(), self._placement.likely(page_hashes)
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
        return left + line.seconds(to_compute) + self._sender.stats.exposed_mean

    def _seconds_there(self, worker: Member, missing: int, line: CostLine) -> float:
        stats = worker.stats
        if "in_place_pass_seconds" in stats:
            line = CostLine(stats["in_place_pass_seconds"], stats["in_place_token_seconds"])
        waiting = max(stats.get("in_place_tokens_waiting", 0.0), self._under_way[worker.id])
        until_step_ends = stats.get("inter_token_seconds", 0.0) / 2
        before = self._sender.stats.grant_wait_mean + until_step_ends + line.per_token * waiting
        return before + line.seconds(missing) * (1 + stats.get("requests_running", 0.0))

    async def have_computed(self, handoff: Handoff, page_hashes: Sequence[bytes], worker: Member, missing: int) -> bool:
        """Offer a prompt in place to the worker that was chosen; False where it would not compute it.

        Returns when it has. Raises `HandoffFailed` where it began and did not end.
        """

        async def choose(handoff: Handoff) -> str:
            if handoff.refused:
                raise HandoffFailed(f"{worker.id} would not compute it: {handoff.refused[worker.id]}")
            return worker.id

        self._under_way[worker.id] += missing
        try:
            await self._sender.deliver(handoff, choose)
        except HandoffFailed:
            if handoff.refused:
                return False
            raise
        finally:
            self._under_way[worker.id] -= missing
            if not self._under_way[worker.id]:
                del self._under_way[worker.id]
        self._placement.place(worker, len(handoff.offer.token_ids), page_hashes)
        return True
