"""Which decode worker gets a request: figures in, a name out."""

from __future__ import annotations

import time
from collections import Counter
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from headrace.engine.page_pool import page_hashes
from headrace.kvtransfer import prefix_holders
from headrace.kvtransfer.handoff import HandoffFailed
from headrace.kvtransfer.placement import Placement
from headrace.registry import Member
from tests.members import member

PAGE = 16


class _Registry:
    """Decode workers whose figures tests change."""

    def __init__(self, **stats: dict[str, float]) -> None:
        self.on_join: list[Any] = []
        self.on_leave: list[Any] = []
        self.members = {name: _worker(name, **figures) for name, figures in stats.items()}

    def tier(self, tier: str) -> list[Member]:
        return list(self.members.values())


def _worker(name: str, **stats: float) -> Member:
    whole = {"kv_pages_total": 1000.0, "kv_page_tokens": float(PAGE), "max_num_seqs": 100.0, **stats}
    return member(name, stats=whole)


def _handoff(tokens: int = PAGE, refused: dict[str, str] | None = None) -> Any:
    return SimpleNamespace(offer=SimpleNamespace(token_ids=[1] * tokens), refused=refused or {})


async def _choose(registry: _Registry, *prompts: list[int], **options: Any) -> list[str]:
    chooser = Placement(registry, **options)  # type: ignore[arg-type]
    return [await chooser.choose(_handoff(len(prompt)), page_hashes(prompt, PAGE)) for prompt in prompts]


async def test_whatever_is_scarcest_counts() -> None:
    """Pages of one worker, places of the other."""
    pages, places = {"kv_pages_in_use": 500.0}, {"requests_running": 40.0, "requests_waiting": 5.0}
    assert await _choose(_Registry(a=pages, b=places), [1] * PAGE) == ["b"]
    assert await _choose(_Registry(a=pages, b=places | {"requests_waiting": 20.0}), [1] * PAGE) == ["a"]


async def test_a_burst_is_spread_before_the_figures_show_it() -> None:
    """Each choice counts at once."""
    chosen = Counter(await _choose(_Registry(a={}, b={}, c={}), *([n] * PAGE * 4 for n in range(30))))
    assert chosen == {"a": 10, "b": 10, "c": 10}


async def test_a_prefix_draws_requests_unless_its_worker_is_much_fuller(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenth of the room is what holding a whole prompt is worth."""
    prefix = list(range(PAGE * 10))
    registry = _Registry(a={}, b={"kv_pages_in_use": 30.0})
    chooser = Placement(registry)  # type: ignore[arg-type]

    async def choose(prompt: list[int]) -> str:
        return await chooser.choose(_handoff(len(prompt)), page_hashes(prompt, PAGE))

    assert await choose(prefix) == "a"
    registry.members["a"] = _worker("a", kv_pages_in_use=100.0)
    assert await choose([7] * PAGE * 10) == "b"
    assert await choose([*prefix, *[9] * PAGE]) == "a"
    registry.members["a"] = _worker("a", kv_pages_in_use=200.0)
    assert await choose([*prefix, *[8] * PAGE]) == "b"
    monkeypatch.setattr(time, "monotonic", lambda: 1e9)
    gone = registry.members.pop("b")
    for callback in registry.on_leave:
        callback(gone)
    assert await choose([*prefix, *[8] * PAGE]) == "a"


async def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest pages are forgotten."""
    monkeypatch.setattr(prefix_holders, "MAX_REMEMBERED_PAGES", 5)
    registry = _Registry(a={}, b={})
    chooser = Placement(registry)  # type: ignore[arg-type]
    for start in range(20):
        await chooser.choose(_handoff(), page_hashes([start] * PAGE * 3, PAGE))
    assert len(chooser._holders._holders) == 5


async def test_the_worker_beside_comes_first_and_who_refused_not_again() -> None:
    """Unless it is crowded; and where nobody will ever do, that is an error."""
    registry = _Registry(a={}, b={"kv_pages_in_use": 800.0})
    assert await _choose(registry, [1] * PAGE, beside="b") == ["b"]
    registry.members["b"] = _worker("b", kv_pages_in_use=950.0)
    assert await _choose(registry, [1] * PAGE, beside="b") == ["a"]
    chooser = Placement(registry)  # type: ignore[arg-type]
    assert await chooser.choose(_handoff(refused={"a": "full"})) == "b"
    with pytest.raises(HandoffFailed, match="too_long"):
        await chooser.choose(_handoff(refused={"a": "too_long", "b": "layout"}))
    registry.members["a"] = msgspec.structs.replace(registry.members["a"], draining=True)
    with pytest.raises(HandoffFailed):
        await chooser.choose(_handoff(refused={"b": "layout"}))


async def test_an_attempt_that_is_over_is_offered_to_nobody_else() -> None:
    """Its worker missed the Cancel, or the newer attempt; all others would refuse it as well, for ever."""
    chooser = Placement(_Registry(a={}, b={}))  # type: ignore[arg-type]
    with pytest.raises(HandoffFailed, match="over"):
        await chooser.choose(_handoff(refused={"a": "stale"}))
