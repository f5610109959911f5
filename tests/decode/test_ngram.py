"""Lookup drafts against a search through everything."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from headrace.decode.drafter import Draft
from headrace.decode.ngram import MAX_MATCH, MAX_PLACES, MAX_PROMPT_TOKENS, MIN_MATCH, NgramDrafter, NgramIndex


def brute_force(tokens: list[int], limit: int) -> Draft | None:
    """The definition: of the latest `MAX_PLACES` earlier ends of the last pair, the one with the longest match."""
    end = len(tokens)
    places = [at for at in range(end - 1, MIN_MATCH - 1, -1) if tokens[at - 2 : at] == tokens[end - 2 :]]
    best, longest = 0, 0
    for place in places[:MAX_PLACES]:
        matched = 0
        while matched < min(place, MAX_MATCH) and tokens[place - 1 - matched] == tokens[end - 1 - matched]:
            matched += 1
        if matched > longest:
            best, longest = place, matched
    if not best:
        return None
    text = list(tokens)
    for at in range(limit):
        text.append(text[best + at])
    return Draft(text[end:], range(longest, longest + limit))


@given(
    prompt=st.lists(st.integers(0, 3), max_size=60),
    output=st.lists(st.lists(st.integers(0, 3), max_size=6), max_size=12),
    limit=st.integers(1, 15),
)
def test_proposals_are_those_of_a_search_through_everything(
    prompt: list[int], output: list[list[int]], limit: int
) -> None:
    """After the prompt and after each step's tokens, of texts that repeat themselves a lot."""
    index = NgramIndex(prompt)
    tokens = list(prompt)
    assert index.propose(limit) == brute_force(tokens, limit)
    for step in output:
        index.extend(step)
        tokens += step
        assert index.propose(limit) == brute_force(tokens, limit)


def test_only_so_many_places_are_looked_at() -> None:
    """The long match is older than `MAX_PLACES` others, which follow each other with nothing in common."""
    far = [7, 8, 9, 1, 2, 100]
    near = [token for number in range(MAX_PLACES) for token in (1000 + number, 1, 2, 2000 + number)]
    for others in (MAX_PLACES - 1, MAX_PLACES):
        tokens = [*far, *near[: 4 * others], 7, 8, 9, 1, 2]
        draft = NgramIndex(tokens).propose(1)
        assert draft == brute_force(tokens, 1)
        assert draft is not None
        assert (draft.token_ids == [100]) == (others < MAX_PLACES)


def test_an_index_made_at_once_is_that_made_token_by_token() -> None:
    """2,000 tokens of 30 kinds."""
    generator = random.Random(1)
    tokens = [generator.randrange(30) for _ in range(2000)]
    grown = NgramIndex([])
    for at, token in enumerate(tokens):
        grown.extend([token])
        if at % 250 == 0:
            assert grown.propose(8) == NgramIndex(tokens[: at + 1]).propose(8)
    assert grown.propose(8) == NgramIndex(tokens).propose(8)


def test_a_loop_goes_on() -> None:
    """A copy that reaches its own start goes round."""
    assert NgramIndex([9, 1, 2, 3, 1, 2, 3]).propose(7) == Draft([1, 2, 3, 1, 2, 3, 1], range(3, 10))


def test_of_a_very_long_prompt_the_end_is_searched() -> None:
    """What the index holds is bounded."""
    start = [1, 2, 3, 4]
    rest = list(range(10, 10 + MAX_PROMPT_TOKENS - 2))
    assert NgramIndex([*start, *rest[:-2], 1, 2]).propose(1) is None
    assert NgramIndex([*start, *rest[4:-4], 1, 2]).propose(1) == Draft([3], range(2, 3))


def test_the_drafter_keeps_requests_apart() -> None:
    """Each has its own tokens and limit; no guess is no entry."""
    drafter = NgramDrafter()
    drafter.join(("a", 0), [1, 2, 3, 1])
    drafter.join(("b", 0), [1, 2, 4, 1, 2])
    drafter.join(("c", 0), [1, 2, 5, 1, 2])
    assert drafter.draft({("a", 0): 5, ("b", 0): 2, ("c", 0): 0}) == {("b", 0): Draft([4, 1], range(2, 4))}
    drafter.extend(("a", 0), [2])
    drafter.leave(("b", 0))
    assert drafter.draft({("a", 0): 1}) == {("a", 0): Draft([3], range(2, 3))}
