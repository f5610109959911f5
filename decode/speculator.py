"""Speculative decoding of one worker: asks the drafters, lets the controller cut the drafts, learns from what came.

A `Drafter` guesses here, before a step. A head guesses on the engine's thread, at the end of the step before, to the
depth that is chosen here. Of a request's guesses the one that promises more tokens counts. Where steps run ahead, as on
a GPU, each is first asked whether the next one should wait for its tokens (`waits`). There the head guesses within a
step, the next one verifies that before anybody has seen it (`propose_ahead`), and what was guessed is heard of when it
has been verified.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from headrace.decode.chain import ChainDrafter
from headrace.decode.controller import (
    Acceptance,
    HeadCost,
    RequestAcceptance,
    best_lengths,
    choose_lengths,
)
from headrace.decode.drafter import MAX_DRAFT_TOKENS, Draft, Drafter
from headrace.decode.guess_tree import GuessTrees, as_draft
from headrace.decode.head import HeadDrafter
from headrace.decode.sequence import Key
from headrace.decode.sequence import Sequence as Request
from headrace.decode.step_cost import MAX_ROWS, Kind, StepCost
from headrace.engine.decode_batch import DecodeBatch, RunningBatch
from headrace.engine.draft_head import MAX_HEAD_DEPTH
from headrace.kernels.draft_tree import chain

DEEPEST = Draft([-1] * MAX_HEAD_DEPTH, range(MAX_HEAD_DEPTH))
"""As far as a head is ever asked to guess."""
BY_PLACE = "by place"
"""Beside the drafters' names: how often a head's guesses were right by their place alone. A token that it did not come
to, as it was in doubt, counts as wrong."""
DEPTH_STEPS = 8
"""How far a head guesses is chosen anew after so many steps, and when requests join or leave."""
HEAD = HeadDrafter.name
TRY_AGAIN_STEPS = 32
"""After so many steps without one, a head guesses a token, to see whether it has become good."""
TRYING_SHARE = 0.005
"""Of the time, which that may take at most: where a guess takes longer than a sixth of a step it comes less often."""
FOLLOWED_STEPS, LOOK_AGAIN_STEPS = 2, 4
"""Only one in so many steps asks how far a head on the device is to guess; while it does not pay, from when all that it
has guessed is known."""
MAX_STEPS_AHEAD = 15
"""At most so many steps start without a look whether drafts would pay."""
REQUESTS_A_STEP_BESIDE_HEAD = 8
"""The same where a head drafts meanwhile, for each so many requests: a lookup must show more, each look is evidence of
it, and what it takes the host depends on the requests."""


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
        """`head` comes with its cost; a cost alone is that of a head that guesses on the device within a step."""
        self.counters = Counters()
        self._drafter = drafter
        self._cost = cost
        self.ahead: dict[Key, int] = {}
        """Tokens behind each request's newest that the head may read after the next step."""
        self._head = head
        self._head_cost = head_cost
        self._num_requests = 0
        self._max_model_len = max_model_len
        self._on_device = head is None and head_cost is not None
        self._of_chain = head.name if head is not None else HEAD
        """The name of what guesses one token after the other."""
        self._names = [drafter.name, *([self._of_chain] if head_cost is not None else [])]
        self._acceptance = {name: Acceptance() for name in [*self._names, BY_PLACE]}
        self._trees = GuessTrees()
        self._drafted: dict[Key, _Drafted] = {}
        self._depth = 0
        """Tokens that the head is to guess at the end of the next step. On the device: of the step that was proposed
        for last.
        """
        self._tree: list[int] = []
        """Each request's of the device's guesses, as chosen last."""
        self._steps_to_choice = self._chosen_for = 0
        self._rate_ahead = 0.0
        """Tokens a second that steps with a device's guesses are expected to make, which run ahead."""
        self._verified: dict[Key, dict[int, int]] = {}
        """Of the device's guesses, by the step collected last."""
        self._guessed_depth = 0
        """What it was asked for at the end of the last one."""
        self._paying_depth = 0
        """How far it pays to guess with `_depth_of` requests, for `_depth_lasts` more steps."""
        self._depth_of = self._depth_lasts = 0
        self._steps_without_head = 0
        self._trying_seconds = 0.0
        """Seconds of tries that are not made up for yet."""
        self._of_head: dict[Key, Draft] = {}
        """What it guessed at the end of the last one."""
        self._drafting = 0.0
        """Seconds that drafts with a price, proposed last, are expected to have taken."""
        self._steps_ahead = 0
        self._steps_left = 0

    def propose(self, requests: Sequence[Request]) -> dict[Key, list[int]]:
        """Drafts that are worth verifying in the next step, which has these requests."""
        costs, guessed = self._drafter.costs(len(requests)), self._depth
        ahead = self.propose_ahead(requests) if self._on_device else {}
        chosen = self._choose(requests, costs, guessed if self._on_device else 0)
        self._found(bool(chosen))
        self._drafting = 0.0
        if self._on_device:
            if not chosen:
                return ahead
        else:
            self._depth = self._next_depth()
            self.ahead = {request.key: self._ahead(request, chosen) for request in requests} if self._depth > 0 else {}
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

    def propose_ahead(self, requests: Sequence[Request]) -> dict[Key, list[int]]:
        """The same for a step that runs ahead: what a head on the device has guessed, which nobody has seen yet."""
        if not self._on_device:
            return {}
        if self._steps_without_head > FOLLOWED_STEPS and self._steps_without_head % LOOK_AGAIN_STEPS:
            self._steps_without_head += 1
            return {}
        started = time.perf_counter()
        self._follow_all(requests)
        guessed, drafts = self._depth, dict[Key, list[int]]()
        self._steps_to_choice -= 1
        if requests and (self._steps_to_choice <= 0 or len(requests) != self._chosen_for):
            self._choose_tree(len(requests))
        draft = as_draft(self._tree, guessed) if self._tree else chain(guessed)
        for request in requests if draft else ():
            limit = self._limit(request, request.longest)
            if limit > 0:
                drafts[request.key] = draft[:limit]
        self.counters.controlling_seconds += time.perf_counter() - started
        return drafts

    @property
    def depth_on_device(self) -> int:
        """How many tokens a head on the device is to guess in the step that was proposed for last."""
        return self._depth if self._on_device else 0

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
        chosen = self._choose(requests, self._drafter.costs(len(requests)))
        if not chosen:
            self._found(False)
        return bool(chosen)

    def _found(self, drafts: bool) -> None:
        most = self._num_requests // REQUESTS_A_STEP_BESIDE_HEAD if self._on_device else MAX_STEPS_AHEAD
        self._steps_ahead = 0 if drafts else min(2 * self._steps_ahead + 1, most)
        self._steps_left = self._steps_ahead

    def _choose(
        self, requests: Sequence[Request], costs: Sequence[float] | None, guessed: int | None = None
    ) -> dict[Key, _Choice]:
        """Those drafts that pay. Where they have a price their tokens are not known yet.

        `guessed`: how many tokens a head on the device has guessed; None: requests have tokens on their way.
        """
        started = time.perf_counter()
        self._follow_all(requests)
        if not requests:
            return {}
        # of drafts in flight one is taken to stand, so that a lookup is not held for worse than it is
        unknown = {r.key: 1 + min(r.drafts_in_flight, 1) if guessed is None else 0 for r in requests}
        limits = {request.key: self._limit(request, len(request.token_ids)) for request in requests}
        if costs is None:
            guesses = {self._drafter.name: self._drafter.draft(limits)}
            if guessed:
                depths = {key: min(limit, guessed) for key, limit in limits.items() if limit > 0}
                guesses[HEAD] = {key: Draft(chain(n), range(n)) for key, n in depths.items()}
            if self._head is not None:
                guesses[self._of_chain] = self._guesses_of_head(limits)
        else:
            longest, unknown = len(costs) - 1, dict.fromkeys(unknown, 0)
            placeholders = {key: min(limit, longest) for key, limit in limits.items() if limit > 0}
            guesses = {self._drafter.name: {key: Draft([-1] * n, range(n)) for key, n in placeholders.items()}}
        found = time.perf_counter()
        best: dict[Key, tuple[float, str, Draft, list[float]]] = {}
        for name, of_drafter in guesses.items():
            acceptance = self._acceptance[name]
            for key, guess in of_drafter.items():
                drafted = self._drafted[key]
                if costs is None and not (self._on_device and name == HEAD):
                    drafted.guesses[name] = guess
                if self._on_device and name == HEAD:
                    chances = self._trees.chain(len(guess.token_ids))
                else:
                    chances = acceptance.chances(drafted.acceptance[name], guess)[unknown[key] :]
                promised = sum(chances)
                if key not in best or promised > best[key][0]:
                    best[key] = (promised, name, guess, chances)
        along = [chances for _, _, _, chances in best.values()]
        rate = len(requests) / self._cost.plain[len(requests)]
        if self._on_device:
            rate, costs = max(rate, self._rate_ahead), [self._price(len(requests))] * (MAX_DRAFT_TOKENS + 1)
        lengths = best_lengths(along, len(requests), self._cost.verifying, rate, costs or ())[0] if along else []
        if costs is not None and not self._on_device and not any(lengths):
            self._fade(best)
        self.counters.drafting_seconds += found - started
        self.counters.controlling_seconds += time.perf_counter() - found
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
        elif self._on_device:
            self._verified = batch.verified

    def ran(self, drafts: Mapping[Key, Sequence[int]], seconds: float) -> None:
        """The step that drafts were proposed for took so long, the head's guesses included; `drafts` are what it
        verified.
        """
        counters, drafted = self.counters, sum(map(len, drafts.values()))
        known = {key: draft for key, draft in drafts.items() if draft[0] >= 0}
        kind: Kind = "verifying" if known else "ahead" if self.depth_on_device or drafts else "plain"
        price = self._drafting
        if self._head is not None:
            seconds -= self._head.seconds
            counters.head_seconds += self._head.seconds
            tried = self._head.seconds if self._guessed_depth > self._paying_depth else 0.0
            self._trying_seconds = max(self._trying_seconds - TRYING_SHARE * seconds, 0.0) + tried
            if self._head_cost is not None and self._guessed_depth > 0 and self._num_requests > 0:
                self._head_cost.observe(self._num_requests, self._guessed_depth, self._head.seconds)
        elif self._on_device:
            price = self._price(self._num_requests)
            counters.head_seconds += price
        if self._num_requests > 0:
            started = time.perf_counter()
            self._cost.observe(self._num_requests + drafted, max(seconds - price, 0.0), kind)
            counters.controlling_seconds += time.perf_counter() - started
        counters.steps += 1
        for key, draft in known.items():
            request = self._drafted[key]
            request.verified = request.proposed
            of_drafter = counters.of[request.verified]
            of_drafter.drafts += 1
            of_drafter.drafted += len(draft)
        if drafts:
            counters.verification_seconds += seconds
        else:
            counters.steps_without_drafts += 1

    def _price(self, num_requests: int) -> float:
        """What a head on the device takes to guess as far as it is to."""
        return self._head_cost.of(num_requests)[self._depth] if self._head_cost is not None else 0.0

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
        requests = self._num_requests
        if self._head is None or self._head_cost is None or not requests:
            return 0
        if self._depth_lasts == 0 or requests != self._depth_of:
            started = time.perf_counter()
            by_place = self._acceptance[BY_PLACE]
            along = [by_place.chances(drafted.acceptance[BY_PLACE], DEEPEST) for drafted in self._drafted.values()]
            self._paying_depth = max(choose_lengths(along, requests, self._cost, self._head_cost.of(requests)))
            self._depth_lasts, self._depth_of = DEPTH_STEPS, requests
            self.counters.controlling_seconds += time.perf_counter() - started
        self._depth_lasts -= 1
        return self._tried(self._paying_depth, TRY_AGAIN_STEPS)

    def _choose_tree(self, requests: int) -> None:
        """The same for a head on the device, with what of its guesses is to be verified."""
        assert self._head_cost is not None
        self._tree, depth, self._rate_ahead = self._trees.choose(
            requests,
            self._cost.ahead[: MAX_ROWS + 1],
            requests / self._cost.plain[requests],
            self._head_cost.of(requests),
            drafts=bool(self._tree),
        )
        self._depth = self._tried(depth, 2 * TRY_AGAIN_STEPS)
        self._steps_to_choice = LOOK_AGAIN_STEPS if self._tree else 0
        self._chosen_for = requests

    def _tried(self, depth: int, steps: int) -> int:
        """This, or after so many steps without any guess one."""
        self._steps_without_head = 0 if depth > 0 else self._steps_without_head + 1
        if self._steps_without_head >= steps and self._trying_seconds <= 0.0:
            self._steps_without_head = 0
            return 1
        return depth

    def _follow_all(self, requests: Sequence[Request]) -> None:
        self._forget_all_but({request.key for request in requests})
        for request in requests:
            self._follow(request)
        self._num_requests = len(requests)

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
        verified = self._verified.pop(drafted.request.key, None)
        if verified and new:
            self._trees.learn(verified, new)
            of_head = self.counters.of[HEAD]
            of_head.drafts += 1
            of_head.drafted += len(verified)
            of_head.accepted += len(new) - 1
        if new:
            for name, guessed in drafted.guesses.items():
                self._acceptance[name].observe(drafted.acceptance[name], guessed, new)
            drafted.guesses = {}
        if drafted.verified:
            self.counters.of[drafted.verified].accepted += max(len(new) - 1, 0)
        drafted.verified = ""
        return new

    def _ahead(self, request: Request, chosen: Mapping[Key, _Choice]) -> int:
        drafted = chosen[request.key].length if request.key in chosen else 0
        left = min(request.tokens_left, self._max_model_len - len(request.token_ids))
        return min(drafted + self._depth, left)

    def _limit(self, request: Request, length: int) -> int:
        """Of a draft behind so many tokens; the step's own token comes on top of it."""
        left = request.tokens_left - (length - len(request.token_ids))
        return min(MAX_DRAFT_TOKENS, left - 1, self._max_model_len - length - 1)
