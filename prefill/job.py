"""One request in a prefill worker's hands."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from functools import cached_property

from headrace.engine.base import Ready
from headrace.engine.engine import PrefillChunk
from headrace.engine.page_pool import page_hashes
from headrace.engine.sampler import SampledToken
from headrace.grammar import Matcher
from headrace.kvtransfer.handoff import Handoff
from headrace.kvtransfer.segments import Segment
from headrace.messages.request import QueueEntry
from headrace.messages.stream import FailureCode, TokenLogprobs
from headrace.prefill.scheduler import Chunk, Key
from headrace.queue import Delivery


class RequestRejected(RuntimeError):
    """This worker gives a request up; `code` says why and `retryable` whether another attempt may succeed."""

    def __init__(self, code: FailureCode, message: str, retryable: bool) -> None:
        super().__init__(message)
        self.code = code
        self.retryable = retryable


@dataclass(eq=False)
class Prompt:
    """An entry that was taken from the queue, and what is known of its prompt."""

    delivery: Delivery
    page_size: int
    is_begun: bool = False
    """Something of it has been computed."""

    @property
    def entry(self) -> QueueEntry:
        """As the gateway queued it."""
        return self.delivery.entry

    @property
    def key(self) -> Key:
        """(request id, attempt)."""
        return self.entry.request_id, self.delivery.attempt

    @property
    def num_tokens(self) -> int:
        """Of the prompt."""
        return len(self.entry.token_ids)

    @cached_property
    def page_hashes(self) -> list[bytes]:
        """Of all its full pages: hashed when somebody asks, once."""
        return page_hashes(self.entry.token_ids, self.page_size)

    @property
    def reusable(self) -> list[bytes]:
        """Hashes of the pages that may come from a prefix cache."""
        if self.entry.sampling.prompt_logprobs is not None:
            return []
        # The last token is always computed: its logits give the first output token.
        return self.page_hashes[: (self.num_tokens - 1) // self.page_size]


@dataclass(eq=False)
class Job:
    """A prompt that is being computed; `pages` are this worker's, in the order of the prompt."""

    prompt: Prompt
    pages: list[int]
    cached_tokens: int
    handoff: Handoff | None
    """None where there is nothing to decode."""
    matcher: Matcher | None
    """Where the output follows a grammar."""
    computed: asyncio.Future[SampledToken | None]
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    first_token_at: float | None = None
    """Unix time in seconds, once the prompt is computed."""

    @property
    def key(self) -> Key:
        """(request id, attempt)."""
        return self.prompt.key

    @property
    def wants_layers(self) -> bool:
        """See `Handoff`."""
        return self.handoff is not None and self.handoff.wants_layers

    def chunk(self, chunk: Chunk) -> PrefillChunk:
        """The engine's input for one chunk of this prompt."""
        entry = self.prompt.entry
        return PrefillChunk(
            entry.token_ids, chunk.start, chunk.length, self.pages, entry.sampling, entry.generated, self.matcher
        )

    def layer_computed(self, layer: int, start: int, end: int, ready: Ready | None = None) -> None:
        """Tokens `start` to `end` of `layer` are in the cache, or will be when `ready`: their pages may travel."""
        if self.handoff is not None:
            page_size = self.prompt.page_size
            first, stop = start // page_size, -(-end // page_size)
            self.handoff.layer_ready(Segment(layer, first, stop - first, ready))
