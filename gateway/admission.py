"""Who may come in: refuses at once what can't be served in time, instead of letting it wait for nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass

from headrace.gateway.callers import Caller
from headrace.gateway.dispatcher import Dispatcher
from headrace.gateway.errors import QueueFull, Unavailable
from headrace.gateway.terms import Terms
from headrace.registry import Member, Tier
from headrace.settings import Settings

WORKER_TIERS: tuple[Tier, ...] = ("prefill", "decode")
PATIENCE_SECONDS = 3.0
"""How long a request waits for the first worker of a tier to appear."""
RESERVED = 0.5
"""Part of the queue that is split among callers by weight and kept for each; the rest is for whoever comes."""


@dataclass(frozen=True)
class Arrival:
    """What is known of a request when it asks to be let in; before it is read, that is not its size."""

    terms: Terms
    choices: int = 1
    prompt_tokens: int = 1
    """Of all its choices."""


class Admission:
    """Watches the mesh's membership and the gateway's queue."""

    def __init__(self, dispatcher: Dispatcher, settings: Settings, callers: list[Caller]) -> None:
        self.stopping = False
        """Once true, nobody is admitted."""
        self._dispatcher = dispatcher
        self._registry = dispatcher.mesh.node.registry
        self._max_requests = settings.max_queued_requests
        self._max_tokens = settings.max_queued_tokens
        self._max_ttft = settings.max_ttft
        self._callers = callers
        self._weights = sum(caller.weight for caller in callers)
        self._changed = asyncio.Event()
        self._registry.on_join.append(self._on_change)
        self._registry.on_leave.append(self._on_change)

    async def admit(self, arrival: Arrival) -> int:
        """Let a request in; return the context length of the mesh in tokens.

        Raises `Unavailable` (no workers, stopping) and `QueueFull`.
        """
        self.check(arrival)
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                await self.until(complete=True)
        except TimeoutError:
            raise Unavailable(f"No {self.missing_tier()} worker is running.", code="no_workers") from None
        return self.context_length()

    def check(self, arrival: Arrival) -> None:
        """Raise what speaks against a request, as far as it can be told at once."""
        if self.stopping:
            raise Unavailable("This server is stopping.", code="stopping")
        dispatcher, terms = self._dispatcher, arrival.terms
        if dispatcher.waiting == 0:  # whatever it is, nobody is in its way
            return
        seconds_a_token = 1 / (dispatcher.rate() or dispatcher.waiting_cost)
        over = self._over(self._max_requests, arrival.choices, dispatcher.requests_of, terms.caller)
        if over > 0:
            seconds = over * dispatcher.waiting_cost / dispatcher.waiting * seconds_a_token
            raise QueueFull(f"{dispatcher.waiting} requests are waiting: try again later.", seconds)
        over = self._over(self._max_tokens, arrival.prompt_tokens, dispatcher.tokens_of, terms.caller)
        if over > 0:
            tokens = sum(dispatcher.tokens_of.values())
            raise QueueFull(f"Prompts of {tokens} tokens are waiting: try again later.", over * seconds_a_token)
        wait = dispatcher.seconds_until_start(terms.caller, terms.priority)
        limit = min(self._max_ttft, terms.timeout)
        if wait > limit:
            raise QueueFull(
                f"The first token would come after {wait:.1f} s, and may after {limit:g} s: try again later.",
                wait - limit,
            )

    def context_length(self) -> int:
        """Tokens of prompt and output that every worker has room for; 0 where there is none."""
        return min((worker.max_model_len for tier in WORKER_TIERS for worker in self._takers(tier)), default=0)

    def missing_tier(self) -> Tier | None:
        """A tier without a live worker, if there is one."""
        return next((tier for tier in WORKER_TIERS if not self._takers(tier)), None)

    async def until(self, complete: bool) -> None:
        """Wait until both tiers have a worker, or (`complete` False) until one has none."""
        while (self.missing_tier() is None) != complete:
            self._changed.clear()
            await self._changed.wait()

    def _over(self, most: int, added: int, waiting: Mapping[Caller, int], caller: Caller) -> float:
        """How much too much `added` would be where `most` may wait; 0 or less where it fits.

        A caller has its own reserve and, beside it, as much as the others left of what is nobody's reserve.
        """
        reserve = most * RESERVED / self._weights  # of weight 1
        others = [(other, held) for other, held in waiting.items() if other != caller]
        taken = sum(max(held - reserve * other.weight, 0.0) for other, held in others)
        own = waiting.get(caller, 0) + added
        return own - reserve * caller.weight - max(most * (1 - RESERVED) - taken, 0.0)

    def _takers(self, tier: Tier) -> list[Member]:
        return [member for member in self._registry.tier(tier) if not member.draining]

    def _on_change(self, member: Member) -> None:
        self._changed.set()
