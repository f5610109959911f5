"""What is computed and not sent: which pages leave in the next message."""

from __future__ import annotations

import itertools
import operator
from collections import deque
from dataclasses import dataclass, replace

from headrace.kvtransfer.base import Ready
from headrace.kvtransfer.messages import Layout, Part
from headrace.kvtransfer.reshard import heads_a_rank


@dataclass(frozen=True)
class Segment:
    """Consecutive pages of one layer whose KV is complete, as soon as `ready` (None: now)."""

    layer: int
    first_page: int
    num_pages: int
    ready: Ready | None = None
    rank: int = 0
    """The tensor-parallel rank whose cache they are in; each rank announces its own."""
    part: int = 0
    """Which of the Grant's this is to leave as, once there is one."""


@dataclass(frozen=True)
class Batch:
    """Pages `first` to `stop` of some segments, which are the same part of the same pages of consecutive layers."""

    segments: list[Segment]
    first: int
    stop: int
    page_bytes: int
    heads: range | None
    """Those of the rank that travel; None: all."""

    @property
    def num_pages(self) -> int:
        """Of all layers."""
        return (self.stop - self.first) * len(self.segments)

    @property
    def size(self) -> int:
        """In bytes."""
        return self.num_pages * self.page_bytes


class Segments:
    """In the order in which they were computed."""

    def __init__(self, page_bytes: int) -> None:
        """Of a whole page."""
        self.largest_message = page_bytes
        """In bytes."""
        self.page_bytes = page_bytes
        """Of a whole page."""
        self._parts: list[Part] = []
        """Of each page; empty where pages travel whole."""
        self._page_bytes = [page_bytes]
        """By part."""
        self._most_pages = [1]
        """Of one message, by part."""
        self._waiting: deque[Segment] = deque()

    def add(self, segment: Segment) -> None:
        """These pages of this layer are in the cache."""
        self._waiting.extend(self._by_part(segment))

    def _by_part(self, segment: Segment) -> list[Segment]:
        if not self._parts:
            return [segment]
        return [replace(segment, part=part) for part, of in enumerate(self._parts) if of.rank == segment.rank]

    def cut(self, parts: list[Part], layout: Layout) -> None:
        """From now on pages leave in these parts, what is computed already among them. `layout` is the sender's.

        Raises `ValueError` where there is no such part.
        """
        heads = heads_a_rank(layout)
        for part in parts:
            if part.rank >= layout.tensor_parallel_size or part.first_head + part.num_heads > heads:
                raise ValueError(f"wants {part}, where {layout.tensor_parallel_size} ranks hold {heads} heads")
        self._parts = parts
        self._page_bytes = [self.page_bytes // heads * part.num_heads for part in parts]
        self._waiting = deque(cut for segment in self._waiting for cut in self._by_part(segment))

    def bound(self, message_bytes: int, most_pages: int) -> None:
        """A message holds so many bytes at most, and so many pages; one page in any case."""
        self._most_pages = [min(max(message_bytes // page_bytes, 1), most_pages) for page_bytes in self._page_bytes]
        self.largest_message = max(map(operator.mul, self._most_pages, self._page_bytes))

    def next_batch(self, held_pages: int) -> Batch | None:
        """What is to leave next, if anything waits: nothing of the prompt's first `held_pages` pages."""
        while self._waiting:
            segment = self._waiting[0]
            first, end = max(segment.first_page, held_pages), segment.first_page + segment.num_pages
            if first < end:
                stop = min(end, first + self._most_pages[segment.part])
                num_layers = self._num_layers_with(segment, stop - first) if stop == end else 1
                joined = list(itertools.islice(self._waiting, num_layers))
                return Batch(joined, first, stop, self._page_bytes[segment.part], self._heads_of(segment.part))
            self._waiting.popleft()
        return None

    def _num_layers_with(self, segment: Segment, num_pages: int) -> int:
        """How many layers leave in one message: this one and those after it that wait with the same pages.

        What is still being computed keeps back no layer that is there.
        """
        count = 1
        most = max(self._most_pages[segment.part] // num_pages, 1)
        for other in itertools.islice(self._waiting, 1, most):
            has_same_pages = (other.first_page, other.num_pages) == (segment.first_page, segment.num_pages)
            if not has_same_pages or (other.layer, other.part) != (segment.layer + count, segment.part):
                break
            if other.rank != segment.rank or (other.ready is not None and not other.ready.query()):
                break
            count += 1
        return count

    def _heads_of(self, part: int) -> range | None:
        if self._page_bytes[part] == self.page_bytes:
            return None
        first_head = self._parts[part].first_head
        return range(first_head, first_head + self._parts[part].num_heads)

    def take(self, batch: Batch) -> None:
        """The batch that was named last leaves."""
        for _ in batch.segments:
            segment = self._waiting.popleft()
        end = segment.first_page + segment.num_pages
        if batch.stop < end:
            self._waiting.appendleft(replace(segment, first_page=batch.stop, num_pages=end - batch.stop))
