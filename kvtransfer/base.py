"""What the handoff needs of a worker's KV cache: two small interfaces, so that this package knows no engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

PageId = int


class PageStore(Protocol):
    """The bytes of a paged KV cache. One page of one layer is `page_bytes` long: K, then V."""

    page_bytes: int
    num_pages: int
    """In each layer."""

    def host_views(self, layer: int, page_ids: Sequence[PageId]) -> list[memoryview] | None:
        """The memory itself of these pages, in order, neighbours in one view; None where it is on another device."""

    def read_pages(self, layer: int, page_ids: Sequence[PageId]) -> memoryview:
        """A contiguous copy of these pages."""

    def write_pages(self, layer: int, page_ids: Sequence[PageId], data: memoryview) -> None:
        """Overwrite these pages. `data` holds `len(page_ids) * page_bytes` bytes."""

    def write_blocks(self, layer: int, page_ids: Sequence[PageId], source: np.ndarray, blocks: np.ndarray) -> None:
        """Where `host_views` has none: overwrite these pages by rows `blocks` of source, uint8 [rows, page_bytes]."""

    def stage(self, layer: int, page_ids: Sequence[PageId], blocks: Sequence[int]) -> None:
        """Where `host_views` has none: copy these pages to blocks of the staging memory (`staging.py`)."""

    def open(self, device: str, handle: bytes, offset: int, num_blocks: int) -> Source | None:
        """Another process's pages on the same GPU; None where they are not there.

        Raises `OSError` where they can't be had and `ValueError` where there are fewer than that.
        """


class Source(Protocol):
    """A sender's memory that this process can read."""

    def copy(
        self, blocks: Sequence[int], layer: int, page_ids: Sequence[PageId], done: Callable[[Exception | None], None]
    ) -> None:
        """Copy pages from there into this worker's cache, now or soon, then call `done` once, on any thread, with what
        went wrong. Raises `ValueError`, and never calls `done`, where there is no such block.
        """


class PageAllocator(Protocol):
    """Who owns which page. Pages are reference-counted and may be found again by the hash of what they hold."""

    @property
    def num_free(self) -> int:
        """Pages that `allocate` could give, cached ones that nobody uses among them."""

    def allocate(self, count: int) -> list[PageId]:
        """Take `count` pages, with one reference each. The caller checks `num_free` first."""

    def share(self, page_ids: Sequence[PageId]) -> None:
        """Add one reference on each of these pages, which are in use."""

    def release(self, page_ids: Sequence[PageId]) -> None:
        """Drop one reference on each."""

    def put_back(self, page_ids: Sequence[PageId]) -> None:
        """The same for pages that were taken just now."""

    def hashes(self, token_ids: Sequence[int]) -> list[bytes]:
        """One for each full page of a prompt; each covers all tokens up to its page's end."""

    def match_prefix(self, hashes: Sequence[bytes]) -> list[PageId]:
        """The pages held for the longest known prefix of `hashes`, with one more reference each."""

    def publish(self, page_id: PageId, page_hash: bytes) -> None:
        """Let a full page be found by its hash."""


class Ready(Protocol):
    """Device work that must be over before its pages are read; a `torch.cuda.Event` is one."""

    def synchronize(self) -> None:
        """Wait for it."""
