"""Which prompt tokens the next prefill step computes. Pure bookkeeping: no device, no sockets, no clock."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

Key = tuple[str, int]
"""(request id, attempt)."""


@dataclass(frozen=True)
class Chunk:
    """Tokens `start` to `start + length` of one prompt."""

    key: Key
    start: int
    length: int
    is_last: bool


@dataclass
class _Waiting:
    key: Key
    num_tokens: int
    computed: int


class PrefillScheduler:
    """First come, first served; a long prompt is cut at page boundaries."""

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._waiting: deque[_Waiting] = deque()

    def add(self, key: Key, num_tokens: int, computed: int) -> None:
        """Queue a prompt of which the first `computed` tokens (whole pages) are in the cache already."""
        assert computed % self._page_size == 0, computed
        assert computed < num_tokens, (computed, num_tokens)
        self._waiting.append(_Waiting(key, num_tokens, computed))

    def remove(self, key: Key) -> None:
        """Forget a prompt, whether it is still here or not."""
        self._waiting = deque(waiting for waiting in self._waiting if waiting.key != key)

    @property
    def num_tokens(self) -> int:
        """Tokens that no step has computed or computes."""
        return sum(waiting.num_tokens - waiting.computed for waiting in self._waiting)

    def schedule(self, token_budget: int, whole: int = 0) -> list[Chunk]:
        """The chunks of the next step, which count as computed from now on. Empty where nothing waits.

        They have `token_budget` tokens at most, but a page in any case. What is left of a prompt, up to `whole` tokens,
        is not cut: alone it may have more than the budget.
        """
        chunks: list[Chunk] = []
        budget = max(token_budget // self._page_size, 1) * self._page_size
        while self._waiting and budget > 0:
            head = self._waiting[0]
            left = head.num_tokens - head.computed
            room = budget if chunks else max(budget, whole)
            length = left if left <= room else room // self._page_size * self._page_size
            if chunks and length < left <= whole:
                break
            if length == 0:
                break
            chunks.append(Chunk(head.key, head.computed, length, is_last=length == left))
            head.computed += length
            budget -= length
            if length == left:
                self._waiting.popleft()
        return chunks
