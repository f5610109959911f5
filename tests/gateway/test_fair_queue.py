"""Who is next, for any mix of callers: nothing lost, order kept, shares by weight."""

from __future__ import annotations

from collections import defaultdict

from hypothesis import given
from hypothesis import strategies as st

from headrace.gateway.callers import Caller
from headrace.gateway.fair_queue import FairQueue

CALLERS = [
    Caller("a"),
    Caller("b", weight=3),
    Caller("c", weight=0.5),
    Caller("d", priority=2),
    Caller("e", priority=2),
]
Request = tuple[int, int, int, int]
"""(number, caller's index, tokens, priority)."""
requests = st.lists(st.tuples(st.sampled_from(range(5)), st.integers(1, 2000), st.integers(-2, 2)), max_size=60).map(
    lambda rows: [(number, *row) for number, row in enumerate(rows)]
)


def _filled(asked: list[Request]) -> FairQueue[Request]:
    queue: FairQueue[Request] = FairQueue()
    for request in asked:
        queue.push(request, CALLERS[request[1]], request[2], request[3])
    return queue


@given(requests, st.sets(st.integers(0, 59)))
def test_each_request_comes_once_and_a_caller_s_own_stay_in_order(asked: list[Request], gone: set[int]) -> None:
    """By priority, then by arrival; those taken out don't come."""
    queue = _filled(asked)
    for request in asked:
        assert queue.discard(request) if request[0] in gone else True
    left = [request for request in asked if request[0] not in gone]
    assert (len(queue), queue.tokens) == (len(left), sum(request[2] for request in left))
    came = [queue.pop()[0] for _ in left]
    assert sorted(came) == left
    assert (len(queue), queue.tokens) == (0, 0)
    for index in range(5):
        own = [request for request in came if request[1] == index]
        assert own == sorted(own, key=lambda request: (-request[3], request[0]))
    ranks = [CALLERS[request[1]].priority for request in came]
    assert ranks == sorted(ranks, reverse=True)


@given(requests)
def test_two_callers_that_both_wait_never_drift_apart(asked: list[Request]) -> None:
    """What each got, over its weight, differs by less than its own largest request and the other's."""
    queue = _filled(asked)
    left: dict[int, int] = defaultdict(int)
    largest: dict[int, int] = defaultdict(int)
    for _, index, tokens, _ in asked:
        left[index] += 1
        largest[index] = max(largest[index], tokens)
    got: dict[int, float] = defaultdict(float)
    while queue:
        (_, index, tokens, _), _ = queue.pop()
        got[index] += tokens / CALLERS[index].weight
        left[index] -= 1
        for one in left:
            for other in left:
                if left[one] and left[other] and CALLERS[one].priority == CALLERS[other].priority == 0:
                    bound = largest[one] / CALLERS[one].weight + largest[other] / CALLERS[other].weight
                    assert abs(got[one] - got[other]) <= bound + 1e-6


@given(requests, st.sampled_from(range(5)), st.integers(-2, 2))
def test_the_wait_foretold_is_the_wait_that_comes(asked: list[Request], index: int, priority: int) -> None:
    """As far as requests can't be cut: each other caller may be ahead by one request, or behind."""
    queue = _filled(asked)
    foretold = queue.ahead_of(CALLERS[index], priority)
    mine = (1000, index, 1, priority)
    queue.push(mine, CALLERS[index], 1, priority)
    ahead = 0
    while (popped := queue.pop())[0] != mine:
        ahead += popped[1]
    slack = sum(max((r[2] for r in asked if r[1] == other), default=0) for other in range(5) if other != index)
    own = max((r[2] for r in asked if r[1] == index), default=0) / CALLERS[index].weight
    slack += sum(own * CALLERS[other].weight for other in range(5))
    assert abs(ahead - foretold) <= slack + 1e-6


def test_a_thousand_requests_of_one_caller_don_t_delay_another() -> None:
    """Whoever comes later is next but one, and what it got elsewhere counts."""
    queue = _filled([(number, 0, 100, 0) for number in range(1000)])
    for _ in range(500):
        queue.pop()
    for number in range(2000, 2004):
        queue.push((number, 1, 100, 0), CALLERS[1], 100)
    assert queue.ahead_of(CALLERS[2]) <= 500
    assert sum(queue.pop()[0][1] == 1 for _ in range(6)) == 4
    queue.push((3000, 1, 100, 0), CALLERS[1], 100)
    queue.charge(CALLERS[1], 3000.0)
    assert all(queue.pop()[0][1] == 0 for _ in range(9))


def test_nobody_saves_up_while_away() -> None:
    """A caller that comes back has the share of the others, not what it did not use."""
    queue = _filled([(0, 0, 10, 0), *((number, 1, 300, 0) for number in range(1, 40))])
    for _ in range(20):
        queue.pop()
    for number in range(100, 120):
        queue.push((number, 0, 100, 0), CALLERS[0], 100)
    came = [queue.pop()[0][1] for _ in range(8)]
    assert 3 <= came.count(0) <= 5
