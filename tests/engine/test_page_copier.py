"""Pages of other caches arrive at their places, whatever waits in one go."""

from __future__ import annotations

import queue
import threading

import numpy as np
import pytest
import torch

from headrace.engine import page_copier
from headrace.engine.kv_cache import OpenedCache
from headrace.engine.page_copier import PageCopier, Part

PAGES, LAYERS, PAGE_BYTES = 4, 2, 16
BOTH = range(LAYERS)


def some_memory(rows: int) -> torch.Tensor:
    """Of a cache."""
    return torch.randint(256, (rows, PAGE_BYTES), dtype=torch.uint8)


def ask(opened: OpenedCache, blocks: list[int], layers: range, pages: list[int]) -> queue.SimpleQueue[Exception | None]:
    """Have blocks copied; the queue gets what went wrong."""
    answer: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()
    opened.copy(blocks, layers, pages, answer.put)
    return answer


def test_pages_of_several_layers_and_caches_arrive() -> None:
    """Each is told."""
    target = torch.zeros(LAYERS * PAGES, PAGE_BYTES, dtype=torch.uint8)
    copier = PageCopier(target)
    caches = [some_memory(6), some_memory(3)]
    first, second = (OpenedCache(memory, copier, PAGES) for memory in caches)
    answers = [ask(first, [5, 0, 4, 3], BOTH, [1, 2]), ask(second, [2], BOTH[1:], [0]), ask(first, [1], BOTH[1:], [3])]
    assert [answer.get(timeout=10) for answer in answers] == [None, None, None]
    copier.close()
    assert torch.equal(target[[1, 2, PAGES + 1, PAGES + 2, PAGES + 3]], caches[0][[5, 0, 4, 3, 1]])
    assert torch.equal(target[PAGES], caches[1][2])
    assert not target[[0, 3]].any()


def test_what_comes_while_a_copy_runs_is_copied_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """One launch for all of it; and no launch takes more than there is room for."""
    started, may_end = threading.Semaphore(0), threading.Semaphore(0)
    launches: list[int] = []

    def copy_blocks(source: torch.Tensor, target: torch.Tensor, moves: torch.Tensor) -> None:
        launches.append(len(moves))
        started.release()
        assert may_end.acquire(timeout=10)

    monkeypatch.setattr(page_copier, "copy_blocks", copy_blocks)
    monkeypatch.setattr(page_copier, "MAX_BLOCKS", 4)
    copier = PageCopier(torch.zeros(LAYERS * PAGES, PAGE_BYTES, dtype=torch.uint8))
    opened = OpenedCache(some_memory(4), copier, PAGES)
    first = ask(opened, [0], BOTH[:1], [0])
    assert started.acquire(timeout=10)
    later = [ask(opened, [1, 2], BOTH[layer : layer + 1], [1, 2]) for layer in (0, 1, 0)]
    may_end.release(3)
    assert [answer.get(timeout=10) for answer in (first, *later)] == [None] * 4
    assert launches == [1, 4, 2]
    copier.close()


def test_a_copy_that_fails_is_told_to_all_it_was_for_and_the_next_one_works() -> None:
    """A place that is not there, say."""
    target = torch.zeros(LAYERS * PAGES, PAGE_BYTES, dtype=torch.uint8)
    copier = PageCopier(target)
    opened = OpenedCache(some_memory(4), copier, PAGES)
    assert isinstance(ask(opened, [0], BOTH[:1], [PAGES * LAYERS]).get(timeout=10), IndexError)
    assert ask(opened, [0], BOTH[:1], [1]).get(timeout=10) is None
    copier.close()


def test_a_block_that_is_not_there_is_refused_at_once() -> None:
    """And nobody is told later."""
    copier = PageCopier(torch.zeros(LAYERS * PAGES, PAGE_BYTES, dtype=torch.uint8))
    opened = OpenedCache(some_memory(4), copier, PAGES)
    answer: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()
    with pytest.raises(ValueError, match="page 4 of 4"):
        opened.copy([3, 4], BOTH[:1], [0, 1], answer.put)
    copier.close()
    assert answer.empty()


def test_closing_copies_what_waits() -> None:
    """Then the thread is gone."""
    target = torch.zeros(LAYERS * PAGES, PAGE_BYTES, dtype=torch.uint8)
    copier = PageCopier(target)
    source = some_memory(4)
    for page in range(4):
        copier.submit(Part(source, np.array([[page, page]]), lambda error: None))
    copier.close()
    assert torch.equal(target[:4], source)
