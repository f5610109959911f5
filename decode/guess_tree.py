"""Which of a head's guesses on the device are worth verifying: a chain of the likeliest, and leaves beside it.

Nobody has seen the guesses, so all that is known is how often those of a place and a choice stood, and all requests of
a batch get the same tree. A leaf makes one token where the chain ends before its place; it costs a row of the step, but
nothing to guess.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from headrace.decode.controller import GAIN, MIN_CHANCE, PRIOR
from headrace.decode.drafter import MAX_DRAFT_TOKENS
from headrace.engine.draft_head import MAX_HEAD_DEPTH
from headrace.kernels.draft_tree import CHOICES, guess_at, place_of

LEAF_PRIOR = 0.1
"""What is believed at the start of a leaf's chance where all before it are right."""
PRIOR_OBSERVATIONS = 4.0
"""What that is worth."""
MEMORY = 0.98
"""What an observation still counts after the next choice: what is not verified any more is believed in again."""
KEPT_GAIN = 0.98
"""Drafts go on as long as they promise that much of the speed without: only steps with drafts show what they are worth,
so a run of bad luck must not end them."""


class GuessTrees:
    """How often guesses stood where all before them did, and the trees that follow from that."""

    def __init__(self) -> None:
        self._stood = [0.0] * (MAX_HEAD_DEPTH * CHOICES)
        self._seen = [0.0] * len(self._stood)

    def _rate(self, place: int, choice: int = 0) -> float:
        at, prior = place * CHOICES + choice, PRIOR if choice == 0 else LEAF_PRIOR
        return (prior * PRIOR_OBSERVATIONS + self._stood[at]) / (PRIOR_OBSERVATIONS + self._seen[at])

    def chain(self, length: int) -> list[float]:
        """How likely each of the first places of a chain stands with all before it."""
        found, chance = [], 1.0
        for place in range(length):
            chance *= self._rate(place)
            found.append(chance)
        return found

    def learn(self, verified: Mapping[int, int], new: Sequence[int]) -> None:
        """A step has verified these guesses of a request, by `guess_at`, and made these tokens."""
        for place, came in enumerate(new):
            for choice in range(CHOICES):
                token = verified.get(guess_at(place, choice))
                if token is not None:
                    self._stood[place * CHOICES + choice] += token == came
                    self._seen[place * CHOICES + choice] += 1.0
            if verified.get(guess_at(place)) != came:
                return

    def choose(
        self, num_requests: int, seconds_of: Sequence[float], rate: float, drafting: Sequence[float], *, drafts: bool
    ) -> tuple[list[int], int, float]:
        """The tree of each request for the most expected tokens a second, the places to guess for it, and that rate.

        Arguments as in `best_lengths`; `drafts`: the steps until now had some. Nothing and `rate` where none pays.
        """
        if drafts:  # others show what they are worth
            self._stood = [stood * MEMORY for stood in self._stood]
            self._seen = [seen * MEMORY for seen in self._seen]
        along = self.chain(MAX_HEAD_DEPTH)
        nodes: list[tuple[float, int]] = []
        best: tuple[list[int], int] = [], 0
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
        return (*best, best_rate) if best[1] else ([], 0, rate)


def as_draft(tree: Sequence[int], places: int) -> list[int]:
    """What a tree has for so many places: the chain, then the leaves."""
    return sorted(
        (guess for guess in tree if place_of(guess) < places),
        key=lambda guess: (guess % CHOICES != CHOICES - 1, -guess),
    )
