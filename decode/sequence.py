"""One request in a decode worker's hands."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from headrace.grammar import Matcher
from headrace.kvtransfer.messages import Offer
from headrace.messages.stream import MAX_EVENT_TOKENS, FinishReason, TokenEvent, TokenLogprobs

Key = tuple[str, int]
"""(request id, attempt)."""


@dataclass(eq=False, slots=True)
class Sequence:
    """A request that is being decoded, or waits for its first step."""

    offer: Offer
    token_ids: list[int]
    """Prompt and output; the KV of the last one is not in the cache yet."""
    pages: list[int]
    generated: int
    """Output tokens so far, those of earlier attempts among them."""
    matcher: Matcher | None = None
    """Where the output follows a grammar. The batch's while the request is in it."""
    in_flight: int = 0
    """Steps that make a token of this request and whose tokens are not known yet."""
    drafts_in_flight: int = 0
    """Drafted tokens of these steps, which may stand."""
    started_at: float = field(default_factory=time.time)
    """Unix time in seconds at which it was handed over."""
    newest_logprobs: TokenLogprobs | None = None
    """Those of the last token, where the request asks for some."""
    is_moving: bool = False
    """It is on its way to another worker: it makes one token a step, so that it can stop where it said it would."""
    key: Key = field(init=False)
    gateway: str = field(init=False)
    stop_token_ids: tuple[int, ...] = field(init=False)
    min_tokens: int = field(init=False)
    max_tokens: int = field(init=False)

    def __post_init__(self) -> None:
        self.key = self.offer.request_id, self.offer.attempt
        self.gateway = self.offer.gateway
        sampling = self.offer.sampling
        self.stop_token_ids, self.min_tokens, self.max_tokens = (
            sampling.stop_token_ids,
            sampling.min_tokens,
            sampling.max_tokens,
        )

    def pages_missing(self, page_size: int, drafted: int = 0) -> int:
        """Pages that must be added before the next step can write the KV of the token before it, and of its draft.

        Negative where a refused draft has left some that are not needed.
        """
        return -(-(self.longest + drafted) // page_size) - len(self.pages)

    @property
    def longest(self) -> int:
        """Tokens so far, if all that is in flight stands."""
        return len(self.token_ids) + self.in_flight + self.drafts_in_flight

    def append(self, token_id: int) -> None:
        """Take a token."""
        self.token_ids.append(token_id)
        self.generated += 1

    @property
    def tokens_left(self) -> int:
        """So many more at most."""
        return self.max_tokens - self.generated

    def take(self, token_ids: Iterable[int], max_model_len: int) -> FinishReason | None:
        """Take a step's tokens, up to the one that ends the request, if it does."""
        for token_id in token_ids:
            self.append(token_id)
            reason = self.finish_reason(max_model_len)
            if reason is not None:
                return reason
        return None

    def finish_reason(self, max_model_len: int) -> FinishReason | None:
        """Whether the newest token was the last."""
        if self.token_ids[-1] in self.stop_token_ids and self.generated > self.min_tokens:
            return "stop"
        if self.generated >= self.max_tokens or len(self.token_ids) >= max_model_len:
            return "length"
        return None


def repeat_tokens(sequence: Sequence, position: int) -> list[TokenEvent] | None:
    """The output tokens from `position` on once more; None where their log probabilities are wanted, which are gone."""
    request_id, attempt = sequence.key
    missing = sequence.generated - position
    if missing <= 0:
        return []
    if sequence.offer.sampling.logprobs is not None:
        return None
    return [TokenEvent(request_id, attempt, position, sequence.token_ids[-missing:][:MAX_EVENT_TOKENS])]
