"""Holds what was accepted until the prefill tier can start it soon, and says how long that takes.

The queue in Redis is first come, first served, whoever comes. So this one stands before it: only what keeps the workers
busy for a moment is released, and the rest waits here, in the order of `FairQueue`. Where there is no backlog a request
is released at once.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence

from headrace.gateway.callers import Caller
from headrace.gateway.choice import Choice
from headrace.gateway.errors import Unavailable
from headrace.gateway.fair_queue import FairQueue
from headrace.gateway.mesh_client import MeshClient
from headrace.gateway.prefill_rate import PrefillRate
from headrace.registry import Member

STEP_TOKENS = 512
"""Of a prefill step where a worker does not say."""
STEPS_AHEAD = 2
"""Released for each worker, in steps and in requests: one is computed while the next is on its way."""
SECONDS_AHEAD = 0.25
"""The same in time, for workers whose steps are short."""
PROMPT_COST = 32
"""In tokens, of a prompt beside its own: steps, handoffs and places in a batch are not free for short ones either."""
OUTPUT_TOKEN_COST = 2.0
"""Of an output token, in prompt tokens, when callers' shares are compared (as in VTC, arXiv:2401.00588)."""


class Dispatcher:
    """All choices between admission and their end."""

    def __init__(self, mesh: MeshClient) -> None:
        self.mesh = mesh
        self.requests_of: Counter[Caller] = Counter()
        """Choices without a first token, of each caller that has any."""
        self.tokens_of: Counter[Caller] = Counter()
        """Their prompt tokens."""
        self._callers: dict[Choice, Caller] = {}
        """Of all choices."""
        self._queue: FairQueue[Choice] = FairQueue()
        self._ahead: dict[Choice, int] = {}
        """Cost of those released and without a first token."""
        self._cost_ahead = 0
        self._rate = PrefillRate()
        mesh.on_prefilled = self._on_prefilled
        mesh.node.registry.on_join.append(self._on_join)

    async def submit(self, choices: Sequence[Choice], caller: Caller, priority: int) -> None:
        """Have these choices run, as soon as it is their turn.

        Those whose turn it is at once fail with `Unavailable` where Redis is away; the others wait for it.
        """
        for choice in choices:
            tokens = len(choice.prompt.token_ids)
            self._callers[choice] = caller
            self._queue.push(choice, caller, PROMPT_COST + tokens, priority)
            self.requests_of[caller] += 1
            self.tokens_of[caller] += tokens
        await asyncio.gather(*(self.mesh.submit(choice) for choice in self._pump(choices)))

    def release(self, choice: Choice) -> None:
        """Forget a choice that is over, or that nobody waits for any more."""
        caller = self._callers.pop(choice, None)
        if caller is None:
            return
        if self._queue.discard(choice):
            self._count_out(choice, caller)
            choice.abandon()
        else:
            self.mesh.release(choice)
            self._queue.charge(caller, OUTPUT_TOKEN_COST * len(choice.token_ids))
            self._settle(choice, caller)
        self._pump()

    def fail_all(self, error: Unavailable) -> None:
        """End every choice, because this process stops."""
        for choice in self._callers:
            choice.fail(error)

    @property
    def under_way(self) -> int:
        """Choices between admission and their end."""
        return len(self._callers)

    @property
    def waiting(self) -> int:
        """Choices without a first token."""
        return len(self._queue) + len(self._ahead)

    @property
    def waiting_cost(self) -> int:
        """What they cost, in prompt tokens."""
        return self._queue.tokens + self._cost_ahead

    def rate(self) -> float | None:
        """What this gateway can have prefilled in a second, in prompt tokens, if that is known."""
        workers = self._workers()
        published = [rate for worker in workers if (rate := worker.stats.get("prefill_tokens_per_second"))]
        return self._rate(self._part(), sum(published) / len(published) if published else None)

    def seconds_until_start(self, caller: Caller, priority: int) -> float:
        """How long one more choice of this caller would wait; 0 while nothing is known of the workers' speed."""
        rate = self.rate()
        ahead = self._cost_ahead + self._queue.ahead_of(caller, priority)
        return ahead / rate if rate else 0.0

    def _on_prefilled(self, choice: Choice) -> None:
        if (caller := self._callers.get(choice)) is not None:
            self._pump(prefilled=self._settle(choice, caller))

    def _settle(self, choice: Choice, caller: Caller) -> int:
        """A released choice waits no more; returns its cost, 0 where it did not wait."""
        if choice not in self._ahead:
            return 0
        cost = self._ahead.pop(choice)
        self._cost_ahead -= cost
        self._count_out(choice, caller)
        return cost

    def _count_out(self, choice: Choice, caller: Caller) -> None:
        self.requests_of[caller] -= 1
        self.tokens_of[caller] -= len(choice.prompt.token_ids)
        if not self.requests_of[caller]:
            del self.requests_of[caller], self.tokens_of[caller]

    def _pump(self, submitted: Sequence[Choice] = (), prefilled: int = 0) -> list[Choice]:
        """Release what fits; returns those of `submitted` that do, which the caller sends."""
        found = []
        cost_ahead, choices_ahead = self._window()
        while self._queue and (self._cost_ahead < cost_ahead or len(self._ahead) < choices_ahead):
            choice, cost = self._queue.pop()
            self._ahead[choice] = cost
            self._cost_ahead += cost
            if choice in submitted:
                found.append(choice)
            else:
                self.mesh.enqueue(choice)
        self._rate.observe(prefilled, self._part() if self._queue else 0.0)
        self.mesh.node.registry.update_stats(
            {
                "requests_queued": float(len(self._queue)),
                "prompt_tokens_queued": float(self._queue.tokens - PROMPT_COST * len(self._queue)),
            }
        )
        return found

    def _window(self) -> tuple[float, float]:
        """How much, or how many choices, may be released and without a first token."""
        workers = self._workers()
        if not workers:
            return 0.0, 0.0
        share = self._part() / len(workers)
        step = sum(worker.stats.get("prefill_step_tokens", STEP_TOKENS) for worker in workers)
        tokens = max(step * STEPS_AHEAD * share, (self.rate() or 0.0) * SECONDS_AHEAD)
        return tokens, max(STEPS_AHEAD * self._part(), 1.0)

    def _part(self) -> float:
        """How many prefill workers are this gateway's, where others have a backlog, too."""
        gateways = self.mesh.node.registry.tier("gateway")
        busy = sum(1 for gateway in gateways if gateway.stats.get("requests_queued", 0.0) > 0)
        return len(self._workers()) / (busy + 1)

    def _workers(self) -> list[Member]:
        return [worker for worker in self.mesh.node.registry.tier("prefill") if not worker.draining]

    def _on_join(self, member: Member) -> None:
        if member.tier == "prefill":
            self._pump()
