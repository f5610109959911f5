"""Pages are conserved, whatever is done in whatever order."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from headrace.engine.page_pool import OutOfPages, PagePool, page_hashes


def test_hashes_cover_full_pages_only_and_all_tokens_before_them() -> None:
    """A change on one page changes its hash and all later ones."""
    hashes = page_hashes(range(11), 4)
    changed = page_hashes([0, 1, 2, 3, 99, 5, 6, 7, 8, 9, 10, 11], 4)
    assert [len(page_hash) for page_hash in hashes] == [16, 16]
    assert changed[0] == hashes[0]
    assert changed[1] != hashes[1]
    assert page_hashes([4, 5, 6, 7], 4)[0] != page_hashes(range(8), 4)[1]


def test_allocate_takes_all_or_nothing() -> None:
    """Three of four pages are in use; two more can't be had and the last one stays free."""
    pool = PagePool(4, 16)
    pool.allocate(3)
    with pytest.raises(OutOfPages):
        pool.allocate(2)
    assert (pool.num_free, pool.num_in_use) == (1, 3)


def test_pages_are_neighbours_again_after_they_were_used() -> None:
    """Whether they were given back or are evicted, the handoff moves them in one piece."""
    pool = PagePool(6, 4)
    for round_number in range(3):
        pages = pool.allocate(6)
        assert pages == list(range(6))
        for page, page_hash in zip(pages[:3], page_hashes([round_number] * 12, 4), strict=True):
            pool.publish(page, page_hash)
        pool.release(pages)


def test_a_published_page_is_found_after_its_release_until_its_room_is_needed() -> None:
    """Match, release, evict."""
    pool = PagePool(2, 4)
    hashes = page_hashes(range(8), 4)
    pages = pool.allocate(2)
    for page, page_hash in zip(pages, hashes, strict=True):
        pool.publish(page, page_hash)
    pool.release(pages)
    assert pool.match_prefix(hashes) == pages
    assert pool.num_free == 0
    pool.release(pages)
    pool.allocate(2)
    assert pool.match_prefix(hashes) == []
    pool.check_integrity()


def test_a_page_that_another_request_matched_is_not_evicted() -> None:
    """The least recently used page goes first, and none that is in use."""
    pool = PagePool(3, 4)
    hashes = page_hashes(range(12), 4)
    pages = pool.allocate(3)
    for page, page_hash in zip(pages, hashes, strict=True):
        pool.publish(page, page_hash)
    pool.release(pages)
    held = pool.match_prefix(hashes[:1])
    taken = pool.allocate(2)
    assert not set(held) & set(taken)
    with pytest.raises(OutOfPages):
        pool.allocate(1)


class PoolMachine(RuleBasedStateMachine):
    """Random requests, each with its list of pages, over a pool of eight."""

    requests: Bundle[tuple[int, ...]] = Bundle("requests")
    hashes = st.sampled_from(page_hashes(range(12), 2))

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(8, 2)
        self.references: dict[int, int] = {}

    def _take(self, pages: list[int]) -> tuple[int, ...]:
        for page in pages:
            self.references[page] = self.references.get(page, 0) + 1
        return tuple(pages)

    @rule(target=requests, count=st.integers(0, 9))
    def allocate(self, count: int) -> tuple[int, ...]:
        """All or nothing."""
        if count > self.pool.num_free:
            with pytest.raises(OutOfPages):
                self.pool.allocate(count)
            return ()
        pages = self.pool.allocate(count)
        assert len(set(pages)) == count
        assert all(page not in self.references for page in pages), "a page in use was given away"
        return self._take(pages)

    @rule(target=requests, pages=requests)
    def share(self, pages: tuple[int, ...]) -> tuple[int, ...]:
        """Only pages that are still held."""
        live = [page for page in pages if page in self.references]
        self.pool.share(live)
        return self._take(live)

    @rule(target=requests, wanted=st.lists(hashes, max_size=4))
    def match(self, wanted: list[bytes]) -> tuple[int, ...]:
        """Every match is a reference."""
        return self._take(self.pool.match_prefix(wanted))

    @rule(target=requests, pages=consumes(requests))
    def release(self, pages: tuple[int, ...]) -> object:
        """The request is gone."""
        live = [page for page in pages if page in self.references]
        self.pool.release(live)
        for page in live:
            self.references[page] -= 1
            if not self.references[page]:
                del self.references[page]
        return multiple()

    @rule(pages=requests, page_hash=hashes)
    def publish(self, pages: tuple[int, ...], page_hash: bytes) -> None:
        """The first page that is still held."""
        for page in pages:
            if page in self.references:
                self.pool.publish(page, page_hash)
                return

    @invariant()
    def conserved(self) -> None:
        """What is not held is free."""
        self.pool.check_integrity()
        assert self.pool.num_in_use == len(self.references)
        assert self.pool.num_free == 8 - len(self.references)


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
