"""A whole load test: targets in turns, repeats, a search for the highest rate."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from rich.console import Console

from headrace.errors import StartError
from headrace.loadtest.load.arrivals import Workload
from headrace.loadtest.load.crew import Crew, Run
from headrace.loadtest.load.figures import Limits, failures
from headrace.loadtest.load.messages import Result
from headrace.loadtest.load.progress import RunProgress
from headrace.loadtest.load.prompts import Prompts
from headrace.loadtest.load.sweep import RateSearch
from headrace.loadtest.load.target import Target

LEAST_REQUESTS = 20
"""Of a run: with fewer, a share in time says little."""
REQUESTS_A_STREAM = 10
CONFIRMATIONS = 5
"""Rates, each lower, that are tried until the repeats say that one is served."""


@dataclass(frozen=True)
class Load:
    """How much, how long. One of `rate`, `concurrency` and `finds_rate` is set."""

    workload: Workload
    limits: Limits
    rate: float | None = None
    concurrency: int = 0
    requests: int | None = None
    seconds: float = 30.0
    """Of a run, where `requests` does not say how long it is."""
    warmup: int = 8
    repeats: int = 3
    shared_prefix: float = 0.0
    seed: int = 1
    precision: float = 0.05
    finds_rate: bool = False
    """Whether the highest rate in time is looked for; `rate` then is where the search begins."""

    def count(self, rate: float) -> int:
        """Requests of a run."""
        return self.requests or max(round(rate * self.seconds), LEAST_REQUESTS)


@dataclass
class Outcome:
    """All of one target: the runs that count, and those of the search."""

    target: Target
    runs: list[Run] = field(default_factory=list)
    searched: list[Run] = field(default_factory=list)
    highest_rate: float | None = None


class Session:
    """Runs one load against several targets. Lengths and times of requests are the same for all, prompts differ."""

    def __init__(self, crew: Crew, targets: Sequence[Target], load: Load, console: Console) -> None:
        self.outcomes = [Outcome(target) for target in targets]
        self._crew = crew
        self._load = load
        self._console = console
        self._runs = 0

    async def measure(self) -> None:
        """Warm up and repeat at the given rate or concurrency. Raises `StartError` where nothing at all is answered."""
        load = self._load
        for outcome in self.outcomes:
            await self._warm_up(outcome)
        for repeat in range(load.repeats):
            turns = self.outcomes if repeat % 2 == 0 else self.outcomes[::-1]  # so that a drift cancels out
            for outcome in turns:
                title = f"{outcome.target.name} {repeat + 1}/{load.repeats}"
                outcome.runs.append(await self._run(outcome, title, load.rate, load.concurrency, repeat))

    async def find_rates(self) -> None:
        """Look for each target's highest rate in time, in turns, and measure there."""
        searches: list[tuple[Outcome, RateSearch]] = []
        for outcome in self.outcomes:
            warm = await self._warm_up(outcome)
            alone = 1 / max(statistics.fmean(result.ended for result in warm), 0.001)
            # a server that mostly idles and is late all the same is late at any rate
            search = RateSearch(self._load.rate or alone, self._load.precision, least=alone / 4)
            searches.append((outcome, search))
        while looking := [pair for pair in searches if pair[1].rate is not None]:
            for outcome, search in looking:
                tried = len(outcome.searched)
                title = f"{outcome.target.name} search"
                run = await self._run(outcome, title, search.rate, 0, tried, may_cut_off=True)
                outcome.searched.append(run)
                search.tell(self._share(run) >= self._load.limits.share)
                if run.was_cut_off:
                    await self._warm_up(outcome)  # what was cancelled has ended when these have
        for outcome, search in searches:
            await self._confirm(outcome, search.served)

    async def _confirm(self, outcome: Outcome, rate: float) -> None:
        """One good run may be luck: the repeats decide, at ever larger steps down."""
        for attempt in range(1, CONFIRMATIONS + 1 if rate else 1):
            outcome.runs = []
            for repeat in range(self._load.repeats):
                title = f"{outcome.target.name} {repeat + 1}/{self._load.repeats}"
                outcome.runs.append(await self._run(outcome, title, rate, 0, repeat + 1))
            if statistics.fmean(self._share(run) for run in outcome.runs) >= self._load.limits.share:
                outcome.highest_rate = rate
                return
            rate /= (1 + self._load.precision) ** attempt
        outcome.highest_rate = 0.0

    def _share(self, run: Run) -> float:
        return self._load.limits.share_held(run.results, run.planned)

    async def _warm_up(self, outcome: Outcome) -> list[Result]:
        count = max(self._load.warmup, 1)
        run = await self._run(outcome, f"{outcome.target.name} warm-up", None, min(count, 4), 0, count=count)
        served = [result for result in run.results if not result.failure]
        if not served:
            why = ", ".join(f"{cause} ({count}x)" for cause, count in failures([run]).most_common(3))
            raise StartError(f"{outcome.target.name} answered no warm-up request: {why}")
        return served

    async def _run(
        self,
        outcome: Outcome,
        title: str,
        rate: float | None,
        concurrency: int,
        repeat: int,
        *,
        count: int | None = None,
        may_cut_off: bool = False,
    ) -> Run:
        load = self._load
        counts = count is None
        if count is None:
            count = load.count(rate) if rate is not None else load.requests or concurrency * REQUESTS_A_STREAM
        self._runs += 1
        plan = load.workload.plan(rate, count, load.seed + repeat)
        prompts = Prompts(outcome.target, (load.seed, self._runs), load.shared_prefix)
        allowed = count - load.limits.share * count
        with RunProgress(self._console, f"{title}{f' {rate:.2f}/s' if rate else ''}", count) as progress:
            run = await self._crew.run(
                outcome.target,
                plan,
                prompts,
                rate=rate,
                concurrency=concurrency,
                is_enough=_too_many(load.limits, allowed) if may_cut_off else lambda result: False,
                watcher=progress,
            )
        if counts:
            self._console.print(self._line(title, run), soft_wrap=True)
        return run

    def _line(self, title: str, run: Run) -> str:
        good = [result for result in run.results if not result.failure]
        words = [title, f"{run.rate:.2f} requests/s" if run.rate is not None else f"{run.concurrency} at once"]
        if good:
            words.append(f"TTFT p50 {statistics.median(result.ttft for result in good) * 1000:.0f} ms")
        words.append(f"{sum(result.tokens for result in good) / (run.seconds or 1):.0f} tokens/s")
        if self._load.limits.are_set:
            words.append(f"{self._share(run):.0%} in time" if not run.was_cut_off else "too few in time, cut off")
        if len(good) < len(run.results):
            words.append(f"[red]{len(run.results) - len(good)} failed[/red]")
        return "  ".join(words)


def _too_many(limits: Limits, allowed: float) -> Callable[[Result], bool]:
    """Whether more were late than may be."""
    late = 0

    def is_enough(result: Result) -> bool:
        nonlocal late
        late += not limits.hold(result)
        return late > allowed + 1e-9

    return is_enough
