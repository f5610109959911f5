"""Which tokens a prefill step computes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from headrace.prefill.scheduler import Chunk, PrefillScheduler

PAGE = 4


def test_short_prompts_share_a_step() -> None:
    """First come, first served, as long as the budget lasts."""
    scheduler = PrefillScheduler(PAGE)
    scheduler.add(("a", 0), 5, 0)
    scheduler.add(("b", 0), 7, 4)
    assert scheduler.schedule(16) == [Chunk(("a", 0), 0, 5, True), Chunk(("b", 0), 4, 3, True)]
    assert scheduler.schedule(16) == []


def test_a_long_prompt_is_cut_at_page_boundaries() -> None:
    """What is left of the budget is rounded down to whole pages."""
    scheduler = PrefillScheduler(PAGE)
    scheduler.add(("a", 0), 6, 0)
    scheduler.add(("b", 0), 20, 0)
    assert scheduler.schedule(16)[1] == Chunk(("b", 0), 0, 8, False)
    assert scheduler.schedule(16) == [Chunk(("b", 0), 8, 12, True)]


def test_a_prompt_that_may_be_whole_is_not_cut() -> None:
    """It waits for a step of its own, which may have more than the budget; longer ones are cut there."""
    scheduler = PrefillScheduler(PAGE)
    for name, length in (("a", 6), ("b", 20), ("c", 30)):
        scheduler.add((name, 0), length, 0)
    assert scheduler.schedule(16, whole=24) == [Chunk(("a", 0), 0, 6, True)]
    assert scheduler.schedule(16, whole=24) == [Chunk(("b", 0), 0, 20, True)]
    assert scheduler.schedule(16, whole=24) == [Chunk(("c", 0), 0, 24, False)]
    assert scheduler.schedule(16, whole=24) == [Chunk(("c", 0), 24, 6, True)]


def test_a_budget_below_a_page_still_makes_progress() -> None:
    """A step computes one page at least."""
    scheduler = PrefillScheduler(PAGE)
    scheduler.add(("a", 0), 5, 0)
    assert [chunk.length for chunk in scheduler.schedule(1) + scheduler.schedule(1)] == [4, 1]


def test_a_removed_prompt_is_not_computed() -> None:
    """Removing is safe at any time, also of a prompt that is not there."""
    scheduler = PrefillScheduler(PAGE)
    scheduler.add(("a", 0), 20, 0)
    scheduler.add(("b", 0), 4, 0)
    scheduler.schedule(8)
    scheduler.remove(("a", 0))
    scheduler.remove(("a", 0))
    assert scheduler.schedule(8) == [Chunk(("b", 0), 0, 4, True)]


@given(st.integers(1, 40), st.lists(st.tuples(st.integers(1, 60), st.integers(0, 10)), max_size=8))
def test_every_token_is_computed_once_and_in_order(budget: int, prompts: list[tuple[int, int]]) -> None:
    """Chunks of a prompt follow each other, start at pages, keep to the budget and end with the only last one."""
    scheduler = PrefillScheduler(PAGE)
    computed: dict[str, int] = {}
    for number, (tokens, cached_pages) in enumerate(prompts):
        cached = min(cached_pages, (tokens - 1) // PAGE) * PAGE
        scheduler.add((str(number), 0), tokens, cached)
        computed[str(number)] = cached
    finished = []
    while chunks := scheduler.schedule(budget):
        assert sum(chunk.length for chunk in chunks) <= max(budget, PAGE)
        for chunk in chunks:
            name = chunk.key[0]
            assert chunk.start == computed[name]
            assert chunk.start % PAGE == 0
            computed[name] += chunk.length
            assert chunk.is_last == (computed[name] == prompts[int(name)][0])
            finished += [int(name)] if chunk.is_last else []
    assert finished == list(range(len(prompts)))
