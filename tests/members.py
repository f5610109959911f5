"""Members of a mesh, made up."""

from __future__ import annotations

from typing import Any

from headrace.registry import Member, Tier


def member(name: str, tier: Tier = "decode", epoch: int = 1, **fields: Any) -> Member:
    """One whose other fields say nothing."""
    blank = {"address": "", "version": "", "model": "", "model_fingerprint": "", "max_model_len": 4096}
    return Member(**{"id": name, "epoch": epoch, "tier": tier, **blank, **fields})
