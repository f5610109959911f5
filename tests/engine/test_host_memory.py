"""Memory that is faulted in beforehand."""

from __future__ import annotations

import torch

from headrace.engine.host_memory import Populating, keep_freed_memory


def test_populating_changes_nothing_that_is_written_meanwhile() -> None:
    """The kernel adds pages; what they hold is the program's."""
    keep_freed_memory()
    tensor = torch.zeros(8 * 2**20, dtype=torch.uint8)
    populating = Populating(tensor, delay=0)
    tensor[::4096] = 7
    populating._thread.join()
    assert torch.equal(tensor.view(-1, 4096)[:, 0], torch.full((2048,), 7, dtype=torch.uint8))
    assert int(tensor.sum()) == 7 * 2048


def test_populating_that_waits_ends_at_once_when_stopped() -> None:
    """A worker that stops need not wait for it."""
    populating = Populating(torch.zeros(1), delay=3600)
    populating.stop()
    assert not populating._thread.is_alive()
