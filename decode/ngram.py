"""Drafts without a model: what came after the last tokens when they last stood in the prompt or the output.

Prompt lookup (arXiv:2304.04487) with the search of LZ77 coders: a table finds the latest place of the last
two tokens, a chain leads from there to earlier ones, and the one with the longest match before it is copied from.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence

import numpy as np

from headrace.decode.drafter import Draft
from headrace.decode.sequence import Key

MIN_MATCH = 2
"""One token alone says too little."""
MAX_MATCH = 16
"""Longer matches are not told apart."""
MAX_PLACES = 64
"""Places looked at, the latest ones."""
MAX_PROMPT_TOKENS = 32768
"""Of a longer prompt the last so many are searched: the table is made between two steps, in 10 ms at most."""


class NgramIndex:
    """The tokens of one request, and where each pair of tokens stands in them. Some 150 bytes a token."""

    def __init__(self, token_ids: Sequence[int]) -> None:
        self._tokens = list(token_ids[-MAX_PROMPT_TOKENS:])
        tokens = np.array(self._tokens, np.int64)
        pairs = (tokens[:-1] << 32) | tokens[1:]
        ends = np.arange(2, len(tokens) + 1)
        self._latest = dict(zip(pairs.tolist(), ends.tolist(), strict=True))
        """By pair: where its latest place ends."""
        by_pair = np.argsort(pairs, kind="stable")
        is_repeated = pairs[by_pair[1:]] == pairs[by_pair[:-1]]
        earlier = np.zeros(len(tokens) + 1, np.int32)
        earlier[ends[by_pair[1:][is_repeated]]] = ends[by_pair[:-1][is_repeated]]
        self._earlier = array("i", earlier.tobytes())
        """By where a pair ends: where the same pair ended before, or 0."""

    def extend(self, token_ids: Sequence[int]) -> None:
        """Add new tokens."""
        tokens, latest, earlier = self._tokens, self._latest, self._earlier
        for token in token_ids:
            if tokens:
                pair = tokens[-1] << 32 | token
                earlier.append(latest.get(pair, 0))
                latest[pair] = len(tokens) + 1
            else:
                earlier.append(0)
            tokens.append(token)

    def propose(self, limit: int) -> Draft | None:
        """The `limit` tokens after the longest match, of equal ones the latest; None where nothing matches.

        A match that reaches into its own copy goes on as a loop.
        """
        tokens, end = self._tokens, len(self._tokens)
        best, length = 0, MIN_MATCH - 1
        place = self._earlier[end]
        for _ in range(MAX_PLACES):
            if place <= length:
                break
            if tokens[place - length - 1] == tokens[end - length - 1]:
                matched = self._match(place, end)
                if matched > length:
                    best, length = place, matched
                    if length == MAX_MATCH:
                        break
            place = self._earlier[place]
        if best == 0:
            return None
        copied = tokens[best : best + limit]
        while len(copied) < limit:
            copied += copied[: limit - len(copied)]
        return Draft(copied, range(length, length + limit))

    def _match(self, place: int, end: int) -> int:
        tokens = self._tokens
        longest = min(place, MAX_MATCH)
        for length in range(MIN_MATCH, longest):
            if tokens[place - length - 1] != tokens[end - length - 1]:
                return length
        return longest


class NgramDrafter:
    """A `Drafter` with an index a request."""

    name = "ngram"

    def __init__(self) -> None:
        self._indices: dict[Key, NgramIndex] = {}

    def join(self, key: Key, token_ids: Sequence[int]) -> None:
        """See `Drafter`."""
        self._indices[key] = NgramIndex(token_ids)

    def extend(self, key: Key, token_ids: Sequence[int]) -> None:
        """See `Drafter`."""
        self._indices[key].extend(token_ids)

    def leave(self, key: Key) -> None:
        """See `Drafter`."""
        del self._indices[key]

    def draft(self, limits: Mapping[Key, int]) -> dict[Key, Draft]:
        """See `Drafter`."""
        drafts = {}
        for key, limit in limits.items():
            draft = self._indices[key].propose(limit) if limit > 0 else None
            if draft is not None:
                drafts[key] = draft
        return drafts
