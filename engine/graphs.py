"""Captured device work, replayed at the price of a launch or a few."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator

import torch

Work = Callable[[], Iterator[None] | None]
"""Always does the same. What is an iterator yields between its parts, each of which is a graph of its own."""


class Graphs:
    """CUDA graphs by key, in one pool of memory. On a CPU, where tests run the work, there is nothing to capture."""

    def __init__(self, device: torch.device) -> None:
        self._captures = device.type == "cuda"
        self._graphs: dict[Hashable, list[torch.cuda.CUDAGraph]] = {}

    def capture(self, key: Hashable, work: Work) -> None:
        """Run `work` once, which compiles what was not, and capture it."""
        if not self._captures or key in self._graphs:
            return
        for _ in _parts(work):
            pass
        torch.cuda.synchronize()
        pool = next(iter(self._graphs.values()))[0].pool() if self._graphs else None
        graphs = list[torch.cuda.CUDAGraph]()
        parts, is_complete = _parts(work), False
        while not is_complete:
            graphs.append(torch.cuda.CUDAGraph())
            # a graph's kernels keep the priority of the stream that they were captured on
            with torch.cuda.graph(graphs[-1], pool=pool or (graphs[0].pool() if len(graphs) > 1 else None)):
                is_complete = next(parts)
        self._graphs[key] = graphs

    def drop(self, key: Hashable) -> None:
        """Forget a graph, if there is one: it won't run again."""
        self._graphs.pop(key, None)

    def run(self, key: Hashable, work: Work, started: Callable[[], None] = lambda: None) -> None:
        """Start `work`, which is the same for each call with this key; `started` is called after each part."""
        if not self._captures:
            for _ in _parts(work):
                started()
            return
        self.capture(key, work)
        for graph in self._graphs[key]:
            graph.replay()
            started()


def _parts(work: Work) -> Iterator[bool]:
    """Go through the parts; true after the last one."""
    for _ in work() or ():
        yield False
    yield True
