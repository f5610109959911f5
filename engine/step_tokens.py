"""The tokens that one decode step made."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from headrace.engine.sampler import SampledToken
from headrace.messages.stream import TokenLogprobs

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True, slots=True)
class StepTokens(Generic[K]):
    """Columns, since a step makes a token for each request, and the host is to do little for each. Iterating gives
    (key, token), those of one request in order.
    """

    keys: Sequence[K]
    """Of each token. Steps without drafts have the very same object as long as the batch's members are the same."""
    token_ids: list[int]
    logprobs: Mapping[int, TokenLogprobs] = field(default_factory=dict)
    """By index, of those for which they are wanted."""

    @classmethod
    def of(cls, pairs: Iterable[tuple[K, SampledToken]]) -> StepTokens[K]:
        """The same from (key, token)."""
        keys, tokens = list[K](), list[SampledToken]()
        for key, token in pairs:
            keys.append(key)
            tokens.append(token)
        scores = {index: token.logprobs for index, token in enumerate(tokens) if token.logprobs is not None}
        return cls(keys, [token.token_id for token in tokens], scores)

    def __len__(self) -> int:
        return len(self.token_ids)

    def __iter__(self) -> Iterator[tuple[K, SampledToken]]:
        for index, (key, token_id) in enumerate(zip(self.keys, self.token_ids, strict=True)):
            yield key, SampledToken(token_id, self.logprobs.get(index))
