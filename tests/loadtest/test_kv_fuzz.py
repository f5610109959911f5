"""A short run of `make fuzz-kv`."""

from __future__ import annotations

from pathlib import Path

from headrace.loadtest.kv_fuzz import figures, fuzz


async def test_bad_messages_change_nothing(tmp_path: Path) -> None:
    """5,000 of them: each is refused and counted, and what is handed over meanwhile arrives byte for byte."""
    table = figures(await fuzz(5000, 7, tmp_path), 5000)
    assert [figure for figure in table if figure.met is False] == []
