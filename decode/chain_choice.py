"""How far what drafts token after token is to guess, in the two places where it does.

A `ThreadChain` guesses on the engine's thread, at the end of a step, to the depth that was chosen before it; of what it
has guessed, the next step verifies what is worth it. A `DeviceHead` guesses within a step, and the next one verifies
that before anybody has seen it: what was guessed is heard of when it has been verified.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Mapping, Sequence

from headrace.decode.chain import ChainDrafter
from headrace.decode.controller import HeadCost, best_lengths
from headrace.decode.draft_counters import DrafterCounters
from headrace.decode.drafter import Draft
from headrace.decode.guess_tree import GuessTrees, as_draft
from headrace.decode.head import HeadDrafter
from headrace.decode.sequence import Key
from headrace.decode.step_cost import MAX_ROWS, StepCost
from headrace.engine.decode_batch import DecodeBatch, Verified
from headrace.engine.draft_head import MAX_HEAD_DEPTH
from headrace.kernels.draft_tree import chain

DEEPEST = Draft([-1] * MAX_HEAD_DEPTH, range(MAX_HEAD_DEPTH))
"""As far as is ever guessed."""
DEPTH_STEPS = 16
"""On a thread it is chosen anew after so many steps, and when requests join or leave."""
TRY_AGAIN_STEPS = 32
"""After so many steps without one, a token is guessed, to see whether guesses have become good."""
TRYING_SHARE = 0.0025
"""Of the time, which that may take at most: where it takes longer it comes less often."""
REST_STEPS, MOST_REST_STEPS = 64, 4096
"""While a head on the device does not pay, nobody asks for so many steps, and then a token is guessed; the next rest is
twice as long, until guesses have gained again."""
LOST, GAINED = 4.0, 12.0
"""In steps without it: what it may lose before it rests, whatever is believed, and what of its gains counts."""
MOST_OF_A_STEP = 2.0
"""So much a step loses at most: beyond that, something else took the time."""
NEARLY_RIGHT = [0.9 ** (place + 1) for place in range(MAX_HEAD_DEPTH)]
"""Chances by place, better than any head's: where these would not pay nothing is tried."""
GOES_ON, GOES_ON_STRIDE = 0.5, 0.02
"""How often a draft that may get longer is taken to do so at first, and what a draft shows of it."""
FOLLOWED_STEPS, LOOK_AGAIN_STEPS = 2, 8
"""From when all that it has guessed is known it may rest; while it pays one in so many steps asks how far to guess."""


class ThreadChain:
    """What a `ChainDrafter` guesses."""

    def __init__(self, drafter: ChainDrafter, cost: HeadCost) -> None:
        self.name = drafter.name
        self.depth = 0
        """Tokens to guess at the end of the next step."""
        self._drafter = drafter
        self._cost = cost
        self._guessed: dict[Key, Draft] = {}
        """At the end of the last step."""
        self._guessed_depth = self._longest = 0
        """What was asked for then, and what the longest of them came to."""
        self._goes_on = [GOES_ON] * (MAX_HEAD_DEPTH - 1)
        """By place: how often the longest draft that may go on behind it does, as it is not in doubt."""
        self._paying_depth = 0
        """How far it pays to guess with `_depth_of` requests, for `_depth_lasts` more steps."""
        self._depth_of = self._depth_lasts = 0
        self._may_pay = True
        """Whether it would if nearly all guesses were right."""
        self._steps_without = 0
        self._trying_seconds = 0.0
        """Seconds of tries that are not made up for yet."""

    def look(self, batch: DecodeBatch[Key]) -> None:
        """Guess, on the engine's thread, right after a step."""
        self._guessed = self._drafter.draft(batch, self.depth)
        self._guessed_depth = self.depth
        self._longest = max((len(guess.token_ids) for guess in self._guessed.values()), default=0)
        for place in range(min(self._longest, self.depth - 1)):
            went_on = 1.0 if place + 1 < self._longest else 0.0
            self._goes_on[place] += (went_on - self._goes_on[place]) * GOES_ON_STRIDE

    def taken(self, limits: Mapping[Key, int]) -> dict[Key, tuple[Draft, Draft]]:
        """What was guessed, cut to these limits, and the same by place alone, as deep as it was asked for: a token that
        it did not come to, as it was in doubt, counts as wrong.
        """
        found = {}
        for key, guess in self._guessed.items():
            if limits.get(key, 0) > 0:
                padded = [*guess.token_ids, *DEEPEST.token_ids][: max(self._guessed_depth, len(guess.token_ids))]
                cut = Draft(guess.token_ids[: limits[key]], guess.depths)
                found[key] = cut, Draft(padded, DEEPEST.depths)
        self._guessed = {}
        return found

    def choose_depth(self, requests: int, cost: StepCost, chances: Callable[[], list[list[float]]]) -> None:
        """Choose `depth`, how far to guess at the end of the next step. What is guessed is cut to what pays once it is
        known, so this asks as if `chances`, by place, were all that will be known.
        """
        if self._depth_lasts == 0 or requests != self._depth_of:
            expected = self._expected(requests, cost)
            self._paying_depth = max(best_lengths(chances(), requests, *expected)[0])
            self._may_pay = (
                self._paying_depth > 0 or max(best_lengths([NEARLY_RIGHT] * requests, requests, *expected)[0]) > 0
            )
            self._depth_lasts, self._depth_of = DEPTH_STEPS, requests
        self._depth_lasts -= 1
        self.depth = self._paying_depth
        self._steps_without = 0 if self.depth > 0 else self._steps_without + 1
        if self._steps_without >= TRY_AGAIN_STEPS and self._trying_seconds <= 0.0 and self._may_pay:
            self.depth, self._steps_without = 1, 0

    def rest(self) -> None:
        """The next step has nothing of it, and nobody asks."""
        self.depth = 0
        self._steps_without += 1

    def _expected(self, requests: int, cost: StepCost) -> tuple[list[float], float, list[float]]:
        """What `best_lengths` is to know, where drafts that may have so many tokens are expected to have fewer."""
        lengths = [0.0, *itertools.accumulate(itertools.accumulate([1.0, *self._goes_on], operator.mul))]
        most = min(requests * MAX_HEAD_DEPTH, MAX_ROWS - requests)
        along = [_between(lengths, drafted / requests) for drafted in range(most + 1)]
        seconds = [_between(cost.verifying, requests * (1 + length)) for length in along]
        drafting = self._cost.of(requests, lengths[1:])
        return [0.0] * requests + seconds, requests / cost.plain[requests], drafting

    def ran(self, requests: int, seconds: float) -> float:
        """A step of so many requests, guesses included, took so long; returns what they took of that."""
        spent = self._drafter.seconds
        tried = spent if self._guessed_depth > self._paying_depth else 0.0
        self._trying_seconds = max(self._trying_seconds - TRYING_SHARE * (seconds - spent), 0.0) + tried
        if self._longest > 0 and requests > 0:
            self._cost.observe(requests, self._longest, spent)
        return spent


def _between(values: Sequence[float], at: float) -> float:
    """On the lines between values at 0, 1, and so on."""
    left = min(int(at), len(values) - 2)
    return values[left] + (values[left + 1] - values[left]) * (at - left)


class DeviceHead:
    """What a head on the device guesses, the same tree for all requests."""

    name = HeadDrafter.name

    def __init__(self, cost: HeadCost) -> None:
        self.depth = 0
        """Places to guess in the step that was proposed for last."""
        self.rate = 0.0
        """Tokens a second that steps with its guesses are expected to make, which run ahead."""
        self.trees = GuessTrees()
        self.verified: Mapping[Key, Verified] = {}
        """Of its guesses, by the step collected last, and not learned from yet."""
        self._cost = cost
        self._tree: Sequence[int] = []
        """Each request's, as chosen last."""
        self._tree_depth = 0
        self._steps_to_choice = self._chosen_for = 0
        self._steps_without = 0
        self._rest_for = REST_STEPS
        self._gained = 0.0
        """Since there has been a tree, by what was measured: so many steps without it."""

    def rests(self, requests: int) -> bool:
        """Whether it does not pay and the next step, of so many requests, need not ask."""
        if not self.can_guess_for(requests):
            self.depth, self.rate, self._tree, self._chosen_for = 0, 0.0, [], requests
            return True
        rests = FOLLOWED_STEPS < self._steps_without < self._rest_for and requests == self._chosen_for
        self._steps_without += rests
        return rests

    def pause(self) -> None:
        """The next step has nothing of it."""
        self.depth = self._steps_to_choice = 0

    def can_guess_for(self, requests: int) -> bool:
        """Whether it guesses for so many at all."""
        return self._cost.of(requests)[1] < math.inf

    def choose(self, requests: int, cost: StepCost) -> list[int]:
        """What the next step is to verify of what the one before it has guessed for each request. Chooses `depth`."""
        guessed = self.depth
        self._steps_to_choice -= 1
        if requests and (self._steps_to_choice <= 0 or requests != self._chosen_for):
            plain = requests / cost.plain[requests]
            ahead, drafting = cost.ahead[: MAX_ROWS + 1], self._cost.of(requests)
            kept, had_one = (self._tree, self._tree_depth), bool(self._tree)
            self._tree, self.depth, self.rate = self.trees.choose(requests, ahead, plain, drafting, kept)
            self._tree_depth = self.depth
            self._steps_without = 0 if self.depth > 0 else self._steps_without + 1
            if not had_one:
                self._gained = 0.0
            if self._steps_without >= self._rest_for:
                self.depth, self._steps_without = 1, 0
                self._rest_for = min(2 * self._rest_for, MOST_REST_STEPS)
            self._steps_to_choice = LOOK_AGAIN_STEPS if self._tree else 0
            self._chosen_for = requests
        return as_draft(self._tree, guessed) if self._tree else chain(guessed)

    def ran(self, requests: int, seconds: float, plain: float) -> None:
        """The step collected last, of so many requests, took so long, and takes `plain` seconds without it."""
        if not self._tree:
            return
        made = 1.0 + sum([len(verified.came) - 1 for verified in self.verified.values()]) / requests
        self._gained = min(self._gained + max(made - seconds / plain, -MOST_OF_A_STEP), GAINED)
        if self._gained >= GAINED:
            self._rest_for = REST_STEPS
        elif self._gained < -LOST:
            self._tree, self._steps_without = [], FOLLOWED_STEPS + 1
            self._rest_for = min(2 * self._rest_for, MOST_REST_STEPS)
            self.pause()

    def price(self, requests: int) -> float:
        """Seconds that it takes to guess as far as it is to."""
        return self._cost.of(requests)[self.depth]

    def learn(self, counters: DrafterCounters) -> None:
        """From what the step collected last has verified."""
        for verified in self.verified.values():
            self.trees.learn(verified)
            counters.drafts += 1
            counters.drafted += len(verified.draft)
            counters.accepted += len(verified.came) - 1
        self.verified = {}
