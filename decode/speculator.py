"""Speculative decoding of one worker: asks the drafters, lets the controller cut the drafts, learns from what came.

A `Drafter` guesses here, before a step; what drafts token after token does in a place of its own (`chain_choice.py`).
Of a request's guesses the one that promises more tokens counts. Where steps run ahead, as on a GPU, each is first asked
whether the next one should wait for its tokens (`waits`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from headrace.decode.balance import Balance, Looks
from headrace.decode.chain_choice import DEEPEST, DeviceHead, ThreadChain
from headrace.decode.controller import Acceptance, RequestAcceptance, best_lengths
from headrace.decode.draft_counters import Counters
from headrace.decode.drafter import MAX_DRAFT_TOKENS, Draft, Drafter
from headrace.decode.sequence import Key
from headrace.decode.sequence import Sequence as Request
from headrace.decode.step_cost import Kind, PlainSteps, StepCost
from headrace.engine.decode_batch import DecodeBatch, RunningBatch
from headrace.kernels.draft_tree import chain

BY_PLACE = "by place"
"""Beside the drafters' names: how often a `ThreadChain`'s guesses were right by their place alone."""
REFILL_STRIDE = 0.1
"""What one time shows of the next ones."""
WEIGHED_STEPS = 16
"""At most so many steps are weighed together."""


@dataclass
class _Drafted:
    """A request of the batch as the drafters know it. By drafter's name: `acceptance` and `guesses`."""

    request: Request
    length: int
    """Tokens that the drafters know."""
    acceptance: dict[str, RequestAcceptance]
    guesses: dict[str, Draft] = field(default_factory=dict)
    """Of the tokens that come next, of whatever length was verified."""
    proposed: str = ""
    """Whose draft was proposed last."""

    @property
    def accepted(self) -> int:
        """Right after a step that verified a draft: how much of it stood."""
        return max(len(self.request.token_ids) - self.length - 1, 0)


class _Choice(NamedTuple):
    """The best guess for a request, and how much of it is worth verifying."""

    drafter: str
    guess: Draft
    length: int


class Speculator:
    """Proposes drafts before each step. Not thread-safe: it belongs on the scheduler's thread, but for `look`."""

    def __init__(
        self, drafter: Drafter, cost: StepCost, max_model_len: int, chain: ThreadChain | DeviceHead | None = None
    ) -> None:
        """`chain`: what drafts token after token, if something does."""
        self.counters = Counters()
        self.ahead: dict[Key, int] = {}
        """Tokens behind each request's newest that a `ThreadChain` may read after the next step."""
        self._drafter = drafter
        self._cost = cost
        self._max_model_len = max_model_len
        self._thread = chain if isinstance(chain, ThreadChain) else None
        self._device = chain if isinstance(chain, DeviceHead) else None
        self._names = [drafter.name, *([chain.name] if chain is not None else [])]
        self._acceptance = {name: Acceptance() for name in [*self._names, BY_PLACE]}
        self._drafted: dict[Key, _Drafted] = {}
        self._refill = 0.0
        """Seconds that the device waits for the host behind steps whose drafts the host knows."""
        self._num_requests = 0
        """Of the step that was proposed for last."""
        self._balance = Balance()
        self._weighed = 0.0
        """Seconds of drafting and controlling that the balance knows of."""
        self._guessing = 0.0
        """Of what was guessed at the end of the last step: to be weighed with what the next one makes of it."""
        self._unweighed: list[tuple[int, int, int, float]] = []
        """Of each step since then: requests, tokens verified, those that stood, seconds of guessing at its end."""
        self._weighed_together = 0
        """How many may be."""
        self._plain_steps = PlainSteps(in_a_row=1 if self._device is None else 2)  # ahead, two in a row are measured
        self._looks = Looks(beside_head=self._device is not None)
        self._kind_before: Kind = "plain"

    def propose(self, requests: Sequence[Request]) -> dict[Key, list[int]]:
        """Drafts that are worth verifying in the next step, which has these requests."""
        self._num_requests = len(requests)
        if requests and self._rests():
            self.ahead = {}
            if self._thread is not None:
                self._thread.rest()
            return {}
        started, guessed = time.perf_counter(), self.depth_on_device
        is_plain = self._plain_steps.begin()
        rests = self._device_rests(requests, is_plain)
        draft, chosen = list[int](), dict[Key, _Choice]()
        if not self._too_many(len(requests)):
            self._follow_all(requests)
            draft = [] if rests else self._choose_on_device(len(requests))
            chosen = self._choose(requests, guessed)
        if is_plain:
            chosen = {}
        else:
            took = time.perf_counter() - started
            self._looks.found(bool(chosen), len(requests), took, self._cost.plain[len(requests)])
        if self._thread is not None:
            if self._balance.pauses:
                self._thread.rest()
            depth = self._thread.depth
            self.ahead = {r.key: self._ahead(r, chosen, depth) for r in requests} if depth > 0 else {}
        for key, choice in chosen.items():
            self._drafted[key].proposed = choice.drafter
        if draft and not chosen:
            return self._drafts_on_device(requests, draft)
        return {key: choice.guess.token_ids[: choice.length] for key, choice in chosen.items()}

    def _rests(self) -> bool:
        """Whether nobody looks for drafts before the next step."""
        if self._device is not None:  # it costs the host hardly anything, and knows by itself when to rest
            return False
        if self._thread is not None and self._thread.depth > 0:  # what was guessed is to show what it is worth
            return False
        if self._balance.pauses:
            return True
        return self._looks.skips()

    def propose_ahead(self, requests: Sequence[Request]) -> dict[Key, list[int]]:
        """The same for a step that runs ahead: what a head on the device has guessed, which nobody has seen yet."""
        self._num_requests = len(requests)
        if self._device_rests(requests, self._plain_steps.begin()):
            return {}
        return self._drafts_on_device(requests, self._choose_on_device(len(requests)))

    def _device_rests(self, requests: Sequence[Request], is_plain: bool) -> bool:
        """Whether the next step need not ask a head on the device, if there is one."""
        if self._device is None:
            return True
        self._device.learn(self.counters.of[self._device.name])
        if is_plain:
            self._device.pause()
        return is_plain or self._device.rests(len(requests))

    def _choose_on_device(self, requests: int) -> list[int]:
        assert self._device is not None
        started = time.perf_counter()
        draft = self._device.choose(requests, self._cost)
        self.counters.controlling_seconds += time.perf_counter() - started
        return draft

    def _drafts_on_device(self, requests: Sequence[Request], draft: list[int]) -> dict[Key, list[int]]:
        """Each request's, in which there is room for so much of it."""
        drafts = dict[Key, list[int]]()
        for request in requests if draft else ():
            limit = self._limit(request, request.longest, request.in_flight)
            if limit > 0:
                drafts[request.key] = draft[:limit]
        return drafts

    @property
    def depth_on_device(self) -> int:
        """How many tokens a head on the device is to guess in the step that was proposed for last."""
        return self._device.depth if self._device is not None else 0

    def waits(self, requests: Sequence[Request]) -> bool:
        """While a step of these requests is in flight: whether the next one should wait for its tokens, for drafts that
        follow them are expected to pay.

        Guesses are made without those tokens, so the first one of each is of a token that is on its way. Where nothing
        was found, the next steps run ahead unasked: twice as many each time, up to a bound.
        """
        if self._device is not None:
            self._device.learn(self.counters.of[self._device.name])
        pauses = self._plain_steps.is_next or (self._device is None and self._balance.pauses)
        if pauses or self._too_many(len(requests)):
            return False
        if self._looks.skips():
            return False
        started = time.perf_counter()
        self._follow_all(requests)
        chosen = self._choose(requests)
        if not chosen:
            took = math.inf if self._device is None else time.perf_counter() - started
            self._looks.found(False, len(requests), took, self._cost.plain[len(requests)])
        return bool(chosen)

    def _too_many(self, requests: int) -> bool:
        """More than a head on the device guesses for: there the host takes longer for lookups than they save, too."""
        return self._device is not None and not self._device.can_guess_for(requests)

    def _choose(self, requests: Sequence[Request], guessed: int | None = None) -> dict[Key, _Choice]:
        """Those drafts that pay; a `ThreadChain` chooses its depth. `guessed`: how many tokens a head on the device
        has guessed; None: requests have tokens on their way.
        """
        if not requests:
            return {}
        started = time.perf_counter()
        device = self._device
        limits = {request.key: self._limit(request, len(request.token_ids)) for request in requests}
        guesses = {self._drafter.name: self._drafter.draft(limits)}
        if self._thread is not None:
            taken = self._thread.taken(limits)
            guesses[self._thread.name] = {key: cut for key, (cut, _) in taken.items()}
            for key, (_, padded) in taken.items():
                self._drafted[key].guesses[BY_PLACE] = padded
        found = time.perf_counter()
        best: dict[Key, tuple[float, str, Draft, list[float]]] = {}
        for name, of_drafter in guesses.items():
            acceptance = self._acceptance[name]
            for key, guess in of_drafter.items():
                drafted = self._drafted[key]
                drafted.guesses[name] = guess
                chances = acceptance.chances(drafted.acceptance[name], guess)
                if guessed is None:  # of drafts in flight one is taken to stand: a lookup is no worse than that
                    del chances[: 1 + min(drafted.request.drafts_in_flight, 1)]
                promised = sum(chances)
                if key not in best or promised > best[key][0]:
                    best[key] = promised, name, guess, chances
        rate = len(requests) / self._cost.plain[len(requests)]
        refill = self._refill if guessed is None else 0.0
        price: Sequence[float] = [refill] * (MAX_DRAFT_TOKENS + 1) if refill else ()
        if device is not None:
            if guessed and best:  # beside a lookup that stops all from running ahead
                self._add_unseen(device, guessed, limits, best)
            rate, price = max(rate, device.rate), [device.price(len(requests)) + refill] * (MAX_DRAFT_TOKENS + 1)
        along = [chances for _, _, _, chances in best.values()]
        lengths = best_lengths(along, len(requests), self._cost.verifying, rate, price)[0] if along else []
        if self._thread is not None:
            self._thread.choose_depth(len(requests), self._cost, self._chances_by_place)
        self.counters.drafting_seconds += found - started
        self.counters.controlling_seconds += time.perf_counter() - found
        choices = {
            key: _Choice(name, guess, length)
            for (key, (_, name, guess, _)), length in zip(best.items(), lengths, strict=True)
            if length > 0
        }
        if device is not None and all(choice.drafter == device.name for choice in choices.values()):
            return {}  # its trees say more than these chains
        return choices

    @staticmethod
    def _add_unseen(
        device: DeviceHead,
        guessed: int,
        limits: Mapping[Key, int],
        best: dict[Key, tuple[float, str, Draft, list[float]]],
    ) -> None:
        """What a head on the device has guessed, where it promises more."""
        chances = device.trees.chain(guessed)
        for key, limit in limits.items():
            length = min(limit, guessed)
            if length > 0 and (key not in best or sum(chances[:length]) > best[key][0]):
                best[key] = sum(chances[:length]), device.name, Draft(chain(length), range(length)), chances[:length]

    def look(self, batch: RunningBatch[Key]) -> None:
        """Right after a step, on the engine's thread: what drafts there does, and what the device's guesses came to is
        heard.
        """
        if self._thread is not None:
            assert isinstance(batch, DecodeBatch)
            self._thread.look(batch)
        elif self._device is not None:
            self._device.verified = batch.verified

    def ran(self, drafts: Mapping[Key, Sequence[int]], seconds: float) -> None:
        """The step that drafts were proposed for took so long, guesses included; `drafts` are what it verified."""
        counters, drafted, requests = self.counters, sum(map(len, drafts.values())), self._num_requests
        known = {key: draft for key, draft in drafts.items() if draft[0] >= 0}
        kind: Kind = "verifying" if known else "ahead" if self.depth_on_device or drafts else "plain"
        guessing, accepted = 0.0, 0
        if self._thread is not None:
            guessing = self._thread.ran(requests, seconds)
        elif self._device is not None:
            guessing = self._device.price(requests)
            if requests > 0 and kind != "verifying":
                self._device.ran(requests, seconds, self._cost.plain[requests])
        seconds = max(seconds - guessing, 0.0)
        counters.head_seconds += guessing
        counters.steps += 1
        for key, draft in known.items():
            request = self._drafted[key]
            of_drafter = counters.of[request.proposed]
            of_drafter.drafts += 1
            of_drafter.drafted += len(draft)
            of_drafter.accepted += request.accepted
            accepted += request.accepted
        if drafts:
            counters.verification_seconds += seconds
            self._plain_steps.drafted()
        else:
            counters.steps_without_drafts += 1
        if requests > 0:
            started = time.perf_counter()
            # a step that runs ahead was started while the one before it, of whatever kind, took this time
            if self._device is None or kind in ("verifying", self._kind_before):
                self._cost.observe(requests + drafted, seconds, kind)
            self._kind_before = kind
            if self._device is None:
                self._unweighed.append((requests, drafted, accepted, guessing if self.ahead else 0.0))
                if len(self._unweighed) >= self._weighed_together:
                    self._weigh()
            counters.controlling_seconds += time.perf_counter() - started

    def refilled(self, seconds: float) -> None:
        """So long took the start of a step while the device had nothing to do, as behind one that was waited for."""
        self._refill += (seconds - self._refill) * REFILL_STRIDE

    def _weigh(self) -> None:
        """Take steps into the balance. Costs are those believed, not what these took: other work on the machine says
        nothing of drafts.
        """
        counters, cost, step = self.counters, self._cost, self._cost.plain[self._num_requests]
        spent = counters.drafting_seconds + counters.controlling_seconds
        saved = min(self._weighed - spent, 0.0)
        for requests, drafted, accepted, guessing in self._unweighed:
            saved -= self._guessing
            if drafted:
                plain = cost.plain[requests]
                saved += plain - cost.verifying[requests + drafted] + accepted * plain / requests
            self._guessing = guessing
        self._balance.add(saved, step, len(self._unweighed))
        self._weighed, self._unweighed = spent, []
        self._weighed_together = min(self._balance.lasts(step), WEIGHED_STEPS)

    def stats(self) -> dict[str, float]:
        """The counters as metrics of a worker."""
        return self.counters.stats(self._names)

    def _chances_by_place(self) -> list[list[float]]:
        by_place = self._acceptance[BY_PLACE]
        return [by_place.chances(drafted.acceptance[BY_PLACE], DEEPEST) for drafted in self._drafted.values()]

    def _follow_all(self, requests: Sequence[Request]) -> None:
        started = time.perf_counter()
        stay = {request.key: request for request in requests}
        for key in [key for key, drafted in self._drafted.items() if stay.get(key) is not drafted.request]:
            self._learn(key, self._drafted.pop(key))
            self._drafter.leave(key)
        for request in requests:
            self._follow(request)
        self.counters.drafting_seconds += time.perf_counter() - started

    def _follow(self, request: Request) -> None:
        drafted = self._drafted.get(request.key)
        if drafted is None:
            self._drafter.join(request.key, request.token_ids)
            acceptance = {name: RequestAcceptance() for name in self._acceptance}
            self._drafted[request.key] = _Drafted(request, len(request.token_ids), acceptance)
            return
        new = self._learn(request.key, drafted)
        if new:
            self._drafter.extend(request.key, new)

    def _learn(self, key: Key, drafted: _Drafted) -> list[int]:
        """Compare what was guessed with what came; returns the new tokens."""
        new = drafted.request.token_ids[drafted.length :]
        if not new:
            return new
        drafted.length += len(new)
        for name, guessed in drafted.guesses.items():
            self._acceptance[name].observe(drafted.acceptance[name], guessed, new)
        drafted.guesses = {}
        return new

    def _ahead(self, request: Request, chosen: Mapping[Key, _Choice], depth: int) -> int:
        drafted = chosen[request.key].length if request.key in chosen else 0
        return min(drafted + depth, request.tokens_left)

    def _limit(self, request: Request, length: int, coming: int = 0) -> int:
        """Of a draft behind so many tokens; the step's own token comes on top of it. Of those tokens, `coming` are on
        their way in any case. Others may not stand, so what may be one too many is drafted all the same.
        """
        return min(MAX_DRAFT_TOKENS, request.tokens_left - coming - 1, self._max_model_len - length - 1)
