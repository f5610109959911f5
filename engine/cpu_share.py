"""How many threads an engine on a CPU may use just now.

Two processes that each run an OpenMP pool over all cores fall to a tenth of their speed, for every thread waits,
spinning, for one that is not running. So the engines of one machine share a file with one byte for each, set while it
has work, and each takes its part of the cores: all of them when it is alone.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from pathlib import Path

VARIABLE = "HEADRACE_CPU_SHARE"
"""`FILE:INDEX`: the shared file and this engine's byte in it. Without it, an engine takes itself to be alone."""


class CpuShare:
    """This engine's part of the cores. `adjust` belongs on the thread that computes; `rest` may be called anywhere."""

    def __init__(self, fixed_threads: int | None, use_threads: Callable[[int], None]) -> None:
        self._fixed = fixed_threads
        self._use_threads = use_threads
        self._cores = len(os.sched_getaffinity(0))
        self._flags = memoryview(bytearray(1))
        self._index = 0
        path, _, index = os.environ.get(VARIABLE, "").rpartition(":")
        if path:
            with Path(path).open("r+b") as file:
                self._flags = memoryview(mmap.mmap(file.fileno(), 0))
            self._index = int(index)
            self._flags[self._index] = 0
        self._threads = 0

    def adjust(self) -> None:
        """Say that this engine has work, and use as many threads as its part allows."""
        self._flags[self._index] = 1
        threads = self._fixed or max(self._cores // sum(self._flags), 1)
        if threads != self._threads:
            self._use_threads(threads)
            self._threads = threads

    def rest(self) -> None:
        """Say that this engine has nothing to do."""
        self._flags[self._index] = 0
