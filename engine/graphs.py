"""Captured device work, replayed at the price of one launch."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch


class Graphs:
    """CUDA graphs by key, in one pool of memory. On a CPU, where tests run the work, there is nothing to capture."""

    def __init__(self, device: torch.device) -> None:
        self.captures = device.type == "cuda"
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}

    def capture(self, key: Hashable, work: Callable[[], None]) -> None:
        """Run `work` once, which compiles what was not, and capture it. It must always do the same."""
        if not self.captures or key in self._graphs:
            return
        work()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        pool = next(iter(self._graphs.values())).pool() if self._graphs else None
        # a graph's kernels keep the priority of the stream that they were captured on
        with torch.cuda.graph(graph, pool=pool):
            work()
        self._graphs[key] = graph

    def drop(self, key: Hashable) -> None:
        """Forget a graph, if there is one: it won't run again."""
        self._graphs.pop(key, None)

    def run(self, key: Hashable, work: Callable[[], None]) -> None:
        """Start `work`, which is the same for each call with this key."""
        if not self.captures:
            work()
            return
        self.capture(key, work)
        self._graphs[key].replay()
