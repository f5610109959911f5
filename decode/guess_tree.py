"""Which of a head's guesses on the device are worth verifying: a chain of the likeliest, and leaves beside it.

Nobody has seen the guesses, so all that is known is how often those of a place and a choice stood, and all requests of
a batch get the same tree. A leaf makes one token where the chain ends before its place; it costs a row of the step, but
nothing to guess.
"""

from __future__ import annotations

from collections.abc import Sequence

from headrace.decode.controller import GAIN, MIN_CHANCE, PRIOR
from headrace.decode.drafter import MAX_DRAFT_TOKENS
from headrace.engine.decode_batch import Verified
from headrace.engine.draft_head import MAX_HEAD_DEPTH
from headrace.kernels.draft_tree import CHOICES, guess_at, place_of

LEAF_PRIOR = 0.1
"""What is believed at the start of a leaf's chance where all before it are right."""
PRIOR_OBSERVATIONS = 4.0
"""What that is worth."""
MEMORY = 0.96
"""What an observation still counts after the next choice: what is not verified any more is believed in again."""
KEPT_GAIN = 0.98
"""Drafts go on as long as they promise that much of the speed without: only steps with drafts show what they are worth,
so a run of bad luck must not end them."""
CHANGE_GAIN = 1.03
"""By how much another tree must be better: the host takes longer for a step whose rows are not those of the last."""


class GuessTrees:
    """How often guesses stood where all before them did, and the trees that follow from that."""

    def __init__(self) -> None:
        self._stood = [0.0] * (MAX_HEAD_DEPTH * CHOICES)
        self._seen = [0.0] * len(self._stood)

    def _rate(self, place: int, choice: int = 0) -> float:
        at, prior = place * CHOICES + choice, LEAF_PRIOR if choice else PRIOR
        return (prior * PRIOR_OBSERVATIONS + self._stood[at]) / (PRIOR_OBSERVATIONS + self._seen[at])

    def chain(self, length: int) -> list[float]:
        """How likely each of the first places of a chain stands with all before it."""
        found, chance = [], 1.0
        for place in range(length):
            chance *= self._rate(place)
            found.append(chance)
        return found

    def learn(self, verified: Verified) -> None:
        """A step has verified this draft of a request: the chain's places up to the first that is wrong, and the leaves
        beside those.
        """
        came = verified.came
        end = len(came) * CHOICES
        for guess, token in zip(verified.draft, verified.token_ids, strict=True):
            at = -1 - guess
            if at >= end:
                continue
            self._seen[at] += 1.0
            if token == came[at // CHOICES]:
                self._stood[at] += 1.0
            elif at % CHOICES == 0:
                end = at + CHOICES

    def choose(
        self,
        num_requests: int,
        seconds_of: Sequence[float],
        rate: float,
        drafting: Sequence[float],
        kept: tuple[Sequence[int], int] = ((), 0),
    ) -> tuple[Sequence[int], int, float]:
        """The tree of each request for the most expected tokens a second, the places to guess for it, and that rate.

        Arguments as in `best_lengths`; `kept`: the tree and places of the steps until now, if they had some, which stay
        unless others are better by a bit. Nothing and `rate` where none pays.
        """
        if drafts := bool(kept[0]):  # others show what they are worth
            self._stood = [stood * MEMORY for stood in self._stood]
            self._seen = [seen * MEMORY for seen in self._seen]
        along = self.chain(MAX_HEAD_DEPTH)
        nodes: list[tuple[float, int]] = []
        best: tuple[Sequence[int], int] = [], 0
        best_rate = rate * (KEPT_GAIN if drafts else GAIN)
        most = min(MAX_DRAFT_TOKENS, (len(seconds_of) - 1) // num_requests - 1)
        for place, chance in enumerate(along):
            before = along[place - 1] if place else 1.0
            nodes.append((chance, guess_at(place)))
            nodes += [(before * self._rate(place, choice), guess_at(place, choice)) for choice in range(1, CHOICES)]
            if chance < MIN_CHANCE:
                break
            nodes.sort(reverse=True)
            expected = 1.0
            for count, (chance_of_node, _) in enumerate(nodes[:most], 1):
                expected += chance_of_node
                tokens_a_second = (
                    expected * num_requests / (seconds_of[num_requests * (count + 1)] + drafting[place + 1])
                )
                if tokens_a_second > best_rate and chance_of_node >= MIN_CHANCE:
                    best, best_rate = ([guess for _, guess in nodes[:count]], place + 1), tokens_a_second
        if not best[1]:
            return [], 0, rate
        rows = num_requests * (len(kept[0]) + 1)
        if drafts and rows < len(seconds_of):
            reached, at = [1.0, *along], [divmod(-1 - guess, CHOICES) for guess in kept[0]]
            expected = 1.0 + sum([reached[place] * self._rate(place, choice) for place, choice in at])
            kept_rate = expected * num_requests / (seconds_of[rows] + drafting[kept[1]])
            if CHANGE_GAIN * kept_rate > best_rate:
                return *kept, kept_rate
        return *best, best_rate


def as_draft(tree: Sequence[int], places: int) -> list[int]:
    """What a tree has for so many places: the chain, then the leaves."""
    return sorted(
        (guess for guess in tree if place_of(guess) < places),
        key=lambda guess: (guess % CHOICES != CHOICES - 1, -guess),
    )
