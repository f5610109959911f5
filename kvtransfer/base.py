"""What the handoff needs of a worker's KV cache: small interfaces, so that this package knows no engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

PageId = int
Done = Callable[[Exception | None], None]
"""Told once that a copy has ended, on any thread, and what went wrong."""


class PageStore(Protocol):
    """The bytes of a paged KV cache. One page of one layer is `page_bytes` long: K, then V.

    Each of these is [heads, tokens, head size].
    """

    page_bytes: int
    num_pages: int
    """In each layer."""

    def host_views(self, layer: int, page_ids: Sequence[PageId]) -> list[memoryview] | None:
        """The memory itself of these pages, in order, neighbours in one view; None where it is on another device."""

    def read_pages(self, layer: int, page_ids: Sequence[PageId]) -> memoryview:
        """A contiguous copy of these pages."""

    def write_pages(self, layer: int, page_ids: Sequence[PageId], data: memoryview) -> None:
        """Overwrite these pages. `data` holds `len(page_ids) * page_bytes` bytes."""

    def write_blocks(self, layers: range, page_ids: Sequence[PageId], source: np.ndarray, blocks: np.ndarray) -> None:
        """Overwrite these pages of these layers by rows of source, uint8 [rows, page_bytes], layer by layer."""

    def stage(self, layers: range, page_ids: Sequence[PageId], blocks: Sequence[int]) -> None:
        """Where `host_views` has none: copy these pages of these layers to blocks of the staging memory (`staging.py`),
        layer by layer.
        """

    def read_rows(self, layer: int, row_bytes: int, rows: np.ndarray[Any, Any]) -> memoryview:
        """A contiguous copy of parts of pages: of these rows of a layer's memory, each `row_bytes` long."""

    def write_rows(self, layer: int, row_bytes: int, rows: np.ndarray[Any, Any], data: memoryview) -> None:
        """Overwrite these rows. `data` holds `len(rows) * row_bytes` bytes."""

    def open(self, device: str, handle: bytes, offset: int, num_blocks: int) -> Source | None:
        """Another process's pages on a GPU that this one's can read; None where there are none.

        Raises `OSError` where they can't be had and `ValueError` where there are fewer than that.
        """


class Source(Protocol):
    """A sender's memory that this process can read."""

    def copy(self, blocks: Sequence[int], layers: range, page_ids: Sequence[PageId], done: Done) -> None:
        """Copy blocks from there, layer by layer, into these pages of this worker's cache, now or soon, then call
        `done` once, on any thread, with what went wrong. Raises `ValueError`, and never calls `done`, where there is no
        such block.
        """


@runtime_checkable
class RowSource(Source, Protocol):
    """One whose pages can be cut anew."""

    def gather(self, row_bytes: int, rows: np.ndarray[Any, Any]) -> memoryview:
        """A copy of these rows of the whole memory, each `row_bytes` long. Raises `ValueError` where there is none."""


class Destination(Protocol):
    """Where one handoff's pages, or one part of each, go. Pages are counted as the sender cuts the prompt."""

    page_bytes: int
    """Of one page as it travels."""

    def host_views(self, layer: int, first_page: int, num_pages: int) -> list[memoryview] | None:
        """The memory itself, in order, where pages may be received right into it."""

    def write(self, layer: int, first_page: int, num_pages: int, data: memoryview) -> None:
        """Put `num_pages * page_bytes` bytes where they belong."""

    def copy(self, source: Source, layers: range, first_page: int, blocks: Sequence[int], done: Done) -> None:
        """The same, for some layers, with pages in the sender's memory. Calls `done` and raises as `Source.copy`."""


class WholePages:
    """See `Destination`: sender and receiver cut alike, so each page goes to a page."""

    def __init__(self, store: PageStore, pages: list[PageId]) -> None:
        self.page_bytes = store.page_bytes
        self._store = store
        self._pages = pages

    def host_views(self, layer: int, first_page: int, num_pages: int) -> list[memoryview] | None:
        """See `Destination`."""
        return self._store.host_views(layer, self._pages[first_page : first_page + num_pages])

    def write(self, layer: int, first_page: int, num_pages: int, data: memoryview) -> None:
        """See `Destination`."""
        self._store.write_pages(layer, self._pages[first_page : first_page + num_pages], data)

    def copy(self, source: Source, layers: range, first_page: int, blocks: Sequence[int], done: Done) -> None:
        """See `Destination`."""
        end_page = first_page + len(blocks) // len(layers)
        source.copy(blocks, layers, self._pages[first_page:end_page], done)


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

    def query(self) -> bool:
        """Whether it is over."""
