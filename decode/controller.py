"""How long each request's draft is in the next step: as long as makes the most tokens a second, which may be zero.

A step with R requests and n drafted tokens has R + n rows and makes R tokens and as many as stand of the drafted ones.
Each further token of a draft is less likely to stand than the one before it, so the best n tokens of all drafts are a
prefix of each: it suffices to sort all tokens by their chance and to try every n.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from headrace.decode.drafter import Draft
from headrace.decode.step_cost import MAX_ROWS
from headrace.engine.draft_head import MAX_HEAD_DEPTH

GAIN = 1.05
"""By how much drafts must be expected to be faster: the estimates are no better than that."""
MIN_CHANCE = 0.02
"""Tokens that are less likely to stand are not considered."""
DEPTHS = 32
"""Greater depths share the last one's estimate."""
PRIOR, PRIOR_WEIGHT = 0.5, 2.0
"""What is believed at the start, worth so many observations."""
OTHERS_WEIGHT = 4.0
"""What other requests have shown counts as so many observations of a new one."""
MEMORY, REQUEST_MEMORY = 0.998, 0.94
"""What an observation still counts after the next one of its depth: some 500 last in all, some 16 of one request."""

HEAD_STRIDE = 0.02
"""A draft moves what a head is taken to cost by this share of it at most."""


class RequestAcceptance:
    """How often drafted tokens of one request stood, by depth, where all before them did."""

    def __init__(self) -> None:
        self.stood = [0.0] * DEPTHS
        self.seen = [0.0] * DEPTHS


class Acceptance:
    """The same for all requests of one drafter together, on which each request's estimates lean."""

    def __init__(self) -> None:
        self._stood = [PRIOR * PRIOR_WEIGHT] * DEPTHS
        self._seen = [PRIOR_WEIGHT] * DEPTHS
        self._rates = [PRIOR] * DEPTHS

    def observe(self, request: RequestAcceptance, draft: Draft, token_ids: Sequence[int]) -> None:
        """Learn from the tokens that came where `draft` was guessed, whether it was verified or they came anyway."""
        for guessed, came, depth in zip(draft.token_ids, token_ids, draft.depths, strict=False):
            self.observe_one(request, min(depth, DEPTHS - 1), guessed == came)
            if guessed != came:
                return

    def observe_one(self, request: RequestAcceptance, depth: int, was_right: bool) -> None:
        """Learn from one token, before which all were right."""
        stood = 1.0 if was_right else 0.0
        request.stood[depth] = request.stood[depth] * REQUEST_MEMORY + stood
        request.seen[depth] = request.seen[depth] * REQUEST_MEMORY + 1.0
        self._stood[depth] = self._stood[depth] * MEMORY + stood
        self._seen[depth] = self._seen[depth] * MEMORY + 1.0
        self._rates[depth] = self._stood[depth] / self._seen[depth]

    def chances(self, request: RequestAcceptance, draft: Draft) -> list[float]:
        """For each token of a draft: how likely it stands with all before it. Ends where that is hardly ever."""
        found, chance = [], 1.0
        rates, stood, seen = self._rates, request.stood, request.seen
        for depth in draft.depths:  # spelled out: this runs for each drafted token before each step
            at = depth if depth < DEPTHS else DEPTHS - 1
            chance *= (OTHERS_WEIGHT * rates[at] + stood[at]) / (OTHERS_WEIGHT + seen[at])
            if chance < MIN_CHANCE:
                break
            found.append(chance)
        return found


def best_lengths(
    chances: Sequence[Sequence[float]],
    num_requests: int,
    seconds_of: Sequence[float],
    rate: float,
    drafting: Sequence[float] = (),
) -> tuple[list[int], float]:
    """How many tokens of each draft to verify, for the most expected tokens a second, and how many these are.

    `chances[d][i]`: how likely tokens 0 to i of draft d all stand, not rising in i. `num_requests`: rows that the step
    has anyway. `seconds_of`: such steps', by rows; `drafting[n]`: what it takes to draft n tokens of each request.
    `rate`: tokens a second without: zeros and this are returned where drafts are not expected to beat it.
    """
    if len(chances) == 1:  # spelled out: these lines run before each step of a request alone
        tokens, owners = chances[0], None
    else:
        ranked = sorted([(chance, d) for d, along in enumerate(chances) for chance in along], reverse=True)
        tokens, owners = [chance for chance, _ in ranked], [d for _, d in ranked]
    rows = seconds_of[num_requests + 1 : min(num_requests + len(tokens), MAX_ROWS) + 1]
    if drafting:
        rows = [seconds + drafting[deepest] for seconds, deepest in zip(rows, _depths(tokens, owners), strict=False)]
    best, best_rate = 0, GAIN * rate
    expected = float(num_requests)
    for count, (chance, seconds) in enumerate(zip(tokens, rows, strict=False), 1):
        expected += chance
        if expected > best_rate * seconds:
            best, best_rate = count, expected / seconds
    if best == 0:
        return [0] * len(chances), rate
    if owners is None:
        return [best], best_rate
    lengths = [0] * len(chances)
    for draft in owners[:best]:
        lengths[draft] += 1
    return lengths, best_rate


def _depths(tokens: Sequence[float], owners: Sequence[int] | None) -> Iterable[int]:
    """With so many of the tokens: how long the longest draft is. `owners` names each token's draft."""
    if owners is None:
        return range(1, len(tokens) + 1)
    lengths: Counter[int] = Counter()
    depths, deepest = [], 0
    for draft in owners:
        lengths[draft] += 1
        deepest = max(deepest, lengths[draft])
        depths.append(deepest)
    return depths


class HeadCost:
    """What a head takes for drafts of so many requests: as long for each token, and once as long as for some more, to
    read what the last step has settled.
    """

    def __init__(self, measured: Mapping[int, float], most: int = MAX_ROWS) -> None:
        """`measured`: seconds by requests. Beyond them, a request costs what the last ones did, up to `most`, more than
        which it guesses nothing for.
        """
        rows = sorted(measured)
        at = np.arange(MAX_ROWS + 1)
        seconds = [measured[row] for row in rows]
        each = seconds[-1] / rows[-1]
        of_token: list[float] = np.interp(at, rows, seconds).tolist()
        of_token[rows[-1] :] = [seconds[-1] + each * beyond for beyond in range(MAX_ROWS + 1 - rows[-1])]
        of_token[most + 1 :] = [math.inf] * (MAX_ROWS - most)
        self._of_token = of_token
        self._more = 0.0
        """Tokens that would take as long as what comes on top of a draft's own."""

    def of(self, num_requests: int, lengths: Sequence[float] = range(1, MAX_HEAD_DEPTH + 1)) -> list[float]:
        """Seconds of drafts of so many tokens of each of so many requests, and first of none."""
        each = self._of_token[min(num_requests, MAX_ROWS)]
        return [0.0, *[each * (length + self._more) for length in lengths]]

    def observe(self, num_requests: int, length: int, seconds: float) -> None:
        """Drafts of which the longest has so many tokens took so long: more where others have the cores, too. So what
        was measured is the least that they are taken to cost.
        """
        taken = seconds / self._of_token[min(num_requests, MAX_ROWS)]
        most = HEAD_STRIDE * (length + self._more)
        self._more = max(self._more + min(max(taken - length - self._more, -most), most), 0.0)
