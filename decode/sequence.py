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


@dataclass(slots=True)
class Steps:
    """How many steps of a batch there were: what all of its requests have in common is counted once."""

    started: int = 0
    collected: int = 0


@dataclass(eq=False, slots=True)
class Sequence:
    """A request that is being decoded, or waits for its first step."""

    offer: Offer
    token_ids: list[int]
    """Prompt and output; the KV of the last one is not in the cache yet."""
    pages: list[int]
    max_model_len: int
    """Tokens that it may have, prompt and output."""
    matcher: Matcher | None = None
    """Where the output follows a grammar. The batch's while the request is in it."""
    steps: Steps | None = None
    """Those of the batch that it is in."""
    joined_at: int = 0
    """How many of these had been started before it joined."""
    pages_last_until: int = 0
    """The last step, so counted, for which its pages are enough if each makes one token."""
    drafts_in_flight: int = 0
    """Drafted tokens of the steps in flight, which may stand."""
    started_at: float = field(default_factory=time.time)
    """Unix time in seconds at which it was handed over."""
    newest_logprobs: TokenLogprobs | None = None
    """Those of the last token, where the request asks for some."""
    is_moving: bool = False
    """It is on its way to another worker: it makes one token a step, so that it can stop where it said it would."""
    key: Key = field(init=False)
    gateway: str = field(init=False)
    prompt_tokens: int = field(init=False)
    last_length: int = field(init=False)
    """Tokens with which it ends in any case."""
    stop_token_ids: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.key = self.offer.request_id, self.offer.attempt
        self.gateway = self.offer.gateway
        self.prompt_tokens = len(self.offer.token_ids) - self.offer.generated
        self.last_length = min(self.prompt_tokens + self.offer.sampling.max_tokens, self.max_model_len)
        self.stop_token_ids = self.offer.sampling.stop_token_ids

    @property
    def generated(self) -> int:
        """Output tokens so far, those of earlier attempts among them."""
        return len(self.token_ids) - self.prompt_tokens

    @property
    def in_flight(self) -> int:
        """Steps that make a token of this request and whose tokens are not known yet."""
        return 0 if self.steps is None else self.steps.started - max(self.joined_at, self.steps.collected)

    def pages_missing(self, page_size: int, drafted: int = 0) -> int:
        """Pages that must be added before the next step can write the KV of the token before it, and of its draft.

        Negative where a refused draft has left some that are not needed.
        """
        return -(-(self.longest + drafted) // page_size) - len(self.pages)

    @property
    def longest(self) -> int:
        """Tokens so far, if all that is in flight stands."""
        return len(self.token_ids) + self.in_flight + self.drafts_in_flight

    @property
    def tokens_left(self) -> int:
        """So many more at most."""
        return self.last_length - len(self.token_ids)

    def take(self, token_ids: Iterable[int]) -> FinishReason | None:
        """Take a step's tokens, up to the one that ends the request, if it does."""
        for token_id in token_ids:
            self.token_ids.append(token_id)
            reason = self.finish_reason()
            if reason is not None:
                return reason
        return None

    def finish_reason(self) -> FinishReason | None:
        """Whether the newest token was the last."""
        if self.token_ids[-1] in self.stop_token_ids and self.generated > self.offer.sampling.min_tokens:
            return "stop"
        return "length" if self.tokens_left <= 0 else None


def repeat_tokens(sequence: Sequence, position: int) -> list[TokenEvent] | None:
    """The output tokens from `position` on once more; None where their log probabilities are wanted, which are gone."""
    request_id, attempt = sequence.key
    missing = sequence.generated - position
    if missing <= 0:
        return []
    if sequence.offer.sampling.logprobs is not None:
        return None
    return [TokenEvent(request_id, attempt, position, sequence.token_ids[-missing:][:MAX_EVENT_TOKENS])]
