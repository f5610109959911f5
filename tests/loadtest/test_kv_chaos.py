"""A short run of `make chaos-kv`."""

from __future__ import annotations

from pathlib import Path

from headrace.loadtest.kv_chaos import chaos, figures


async def test_killed_workers_leak_nothing_and_change_no_token(tmp_path: Path) -> None:
    """300 requests while workers of both tiers are killed and abort, and messages are lost and damaged."""
    table = figures(await chaos(300, 0.5, 3, tmp_path), 300)
    assert [figure for figure in table if figure.met is False] == []
