"""Which prefill worker a prompt is passed on to: figures and hashes in, a worker out."""

from __future__ import annotations

from typing import Any

from headrace.engine.page_pool import page_hashes
from headrace.prefill.steering import Steering
from headrace.registry import Member
from tests.members import member

PAGE = 16
PROMPT = list(range(PAGE * 10))
HASHES = page_hashes(PROMPT, PAGE)


def _worker(name: str, *, draining: bool = False, waiting: float = 0.0) -> Member:
    return member(name, "prefill", draining=draining, stats={"prompt_tokens_waiting": waiting})


class _Registry:
    def __init__(self, *workers: Member) -> None:
        self.on_leave: list[Any] = []
        self.members = {worker.id: worker for worker in workers}


def _steering(*workers: Member) -> tuple[Steering, _Registry]:
    registry = _Registry(*workers)
    return Steering(registry, PAGE), registry  # type: ignore[arg-type]


def _heard(steering: Steering, registry: _Registry, name: str, hashes: list[bytes], waiting: int = 0) -> None:
    steering.heard(registry.members[name], hashes, waiting)


def _better(steering: Steering, held: int = 0, waiting: int = 0) -> str | None:
    worker = steering.better(HASHES, len(PROMPT), held, waiting)
    return worker.id if worker is not None else None


def test_a_prompt_goes_to_whoever_holds_more_of_it() -> None:
    """And stays where nobody does: what this worker holds itself it knows for sure."""
    steering, registry = _steering(_worker("a"), _worker("b"))
    assert _better(steering) is None
    _heard(steering, registry, "a", HASHES[:3])
    _heard(steering, registry, "b", page_hashes([*PROMPT[: PAGE * 5], *[9] * PAGE], PAGE)[3:])
    assert _better(steering) == "b"
    assert _better(steering, held=4) == "b"
    assert _better(steering, held=5) is None


def test_nothing_is_passed_on_to_the_busiest() -> None:
    """Its backlog may outweigh what this worker has to do by what the prefix saves, and no more; that is counted."""
    steering, registry = _steering(_worker("a"))
    _heard(steering, registry, "a", HASHES[:5], waiting=100 + PAGE * 5)
    assert _better(steering, waiting=100) == "a"
    assert _better(steering, waiting=99) is None
    registry.members["a"] = _worker("a", waiting=99 + PAGE * 5)  # the newest figures count
    assert _better(steering, waiting=99) == "a"
    assert steering.figures() == {"prompts_steered_total": 0, "prompts_not_steered_total": 1}


def test_what_was_passed_on_counts_until_the_next_figures_have_it() -> None:
    """So that a burst is not all sent to one worker before it can say how busy it is."""
    steering, registry = _steering(_worker("a"))
    _heard(steering, registry, "a", HASHES[:4])
    chosen = []
    for _ in range(3):
        if (worker := steering.better(HASHES, len(PROMPT), 0, 0)) is not None:
            steering.passed_on(worker, HASHES, len(PROMPT))
            chosen.append(worker.id)
    assert chosen == ["a"]  # six pages wait there then, and four would be saved
    registry.members["a"] = _worker("a")
    assert _better(steering) == "a"


def test_workers_that_leave_or_drain_get_nothing() -> None:
    """One that comes back under its name has nothing cached."""
    steering, registry = _steering(_worker("a"))
    _heard(steering, registry, "a", HASHES)
    registry.members["a"] = _worker("a", draining=True)
    assert _better(steering) is None
    registry.members["a"] = _worker("a")
    assert _better(steering) == "a"
    for callback in registry.on_leave:
        callback(registry.members["a"])
    assert _better(steering) is None
