"""What a head on the device guesses, as the host speaks of it: it knows the places of guesses, not their tokens.

A head guesses `CHOICES` tokens for each place, one place after the other behind the likeliest ones. A draft of such
guesses is a chain of the likeliest, and behind it leaves: other choices for places of the chain.
"""

from __future__ import annotations

from collections.abc import Sequence

CHOICES = 3
"""Tokens that are guessed for one place, the likeliest first."""


def guess_at(place: int, choice: int = 0) -> int:
    """Stands for a drafted token where no token can: it is negative."""
    return -1 - place * CHOICES - choice


def place_of(drafted: int) -> int:
    """Where a guess belongs."""
    return (-1 - drafted) // CHOICES


def chain(length: int) -> list[int]:
    """The likeliest guesses of the first places."""
    return [guess_at(place) for place in range(length)]


def depths_of(draft: Sequence[int]) -> list[int]:
    """By how many positions each token of a draft is behind the newest token."""
    return [place_of(token) + 1 if token < 0 else at for at, token in enumerate(draft, 1)]


def standing_row(first: int, count: int, drafts: Sequence[int], depths: Sequence[int], drawn: Sequence[int]) -> int:
    """The last row that stands of a request's `count` rows from `first` on; by row: drafted token, depth, and what was
    drawn after it. Those before it are the first rows, as many as its depth.
    """
    last, end = first, first + count
    while last + 1 < end and depths[last + 1] == last + 1 - first and drafts[last + 1] == drawn[last]:
        last += 1
    depth = last - first + 1
    for leaf in range(last + 1, end):
        if depths[leaf] == depth != leaf - first and drafts[leaf] == drawn[last]:
            return leaf
    return last
