"""Sampled tokens on their way from the device to the host."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from headrace.engine.sampler import SampledToken
from headrace.messages.stream import TokenLogprobs


class ArrivingTokens:
    """A copy that was started when this was made; nothing that is started later delays it."""

    def __init__(
        self, sampled: torch.Tensor, logprobs: Mapping[int, TokenLogprobs], drafts: torch.Tensor | None = None
    ) -> None:
        """`sampled` [R] int64; `logprobs` by row, of those rows that asked for them; `drafts` [R]: what rows verify."""
        self.sampled = sampled
        self._logprobs = logprobs
        self._tokens = _copy(sampled)
        self._drafts = None if drafts is None else _copy(drafts)
        self._done: torch.cuda.Event | None = None
        if sampled.is_cuda:
            self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._done.record()

    def wait(self) -> list[SampledToken]:
        """The tokens, as soon as they are here."""
        if self._done is not None:
            self._done.synchronize()
        tokens = self._tokens.tolist()
        if not self._logprobs:
            return list(map(SampledToken, tokens))
        return [SampledToken(token, self._logprobs.get(row)) for row, token in enumerate(tokens)]

    @property
    def drafts(self) -> list[int]:
        """Those of a step that verified some, once it has been waited for."""
        drafts: list[int] = [] if self._drafts is None else self._drafts.tolist()
        return drafts


def _copy(source: torch.Tensor) -> torch.Tensor:
    return torch.empty(len(source), dtype=source.dtype, pin_memory=source.is_cuda).copy_(source, non_blocking=True)
