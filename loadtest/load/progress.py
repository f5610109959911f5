"""What a person sees while the load runs."""

from __future__ import annotations

import statistics
import time
from collections import deque
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from headrace.loadtest.load.messages import Result

RECENT = 200


class RunProgress:
    """One run's line, live on a terminal; `on_result` and `on_tick` are called by the crew."""

    def __init__(self, console: Console, title: str, planned: int) -> None:
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[now]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._line = self._bar.add_task(title, total=planned, now="")
        self._recent: deque[Result] = deque(maxlen=RECENT)
        self._failed = 0
        self._last = (time.perf_counter(), 0)

    def on_result(self, result: Result) -> None:
        """One request is over."""
        if result.failure:
            self._failed += 1
        else:
            self._recent.append(result)
        self._bar.advance(self._line)

    def on_tick(self, running: int, pieces: int) -> None:
        """A generator reported."""
        now = time.perf_counter()
        before, had = self._last
        if now - before < 0.5:
            return
        self._last = (now, pieces)
        words = [f"{running} running", f"{(pieces - had) / (now - before):.0f} events/s"]
        if self._recent:
            words.append(f"TTFT p50 {statistics.median(result.ttft for result in self._recent) * 1000:.0f} ms")
        if self._failed:
            words.append(f"[red]{self._failed} failed[/red]")
        self._bar.update(self._line, now="  ".join(words))

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
