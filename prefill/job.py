"""One request in a prefill worker's hands."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from headrace.engine.base import Ready
from headrace.engine.engine import PrefillChunk
from headrace.engine.sampler import SampledToken
from headrace.grammar import Matcher
from headrace.kvtransfer.handoff import Handoff
from headrace.kvtransfer.segments import Segment
from headrace.messages.request import QueueEntry
from headrace.messages.stream import FailureCode, TokenLogprobs
from headrace.prefill.scheduler import Chunk


class RequestRejected(RuntimeError):
    """This worker gives a request up; `code` says why and `retryable` whether another attempt may succeed."""

    def __init__(self, code: FailureCode, message: str, retryable: bool) -> None:
        super().__init__(message)
        self.code = code
        self.retryable = retryable


@dataclass(eq=False)
class Job:
    """A prompt that is being computed; `pages` are this worker's, in the order of the prompt."""

    entry: QueueEntry
    attempt: int
    pages: list[int]
    page_hashes: list[bytes]
    cached_tokens: int
    handoff: Handoff | None
    """None where there is nothing to decode."""
    computed: asyncio.Future[SampledToken | None]
    matcher: Matcher | None = None
    """Where the output follows a grammar."""
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    first_token_at: float | None = None
    """Unix time in seconds, once the prompt is computed."""

    @property
    def key(self) -> tuple[str, int]:
        """(request id, attempt)."""
        return self.entry.request_id, self.attempt

    @property
    def wants_layers(self) -> bool:
        """See `Handoff`."""
        return self.handoff is not None and self.handoff.wants_layers

    def chunk(self, chunk: Chunk) -> PrefillChunk:
        """The engine's input for one chunk of this prompt."""
        entry = self.entry
        return PrefillChunk(
            entry.token_ids, chunk.start, chunk.length, self.pages, entry.sampling, entry.generated, self.matcher
        )

    def layer_computed(self, layer: int, start: int, end: int, page_size: int, ready: Ready | None = None) -> None:
        """Tokens `start` to `end` of `layer` are in the cache, or will be when `ready`: their pages may travel."""
        if self.handoff is not None:
            first, stop = start // page_size, -(-end // page_size)
            self.handoff.layer_ready(Segment(layer, first, stop - first, ready))
