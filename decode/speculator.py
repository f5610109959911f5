"""Speculative decoding of one worker: asks the drafter, lets the controller cut the drafts, learns from what came."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from headrace.decode.controller import Acceptance, RequestAcceptance, choose_lengths
from headrace.decode.drafter import MAX_DRAFT_TOKENS, Draft, Drafter
from headrace.decode.sequence import Key
from headrace.decode.sequence import Sequence as Request
from headrace.decode.step_cost import StepCost

MAX_STEPS_AHEAD = 15
"""At most so many steps start without a look whether drafts would pay."""


@dataclass
class _Drafted:
    """A request of the batch as the drafter knows it."""

    request: Request
    length: int
    """Tokens that the drafter knows."""
    acceptance: RequestAcceptance = field(default_factory=RequestAcceptance)
    verified: bool = False
    """Whether a draft of it was part of the step before."""
    guess: Draft | None = None
    """For the step before, of whatever length was verified."""


@dataclass
class Counters:
    """Since the worker started."""

    drafted: int = 0
    """Tokens that were verified."""
    accepted: int = 0
    """Those of them that stood and were sent."""
    drafts: int = 0
    """Drafts that were verified, of at least one token."""
    steps: int = 0
    steps_without_drafts: int = 0
    drafting_seconds: float = 0.0
    controlling_seconds: float = 0.0
    """Estimates and the choice of lengths."""
    verification_seconds: float = 0.0
    """All of the steps that verified drafts."""


class Speculator:
    """Proposes drafts before each step. Not thread-safe: it belongs on the scheduler's thread."""

    def __init__(self, drafter: Drafter, cost: StepCost, max_model_len: int) -> None:
        self.counters = Counters()
        self._drafter = drafter
        self._cost = cost
        self._num_requests = 0
        self._max_model_len = max_model_len
        self._acceptance = Acceptance()
        self._drafted: dict[Key, _Drafted] = {}
        self._drafting = 0.0
        """Seconds that the drafts proposed last are expected to have taken."""
        self._steps_ahead = 0
        self._steps_left = 0

    def propose(self, requests: Sequence[Request]) -> dict[Key, list[int]]:
        """Drafts that are worth verifying in the next step, which has these requests."""
        costs = self._drafter.costs(len(requests))
        guesses, lengths = self._choose(requests, costs, 0)
        self._found(bool(lengths))
        self._drafting = 0.0
        if costs is None or not lengths:
            return {key: guesses[key].token_ids[:length] for key, length in lengths.items()}
        started = time.perf_counter()
        drafts = self._drafter.draft(lengths)
        for key, draft in drafts.items():
            self._drafted[key].guess = draft
        self._drafting = costs[max(lengths.values())]
        self.counters.drafting_seconds += time.perf_counter() - started
        return {key: draft.token_ids for key, draft in drafts.items()}

    def waits(self, requests: Sequence[Request]) -> bool:
        """While a step of these requests is in flight: whether the next one should wait for its tokens, for drafts that
        follow them are expected to pay.

        Guesses are made without those tokens, so the first one of each is of a token that is on its way. Where nothing
        was found, the next steps run ahead unasked: twice as many each time, `MAX_STEPS_AHEAD` at most.
        """
        self._num_requests = len(requests)
        if self._steps_left > 0:
            self._steps_left -= 1
            return False
        _, lengths = self._choose(requests, self._drafter.costs(len(requests)), 1)
        if not lengths:
            self._found(False)
        return bool(lengths)

    def _found(self, drafts: bool) -> None:
        self._steps_ahead = 0 if drafts else min(2 * self._steps_ahead + 1, MAX_STEPS_AHEAD)
        self._steps_left = self._steps_ahead

    def _choose(
        self, requests: Sequence[Request], costs: Sequence[float] | None, unknown: int
    ) -> tuple[dict[Key, Draft], dict[Key, int]]:
        """Guesses, of unknown tokens where a draft has its price, and how long those drafts are to be that pay.

        `unknown`: tokens of each request that are on their way.
        """
        started = time.perf_counter()
        self._forget_all_but({request.key for request in requests})
        for request in requests:
            self._follow(request)
        self._num_requests = len(requests)
        limits = {request.key: self._limit(request) for request in requests}
        if costs is None:
            guesses = self._drafter.draft(limits)
        else:
            longest, unknown = len(costs) - 1, 0
            guesses = {key: Draft([0] * min(limit, longest), 0) for key, limit in limits.items() if limit > 0}
        guessed = time.perf_counter()
        chances = []
        for key, guess in guesses.items():
            drafted = self._drafted[key]
            drafted.guess = guess if costs is None else None
            chances.append(self._acceptance.chances(drafted.acceptance, guess)[unknown:])
        chosen = choose_lengths(chances, len(requests), self._cost, costs or ()) if guesses else []
        if costs is not None and not any(chosen):
            self._acceptance.fade()
            for key in guesses:
                self._drafted[key].acceptance.fade()
        self.counters.drafting_seconds += guessed - started
        self.counters.controlling_seconds += time.perf_counter() - guessed
        return guesses, {key: length for key, length in zip(guesses, chosen, strict=True) if length > 0}

    def ran(self, drafts: Mapping[Key, Sequence[int]], seconds: float) -> None:
        """The step that drafts were proposed for took so long; `drafts` are what it verified."""
        counters, drafted = self.counters, sum(map(len, drafts.values()))
        for key in drafts:
            self._drafted[key].verified = True
        if self._num_requests > 0:
            started = time.perf_counter()
            self._cost.observe(self._num_requests + drafted, max(seconds - self._drafting, 0.0), bool(drafts))
            counters.controlling_seconds += time.perf_counter() - started
        counters.steps += 1
        counters.drafts += len(drafts)
        counters.drafted += drafted
        if drafts:
            counters.verification_seconds += seconds
        else:
            counters.steps_without_drafts += 1

    def stats(self) -> dict[str, float]:
        """The counters as metrics of a worker."""
        counters, prefix = self.counters, f"speculation_{self._drafter.name}"
        return {
            f"{prefix}_drafted_total": counters.drafted,
            f"{prefix}_accepted_total": counters.accepted,
            f"{prefix}_mean_accepted_length": counters.accepted / max(counters.drafts, 1),
            "speculation_steps_total": counters.steps,
            "speculation_steps_without_drafts_total": counters.steps_without_drafts,
            "speculation_drafting_seconds_total": counters.drafting_seconds + counters.controlling_seconds,
            "speculation_verification_seconds_total": counters.verification_seconds,
        }

    def _forget_all_but(self, keys: set[Key]) -> None:
        for key in [key for key in self._drafted if key not in keys]:
            self._learn(self._drafted.pop(key))
            self._drafter.leave(key)

    def _follow(self, request: Request) -> None:
        drafted = self._drafted.get(request.key)
        if drafted is None:
            self._drafter.join(request.key, request.token_ids)
            self._drafted[request.key] = _Drafted(request, len(request.token_ids))
            return
        new = self._learn(drafted)
        if new:
            self._drafter.extend(request.key, new)

    def _learn(self, drafted: _Drafted) -> list[int]:
        """Compare what was guessed with what came; returns the new tokens."""
        new = drafted.request.token_ids[drafted.length :]
        drafted.length += len(new)
        if new and drafted.guess is not None:
            self._acceptance.observe(drafted.acceptance, drafted.guess, new)
        drafted.guess = None
        if drafted.verified:
            self.counters.accepted += max(len(new) - 1, 0)
        drafted.verified = False
        return new

    def _limit(self, request: Request) -> int:
        """The step's own token comes on top of the draft."""
        left = request.offer.sampling.max_tokens - request.generated
        return min(MAX_DRAFT_TOKENS, left - 1, self._max_model_len - len(request.token_ids) - 1)
