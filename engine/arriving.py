"""Sampled tokens on their way from the device to the host."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from headrace.engine.sampler import SampledToken
from headrace.messages.stream import TokenLogprobs


class ArrivingTokens:
    """A copy that was started when this was made; nothing that is started later delays it."""

    def __init__(
        self,
        sampled: torch.Tensor,
        logprobs: Mapping[int, TokenLogprobs],
        *,
        is_copied: bool = False,
        done: torch.cuda.Event | None = None,
    ) -> None:
        """`sampled` [R] int64, or [R, 2] with what each row had drafted; `logprobs` by row, of those that want some.

        `is_copied`: the device writes `sampled` to memory of the host that nothing else uses until then, pinned where
        there is a device. `done`: an event to record that with; without it, one is made.
        """
        self.sampled = sampled
        self.drafted: list[int] = []
        """Known once the tokens are."""
        self.logprobs = logprobs
        self._tokens = sampled
        if not is_copied:
            self._tokens = torch.empty(sampled.shape, dtype=torch.int64, pin_memory=sampled.is_cuda)
            self._tokens.copy_(sampled, non_blocking=True)
        self._done = done
        if done is None and (sampled.is_cuda or self._tokens.is_pinned()):
            self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        if self._done is not None:
            self._done.record()

    @property
    def are_here(self) -> bool:
        """Whether nothing need be waited for."""
        return self._done is None or bool(self._done.query())  # type: ignore[no-untyped-call]

    def wait(self) -> list[int]:
        """The tokens' ids, as soon as they are here."""
        if self._done is not None:
            self._done.synchronize()
        tokens: list[Any] = self._tokens.tolist()
        if self._tokens.dim() == 2:
            tokens, self.drafted = [token for token, _ in tokens], [drafted for _, drafted in tokens]
        return tokens

    def wait_for_all(self) -> list[SampledToken]:
        """The same with log probabilities."""
        return [SampledToken(token, self.logprobs.get(row)) for row, token in enumerate(self.wait())]
