"""Short runs of `make chaos`: real processes, real faults."""

from __future__ import annotations

from pathlib import Path

import pytest

from headrace.loadtest.chaos import Extent, chaos

EXTENT = Extent(requests=20, seconds=6.5, kinds=6, output_tokens=48, at_once=6, network_fault_seconds=1.5)


@pytest.mark.timeout(150)  # seven processes on however few cores there are
@pytest.mark.parametrize("series", ["redis", "network"])  # Redis' has the workers' faults, too
async def test_streams_outlive(series: str, tmp_path: Path) -> None:
    """Every text, end and `usage` is the undisturbed one, and no page is left in use."""
    findings = await chaos(series, EXTENT, 4, tmp_path)
    assert findings.errors == []
    assert (findings.duplicates, findings.gaps, findings.different) == (0, 0, 0)
    assert findings.leaked == {}
    assert findings.outcomes >= EXTENT.requests
    assert findings.faults.total() >= 2
    assert series != "network" or len(findings.faults) == 4
