"""Tokens that a device writes straight to the host's memory are waited for."""

from __future__ import annotations

import pytest
import torch

from headrace.engine.arriving import ArrivingTokens


class Event:
    """Stands for a device's event; what it was told, in order."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def record(self) -> None:
        self.told.append("record")

    def query(self) -> bool:
        return False

    def synchronize(self) -> None:
        self.told.append("synchronize")


@pytest.mark.parametrize("given", [False, True])
def test_pinned_memory_is_read_only_after_an_event(monkeypatch: pytest.MonkeyPatch, given: bool) -> None:
    """Whether the caller has an event or one is made."""
    events: list[Event] = []

    def made() -> Event:
        events.append(Event())
        return events[-1]

    monkeypatch.setattr(torch.cuda, "Event", made)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor: True)
    arriving = ArrivingTokens(torch.tensor([3, 5]), {}, is_copied=True, done=made() if given else None)
    assert not arriving.are_here
    assert arriving.wait() == [3, 5]
    assert [event.told for event in events] == [["record", "synchronize"]]


def test_a_cpu_has_them_at_once() -> None:
    """There is no event."""
    assert ArrivingTokens(torch.tensor([3]), {}).are_here
