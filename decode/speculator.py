"""Speculative decoding of one worker: asks the drafters, lets the controller cut the drafts, learns from what came.

A `Drafter` guesses here, before a step. A head guesses on the engine's thread, at the end of the step before, to the
depth that is chosen here. Of a request's guesses the one that promises more tokens counts. Where steps run ahead, as on
a GPU, each is first asked whether the next one should wait for its tokens (`waits`).
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from headrace.decode.chain import ChainDrafter
from headrace.decode.controller import (
    MAX_HEAD_DEPTH,
    Acceptance,
    HeadCost,
    RequestAcceptance,
    choose_lengths,
)
from headrace.decode.drafter import MAX_DRAFT_TOKENS, Draft, Drafter
from headrace.decode.sequence import Key
from headrace.decode.sequence import Sequence as Request
from headrace.decode.step_cost import StepCost
from headrace.engine.decode_batch import DecodeBatch, RunningBatch

DEEPEST = Draft([-1] * MAX_HEAD_DEPTH, range(MAX_HEAD_DEPTH))
"""As far as a head is ever asked to guess."""
BY_PLACE = "by place"
"""Beside the drafters' names: how often a head's guesses were right by their place alone. A token that it did not come
to, as it was in doubt, counts as wrong."""
DEPTH_STEPS = 8
"""How far a head guesses is chosen anew after so many steps, and when requests join or leave."""
TRY_AGAIN_STEPS = 32
"""After so many steps without one, a head guesses a token, to see whether it has become good."""
TRYING_SHARE = 0.005
"""Of the time, which that may take at most: where a guess takes longer than a sixth of a step it comes less often."""
MAX_STEPS_AHEAD = 15
"""At most so many steps start without a look whether drafts would pay."""


@dataclass
class _Drafted:
    """A request of the batch as the drafters know it. By drafter's name: `acceptance` and `guesses`."""

    request: Request
    length: int
    """Tokens that the drafters know."""
    acceptance: dict[str, RequestAcceptance]
    guesses: dict[str, Draft] = field(default_factory=dict)
    """For the step before, of whatever length was verified."""
    proposed: str = ""
    """Whose draft was proposed last."""
    verified: str = ""
    """Whose draft the step before verified, if any."""


class _Choice(NamedTuple):
    """The best guess for a request, and how much of it is worth verifying."""

    drafter: str
    guess: Draft
    length: int


@dataclass
class DrafterCounters:
    """Of one drafter, since the worker started."""

    drafted: int = 0
    """Tokens that were verified."""
    accepted: int = 0
    """Those of them that stood and were sent."""
    drafts: int = 0
    """Drafts that were verified, of at least one token."""


@dataclass
class Counters:
    """Since the worker started."""

    of: dict[str, DrafterCounters] = field(default_factory=lambda: defaultdict(DrafterCounters))
    """By drafter."""
    steps: int = 0
    steps_without_drafts: int = 0
    drafting_seconds: float = 0.0
    """Of what guesses before a step."""
    head_seconds: float = 0.0
    controlling_seconds: float = 0.0
    """Estimates and the choice of lengths."""
    verification_seconds: float = 0.0
    """All of the steps that verified drafts."""

    @property
    def total(self) -> DrafterCounters:
        """Of all drafters."""
        each = self.of.values()
        return DrafterCounters(
            sum(one.drafted for one in each), sum(one.accepted for one in each), sum(one.drafts for one in each)
        )


class Speculator:
    """Proposes drafts before each step. Not thread-safe: it belongs on the scheduler's thread, but for `look`."""

    def __init__(
        self,
        drafter: Drafter,
        cost: StepCost,
        max_model_len: int,
        head: ChainDrafter | None = None,
        head_cost: HeadCost | None = None,
    ) -> None:
        """`head` comes with its cost."""
        self.counters = Counters()
        self._drafter = drafter
        self._cost = cost
        self.ahead: dict[Key, int] = {}
        """Tokens behind each request's newest that the head may read after the next step."""
        self._head = head
        self._head_cost = head_cost
        self._num_requests = 0
        self._max_model_len = max_model_len
        self._names = [drafter.name, *([head.name] if head is not None else [])]
        self._acceptance = {name: Acceptance() for name in [*self._names, BY_PLACE]}
        self._drafted: dict[Key, _Drafted] = {}
        self._depth = 0
        """Tokens that the head is to guess at the end of the next step."""
        self._guessed_depth = 0
        """What it was asked for at the end of the last one."""
        self._paying_depth = 0
        """How far it pays to guess with `_depth_of` requests, for `_depth_lasts` more steps."""
        self._depth_of = self._depth_lasts = 0
        self._steps_without_head = 0
        self._tried = 0.0
        """Seconds of tries that are not made up for yet."""
        self._of_head: dict[Key, Draft] = {}
        """What it guessed at the end of the last one."""
        self._drafting = 0.0
        """Seconds that drafts with a price, proposed last, are expected to have taken."""
        self._steps_ahead = 0
        self._steps_left = 0

    def propose(self, requests: Sequence[Request]) -> dict[Key, list[int]]:
        """Drafts that are worth verifying in the next step, which has these requests."""
        costs = self._drafter.costs(len(requests))
        chosen = self._choose(requests, costs, 0)
        self._found(bool(chosen))
        self._depth = self._next_depth()
        self.ahead = {request.key: self._ahead(request, chosen) for request in requests} if self._depth > 0 else {}
        self._drafting = 0.0
        for key, choice in chosen.items():
            self._drafted[key].proposed = choice.drafter
        if costs is None or not chosen:
            return {key: choice.guess.token_ids[: choice.length] for key, choice in chosen.items()}
        started = time.perf_counter()
        lengths = {key: choice.length for key, choice in chosen.items()}
        drafts = self._drafter.draft(lengths)
        for key, draft in drafts.items():
            self._drafted[key].guesses[self._drafter.name] = draft
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
        chosen = self._choose(requests, self._drafter.costs(len(requests)), 1)
        if not chosen:
            self._found(False)
        return bool(chosen)

    def _found(self, drafts: bool) -> None:
        self._steps_ahead = 0 if drafts else min(2 * self._steps_ahead + 1, MAX_STEPS_AHEAD)
        self._steps_left = self._steps_ahead

    def _choose(self, requests: Sequence[Request], costs: Sequence[float] | None, unknown: int) -> dict[Key, _Choice]:
        """Those drafts that pay. Where they have a price their tokens are not known yet.

        `unknown`: tokens of each request that are on their way.
        """
        started = time.perf_counter()
        self._forget_all_but({request.key for request in requests})
        for request in requests:
            self._follow(request)
        self._num_requests = len(requests)
        limits = {request.key: self._limit(request) for request in requests}
        if costs is None:
            guesses = {self._drafter.name: self._drafter.draft(limits)}
            if self._head is not None:
                guesses[self._head.name] = self._guesses_of_head(limits)
        else:
            longest, unknown = len(costs) - 1, 0
            placeholders = {key: min(limit, longest) for key, limit in limits.items() if limit > 0}
            guesses = {self._drafter.name: {key: Draft([-1] * n, range(n)) for key, n in placeholders.items()}}
        guessed = time.perf_counter()
        best: dict[Key, tuple[float, str, Draft, list[float]]] = {}
        for name, of_drafter in guesses.items():
            acceptance = self._acceptance[name]
            for key, guess in of_drafter.items():
                drafted = self._drafted[key]
                if costs is None:
                    drafted.guesses[name] = guess
                chances = acceptance.chances(drafted.acceptance[name], guess)[unknown:]
                promised = sum(chances)
                if key not in best or promised > best[key][0]:
                    best[key] = (promised, name, guess, chances)
        along = [chances for _, _, _, chances in best.values()]
        lengths = choose_lengths(along, len(requests), self._cost, costs or ()) if along else []
        if costs is not None and not any(lengths):
            self._fade(best)
        self.counters.drafting_seconds += guessed - started
        self.counters.controlling_seconds += time.perf_counter() - guessed
        return {
            key: _Choice(name, guess, length)
            for (key, (_, name, guess, _)), length in zip(best.items(), lengths, strict=True)
            if length > 0
        }

    def _fade(self, keys: Iterable[Key]) -> None:
        """Nothing is drafted, so nothing shows how good drafts would be."""
        self._acceptance[self._drafter.name].fade()
        for key in keys:
            self._drafted[key].acceptance[self._drafter.name].fade()

    def look(self, batch: RunningBatch[Key]) -> None:
        """Let the head guess, on the engine's thread, right after a step."""
        if self._head is not None:
            assert isinstance(batch, DecodeBatch)
            self._of_head = self._head.draft(batch, self._depth)
            self._guessed_depth = self._depth

    def ran(self, drafts: Mapping[Key, Sequence[int]], seconds: float) -> None:
        """The step that drafts were proposed for took so long, the head's guesses included; `drafts` are what it
        verified.
        """
        counters, drafted = self.counters, sum(map(len, drafts.values()))
        if self._head is not None:
            seconds -= self._head.seconds
            counters.head_seconds += self._head.seconds
            tried = self._head.seconds if self._guessed_depth > self._paying_depth else 0.0
            self._tried = max(self._tried - TRYING_SHARE * seconds, 0.0) + tried
            if self._head_cost is not None and self._guessed_depth > 0 and self._num_requests > 0:
                self._head_cost.observe(self._num_requests, self._guessed_depth, self._head.seconds)
        if self._num_requests > 0:
            started = time.perf_counter()
            self._cost.observe(self._num_requests + drafted, max(seconds - self._drafting, 0.0), bool(drafts))
            counters.controlling_seconds += time.perf_counter() - started
        counters.steps += 1
        for key, draft in drafts.items():
            request = self._drafted[key]
            request.verified = request.proposed
            of_drafter = counters.of[request.verified]
            of_drafter.drafts += 1
            of_drafter.drafted += len(draft)
        if drafts:
            counters.verification_seconds += seconds
        else:
            counters.steps_without_drafts += 1

    def stats(self) -> dict[str, float]:
        """The counters as metrics of a worker."""
        counters, stats = self.counters, dict[str, float]()
        for name in self._names:
            of_drafter = counters.of[name]
            stats |= {
                f"speculation_{name}_drafted_total": of_drafter.drafted,
                f"speculation_{name}_accepted_total": of_drafter.accepted,
                f"speculation_{name}_mean_accepted_length": of_drafter.accepted / max(of_drafter.drafts, 1),
            }
        return stats | {
            "speculation_steps_total": counters.steps,
            "speculation_steps_without_drafts_total": counters.steps_without_drafts,
            "speculation_drafting_seconds_total": counters.drafting_seconds
            + counters.head_seconds
            + counters.controlling_seconds,
            "speculation_verification_seconds_total": counters.verification_seconds,
        }

    def _guesses_of_head(self, limits: Mapping[Key, int]) -> dict[Key, Draft]:
        guesses = {}
        for key, guess in self._of_head.items():
            if limits.get(key, 0) > 0:
                guesses[key] = Draft(guess.token_ids[: limits[key]], guess.depths)
                padded = [*guess.token_ids, *DEEPEST.token_ids][: max(self._guessed_depth, len(guess.token_ids))]
                self._drafted[key].guesses[BY_PLACE] = Draft(padded, DEEPEST.depths)
        self._of_head = {}
        return guesses

    def _next_depth(self) -> int:
        """How far the head is to guess at the end of the next step. What it guesses is cut to what pays once it is
        known, so this asks as if its estimates by place were all that will be known.
        """
        if self._head is None or self._head_cost is None or not self._num_requests:
            return 0
        if self._depth_lasts == 0 or self._num_requests != self._depth_of:
            started = time.perf_counter()
            by_place = self._acceptance[BY_PLACE]
            along = [by_place.chances(drafted.acceptance[BY_PLACE], DEEPEST) for drafted in self._drafted.values()]
            costs = self._head_cost.of(self._num_requests)
            self._paying_depth = max(choose_lengths(along, self._num_requests, self._cost, costs))
            self._depth_lasts, self._depth_of = DEPTH_STEPS, self._num_requests
            self.counters.controlling_seconds += time.perf_counter() - started
        self._depth_lasts -= 1
        self._steps_without_head = 0 if self._paying_depth > 0 else self._steps_without_head + 1
        if self._steps_without_head >= TRY_AGAIN_STEPS and self._tried <= 0.0:
            self._steps_without_head = 0
            return 1
        return self._paying_depth

    def _forget_all_but(self, keys: set[Key]) -> None:
        for key in [key for key in self._drafted if key not in keys]:
            self._learn(self._drafted.pop(key))
            self._drafter.leave(key)

    def _follow(self, request: Request) -> None:
        drafted = self._drafted.get(request.key)
        if drafted is None:
            self._drafter.join(request.key, request.token_ids)
            acceptance = {name: RequestAcceptance() for name in self._acceptance}
            self._drafted[request.key] = _Drafted(request, len(request.token_ids), acceptance)
            return
        new = self._learn(drafted)
        if new:
            self._drafter.extend(request.key, new)

    def _learn(self, drafted: _Drafted) -> list[int]:
        """Compare what was guessed with what came; returns the new tokens."""
        new = drafted.request.token_ids[drafted.length :]
        drafted.length += len(new)
        if new:
            for name, guess in drafted.guesses.items():
                self._acceptance[name].observe(drafted.acceptance[name], guess, new)
        drafted.guesses = {}
        if drafted.verified:
            self.counters.of[drafted.verified].accepted += max(len(new) - 1, 0)
        drafted.verified = ""
        return new

    def _ahead(self, request: Request, chosen: Mapping[Key, _Choice]) -> int:
        drafted = chosen[request.key].length if request.key in chosen else 0
        left = min(request.tokens_left, self._max_model_len - len(request.token_ids))
        return min(drafted + self._depth, left)

    def _limit(self, request: Request) -> int:
        """The step's own token comes on top of the draft."""
        left = request.offer.sampling.max_tokens - request.generated
        return min(MAX_DRAFT_TOKENS, left - 1, self._max_model_len - len(request.token_ids) - 1)
