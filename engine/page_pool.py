"""Who owns which KV page: a free list, reference counts, and a prefix cache keyed by chained hashes. No torch here."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

import xxhash


class OutOfPages(Exception):
    """More pages were asked for than are free."""


def page_hashes(token_ids: Sequence[int], page_size: int) -> list[bytes]:
    """One 16-byte XXH3-128 for each full page; each covers all tokens up to its page's end."""
    data = array("i", token_ids).tobytes()
    stride = page_size * 4
    hashes: list[bytes] = []
    previous = b""
    for start in range(0, len(data) - stride + 1, stride):
        previous = xxhash.xxh3_128_digest(previous + data[start : start + stride])
        hashes.append(previous)
    return hashes


class PagePool:
    """Pages 0 to `num_pages - 1`, each free, in use, or cached: unused, but findable by the hash of what it holds.

    All operations take constant time a page. Not locked: one thread only.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self._free = list(range(num_pages - 1, -1, -1))
        self._references = [0] * num_pages
        self._hash_of: dict[int, bytes] = {}
        self._page_of: dict[bytes, int] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()
        """Unused pages with a hash, the least recently used first."""
        self.on_freed: list[Callable[[], None]] = []
        """Called whenever pages came free."""
        self._reserved = 0

    @property
    def num_free(self) -> int:
        """Pages that `allocate` could give: free and cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def num_spare(self) -> int:
        """Free pages that prompts may take."""
        return self.num_free - self._reserved

    def reserve(self, count: int) -> None:
        """Have prompts leave so many free pages alone."""
        self._reserved, before = count, self._reserved
        if count < before:
            self._tell()

    @property
    def num_in_use(self) -> int:
        """Pages with at least one reference."""
        return self.num_pages - self.num_free

    def pages_for(self, tokens: int) -> int:
        """Pages that hold so many tokens."""
        return -(-tokens // self.page_size)

    def hashes(self, token_ids: Sequence[int]) -> list[bytes]:
        """The `page_hashes` of a prompt for pages of this size."""
        return page_hashes(token_ids, self.page_size)

    def allocate(self, count: int) -> list[int]:
        """Take `count` pages with one reference each, evicting cached ones as needed, in ascending order.

        Raises `OutOfPages`, taking none.
        """
        if count > self.num_free:
            raise OutOfPages(f"{count} pages wanted, {self.num_free} of {self.num_pages} are free")
        # Neighbours are moved as one piece by a handoff; an earlier prompt's pages come back last page first.
        pages = sorted(self._free.pop() if self._free else self._evict() for _ in range(count))
        for page in pages:
            self._references[page] = 1
        return pages

    def _evict(self) -> int:
        page, _ = self._cached.popitem(last=False)
        del self._page_of[self._hash_of.pop(page)]
        return page

    def share(self, pages: Iterable[int]) -> None:
        """Add one reference on each of these pages, which must be in use."""
        for page in pages:
            assert self._references[page] > 0, f"page {page} is not in use"
            self._references[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """Drop one reference on each. The last one frees a page, or leaves it cached where it was published.

        Later pages go first: of a cached prefix the end is evicted before the start, without which it can't be found.
        """
        free = self.num_free
        self.put_back(pages)
        if self.num_free > free:
            self._tell()

    def put_back(self, pages: Iterable[int]) -> None:
        """The same for pages that were just taken, and that nobody need be told of."""
        for page in reversed(list(pages)):
            assert self._references[page] > 0, f"page {page} is not in use"
            self._references[page] -= 1
            if self._references[page] == 0:
                if page in self._hash_of:
                    self._cached[page] = None
                else:
                    self._free.append(page)

    def _tell(self) -> None:
        for callback in self.on_freed:
            callback()

    def publish(self, page: int, page_hash: bytes) -> None:
        """Let a full page, which must be in use, be found by its hash. Nothing happens where the hash is known."""
        assert self._references[page] > 0, f"page {page} is not in use"
        if page_hash not in self._page_of and page not in self._hash_of:
            self._page_of[page_hash] = page
            self._hash_of[page] = page_hash

    def num_matching(self, hashes: Sequence[bytes]) -> int:
        """How many pages `match_prefix` would find."""
        return next((count for count, page_hash in enumerate(hashes) if page_hash not in self._page_of), len(hashes))

    def match_prefix(self, hashes: Sequence[bytes]) -> list[int]:
        """The pages of the longest known prefix, with one more reference each."""
        pages = []
        for page_hash in hashes:
            page = self._page_of.get(page_hash)
            if page is None:
                break
            if self._references[page] == 0:
                del self._cached[page]
            self._references[page] += 1
            pages.append(page)
        return pages

    def check_integrity(self) -> None:
        """Assert that every page is in exactly one state and that the hash maps mirror each other."""
        free, cached = set(self._free), set(self._cached)
        used = {page for page, references in enumerate(self._references) if references > 0}
        assert len(free) == len(self._free), "a page is free twice"
        assert len(free) + len(cached) + len(used) == self.num_pages, "a page is lost or in two states"
        assert free | cached | used == set(range(self.num_pages)), "a page is lost or in two states"
        assert all(references >= 0 for references in self._references), "a page has a negative reference count"
        assert cached <= set(self._hash_of), "a page is cached without a hash"
        assert {h: p for p, h in self._hash_of.items()} == self._page_of, "the hash maps differ"
