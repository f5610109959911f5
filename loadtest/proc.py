"""What Linux tells of a process in /proc."""

from __future__ import annotations

import os
from pathlib import Path

TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


def processor_seconds(pid: int) -> float:
    """Of all its threads so far, in user code and in the kernel."""
    fields = _stat(pid)
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_SECOND


def parent(pid: int) -> int:
    """Its parent's process id, 0 where it has ended."""
    try:
        return int(_stat(pid)[1])
    except OSError:
        return 0


def _stat(pid: int) -> list[str]:
    """The fields from the third on, which is the state."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
