"""Which worker holds the pages of which prompts, as far as can be told from outside."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

MAX_REMEMBERED_PAGES = 2**16


class PrefixHolders:
    """The worker that was last seen with each page, by the page's hash. The oldest are forgotten.

    A worker may have evicted a page meanwhile: that costs a guess, and whoever is asked knows better.
    """

    def __init__(self) -> None:
        self._holders: OrderedDict[bytes, str] = OrderedDict()

    def remember(self, worker: str, page_hashes: Sequence[bytes]) -> None:
        """`worker` has these pages now."""
        for page_hash in page_hashes:
            self._holders[page_hash] = worker
            self._holders.move_to_end(page_hash)
        while len(self._holders) > MAX_REMEMBERED_PAGES:
            self._holders.popitem(last=False)

    def longest(self, page_hashes: Sequence[bytes]) -> tuple[str | None, int]:
        """Who has the longest prefix of a prompt, and of how many pages; (None, 0) where nobody is known to."""
        for count in range(len(page_hashes), 0, -1):
            if (holder := self._holders.get(page_hashes[count - 1])) is not None:
                return holder, count
        return None, 0

    def forget(self, worker: str) -> None:
        """It left, and its pages with it."""
        self._holders = OrderedDict((page, holder) for page, holder in self._holders.items() if holder != worker)
