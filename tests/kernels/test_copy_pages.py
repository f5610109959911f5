"""Blocks are copied to their places, and nothing else changes."""

from __future__ import annotations

import torch

from headrace.kernels.copy_pages import copy_blocks


def test_blocks_arrive_at_their_places() -> None:
    """In any order."""
    source = torch.randint(256, (5, 24), dtype=torch.uint8)
    target = torch.zeros(4, 24, dtype=torch.uint8)
    copy_blocks(source, target, torch.tensor([[4, 1], [0, 3]]))
    assert torch.equal(target[[1, 3]], source[[4, 0]])
    assert not target[[0, 2]].any()
