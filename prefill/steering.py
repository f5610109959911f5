"""Which prefill worker had better compute a prompt: the one that took it from the queue, or one that holds its prefix.

Workers tell each other which pages they have computed, and what is left to do (`Holds`). Who takes an entry knows so
whether another one holds more of its prompt, and passes it on (`PassedOn`) where it will be computed no later there:
where the tokens that wait before it, with those of its own that are missing, are no more than here. So nothing is
passed on to the busiest.
"""

from __future__ import annotations

from collections.abc import Sequence

from headrace.kvtransfer.prefix_holders import PrefixHolders
from headrace.registry import Member, Registry


class Steering:
    """What one prefill worker knows of the others of its tier."""

    def __init__(self, registry: Registry, page_size: int) -> None:
        self.steered = 0
        """Prompts passed on."""
        self.kept = 0
        """Prompts that were not, because their holder has too much to do."""
        self._registry = registry
        self._page_size = page_size
        self._holders = PrefixHolders()
        self._waiting: dict[str, tuple[dict[str, float], float]] = {}
        """By worker: the figures that it published last, and what is known of its backlog since, in tokens."""
        registry.on_leave.append(self._forget)

    def heard(self, worker: Member, page_hashes: Sequence[bytes], waiting: int) -> None:
        """`worker` has computed these pages, and so many tokens wait there."""
        self._holders.remember(worker.id, page_hashes)
        self._waiting[worker.id] = worker.stats, waiting

    def better(self, page_hashes: Sequence[bytes], tokens: int, held: int, waiting: int) -> Member | None:
        """The worker to pass a prompt of `tokens` tokens on to, if there is one.

        `page_hashes` are of the pages that may be found, this worker has the first `held`, and `waiting` tokens to
        compute before.
        """
        name, held_there = self._holders.longest(page_hashes)
        worker = self._registry.members.get(name) if name is not None else None
        if worker is None or worker.draining or held_there <= held:
            return None
        missing = tokens - held_there * self._page_size
        if self._backlog(worker) + missing > waiting + tokens - held * self._page_size:
            self.kept += 1
            return None
        return worker

    def passed_on(self, worker: Member, page_hashes: Sequence[bytes], tokens: int) -> None:
        """The prompt is `worker`'s now."""
        self.steered += 1
        tokens -= self._holders.longest(page_hashes)[1] * self._page_size
        self._waiting[worker.id] = worker.stats, self._backlog(worker) + tokens

    def _backlog(self, worker: Member) -> float:
        stats, tokens = self._waiting.get(worker.id, (None, 0.0))
        return tokens if stats is worker.stats else worker.stats.get("prompt_tokens_waiting", 0.0)

    def _forget(self, member: Member) -> None:
        if member.tier == "prefill":
            self._waiting.pop(member.id, None)
            self._holders.forget(member.id)

    def figures(self) -> dict[str, float]:
        """By metric name."""
        return {"prompts_steered_total": self.steered, "prompts_not_steered_total": self.kept}
