"""Which of a head's guesses on the device are worth verifying: a chain of the likeliest, and leaves beside it.

Nobody has seen the guesses, so all that is known is how often those of a place and a choice stood. A leaf makes one
token where the chain ends before its place, and costs a row of the step, but nothing to guess.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from headrace.decode.controller import MIN_CHANCE, Acceptance, RequestAcceptance
from headrace.decode.drafter import MAX_DRAFT_TOKENS, Draft
from headrace.engine.draft_head import MAX_HEAD_DEPTH
from headrace.kernels.draft_tree import CHOICES, guess_at

DEEPEST = Draft([-1] * MAX_HEAD_DEPTH, range(MAX_HEAD_DEPTH))
"""As far as a head is ever asked to guess."""
LEAF_PRIOR = 0.1
"""What is believed at the start of a leaf's chance where all before it are right."""


class GuessTrees:
    """Of all requests together, on which each request's estimates lean."""

    def __init__(self, chain: Acceptance) -> None:
        """`chain` is told of chains by others."""
        self._chain = chain
        self._leaves = Acceptance(LEAF_PRIOR)

    def best(self, chain: RequestAcceptance, leaves: RequestAcceptance) -> list[tuple[float, int]]:
        """(chance to stand, guess), the likeliest first: any number of the first ones are a tree."""
        along = self._chain.chances(chain, DEEPEST)
        tree = [(chance, guess_at(place)) for place, chance in enumerate(along)]
        for place, before in enumerate([1.0, *along[:-1]]):
            for choice in range(1, CHOICES):
                chance = before * self._leaves.rate(leaves, place * CHOICES + choice)
                if chance >= MIN_CHANCE:
                    tree.append((chance, guess_at(place, choice)))
        return sorted(tree, reverse=True)[:MAX_DRAFT_TOKENS]

    def learn(self, leaves: RequestAcceptance, verified: Mapping[int, int], new: Sequence[int]) -> list[int]:
        """A step has verified these guesses and made these tokens; returns the tokens of the chain, as far as known."""
        chain: list[int] = []
        for place, came in enumerate(new):
            for choice in range(1, CHOICES):
                leaf = verified.get(guess_at(place, choice))
                if leaf is not None:
                    self._leaves.observe_one(leaves, place * CHOICES + choice, leaf == came)
            token = verified.get(guess_at(place))
            if token is None:
                break
            chain.append(token)
            if token != came:
                break
        return chain


def as_draft(tree: Sequence[int], places: int) -> list[int]:
    """What a tree has for so many places: the chain, then the leaves."""
    ends_here = guess_at(places)
    return sorted(
        (guess for guess in tree if guess > ends_here), key=lambda guess: (guess % CHOICES != CHOICES - 1, -guess)
    )
