"""Where a prompt is computed: measured times in, a worker out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from headrace.engine.page_pool import page_hashes
from headrace.engine.prompt_cost import PromptCost
from headrace.kvtransfer.handoff import HandoffFailed
from headrace.kvtransfer.placement import Placement
from headrace.kvtransfer.transfer_stats import TransferStats
from headrace.prefill.in_place import Backlog, InPlaceChoice
from headrace.registry import Member
from tests.members import member

PAGE = 16
PROMPT = list(range(100))
HASHES = page_hashes(PROMPT, PAGE)
IDLE = Backlog(0, [])
BASE, PER_TOKEN, EXPOSED = 0.01, 0.0001, 0.014


def _choice(**stats: float) -> InPlaceChoice:
    """A pass takes 10 ms and 0.1 ms a token, a handoff 14 ms more; there is one decode worker."""
    whole = {"kv_pages_total": 1000.0, "kv_page_tokens": float(PAGE), "in_place_most_tokens": 128.0, **stats}
    worker = member("d", stats=whole)

    class Registry:
        on_join: list[Any] = []
        on_leave: list[Any] = []

        def tier(self, tier: str) -> list[Member]:
            return [worker]

    sender = SimpleNamespace(stats=TransferStats(), deliver=None)
    sender.stats.exposed_mean = EXPOSED
    cost = PromptCost()
    for tokens in (10, 100, 500):
        cost.observe(tokens, BASE + PER_TOKEN * tokens)
    return InPlaceChoice(Placement(Registry()), sender, PAGE, cost)  # type: ignore[arg-type]


def _is_in_place(choice: InPlaceChoice, held: int = 0, backlog: Backlog = IDLE) -> bool:
    return choice.choose(HASHES, len(PROMPT), held, backlog) is not None


def test_an_idle_decode_worker_computes_what_a_handoff_would_cost_more() -> None:
    """Each stream that runs there waits for the whole pass, which soon outweighs it."""
    assert _is_in_place(_choice())
    assert not _is_in_place(_choice(requests_running=1.0))
    assert not _is_in_place(_choice(inter_token_seconds=0.02))
    assert not _is_in_place(_choice(in_place_tokens_waiting=100.0))


def test_a_backlog_here_sends_short_prompts_there() -> None:
    """What waits and what is left of the running pass count, and so do streams there, as many as it has."""
    for backlog in (Backlog(2000, []), Backlog(0, [(2000, 0.01)])):
        assert _is_in_place(_choice(requests_running=5.0), backlog=backlog)
        assert not _is_in_place(_choice(requests_running=50.0), backlog=backlog)
    assert not _is_in_place(_choice(requests_running=5.0), backlog=Backlog(0, [(2000, 0.2)]))


def test_what_either_holds_need_not_be_computed() -> None:
    """A prefix here speaks for here; one there makes a prompt short enough that would be too long."""
    assert not _is_in_place(_choice(), held=6)
    choice = _choice(in_place_most_tokens=60.0)
    assert not _is_in_place(choice)
    (worker,) = choice._placement._workers()
    choice._placement.place(worker, len(PROMPT), HASHES[:4])
    assert choice.choose(HASHES, len(PROMPT), 0, IDLE) == (worker, len(PROMPT) - 4 * PAGE)


async def test_what_is_under_way_there_counts_before_its_figures_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """A burst does not all go there; who would not is told of, and who fails, too."""
    choice = _choice()
    chosen = choice.choose(HASHES, len(PROMPT), 0, IDLE)
    assert chosen is not None
    handoff: Any = SimpleNamespace(refused={}, offer=SimpleNamespace(token_ids=PROMPT))

    async def deliver(handoff: Any, choose: Any) -> None:
        assert await choose(handoff) == "d"
        assert not _is_in_place(choice)

    monkeypatch.setattr(choice._sender, "deliver", deliver)
    assert await choice.have_computed(handoff, HASHES, *chosen)
    assert _is_in_place(choice)

    async def fail(handoff: Any, choose: Any) -> None:
        await choose(handoff)
        raise HandoffFailed("it is gone")

    monkeypatch.setattr(choice._sender, "deliver", fail)
    with pytest.raises(HandoffFailed, match="gone"):
        await choice.have_computed(handoff, HASHES, *chosen)
    handoff.refused["d"] = "full"
    assert not await choice.have_computed(handoff, HASHES, *chosen)
    assert _is_in_place(choice)


def test_the_decode_workers_own_measurements_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it has made none lately, or this worker has made none at all, that is so, too."""
    assert not _is_in_place(_choice(in_place_pass_seconds=0.05, in_place_token_seconds=0.0))
    assert not _is_in_place(_choice(in_place_most_tokens=0.0))
    choice = _choice()
    monkeypatch.setattr(choice, "_cost", PromptCost())
    assert not _is_in_place(choice)
