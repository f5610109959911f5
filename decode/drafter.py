"""The one interface of all that guesses what a request says next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from headrace.decode.sequence import Key

MAX_DRAFT_TOKENS = 15
"""With the token before them, a draft makes 16 rows of a step at most."""


class Draft(NamedTuple):
    """A guess of a request's next tokens."""

    token_ids: list[int]
    """At most `MAX_DRAFT_TOKENS`, the next one first."""
    depths: Sequence[int]
    """What each token rests on, as its drafter counts it (`ngram`: tokens that matched). Those of one depth are equally
    likely to be right where all before them are."""


class Drafter(Protocol):
    """Guesses for all requests of a batch. It knows no more of a request than the tokens that it is told of."""

    name: str
    """Short and lower-case: part of the names of metrics."""

    def join(self, key: Key, token_ids: Sequence[int]) -> None:
        """A request with its prompt and output so far."""

    def extend(self, key: Key, token_ids: Sequence[int]) -> None:
        """New tokens of a request."""

    def leave(self, key: Key) -> None:
        """Forget a request."""

    def draft(self, limits: Mapping[Key, int]) -> dict[Key, Draft]:
        """Drafts for those of these requests that there is a guess for, no longer than their limits."""
