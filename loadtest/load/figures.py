"""From results to figures: percentiles, rates, what was in time, and how sure all that is."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from headrace.loadtest.load.crew import Run
from headrace.loadtest.load.messages import Result
from headrace.loadtest.report import Figure

PERCENTILES = (50, 90, 99)
T_95 = (
    12.71,
    4.30,
    3.18,
    2.78,
    2.57,
    2.45,
    2.36,
    2.31,
    2.26,
    2.23,
    2.20,
    2.18,
    2.16,
    2.14,
    2.13,
    2.12,
    2.11,
    2.10,
    2.09,
)
"""Student's t for 95 % in the middle, by degrees of freedom from 1 on."""
BUSY_SHARE = 0.75
"""Of a core, above which a generator is taken to slow what it measures."""
LATE_SECONDS = 0.005
"""99th percentile of lateness above which figures are not to be trusted."""
LATE_SHARE = 0.1
"""The same, as a share of the median gap between tokens: small gaps need small errors."""
LEAST_LATE_SECONDS = 0.001


@dataclass(frozen=True)
class Limits:
    """What a request must keep to be in time, in seconds; None is no limit."""

    ttft: float | None = None
    itl: float | None = None
    """Of each gap between two events with text."""
    tpot: float | None = None
    """Of the mean time a token after the first."""
    e2e: float | None = None
    share: float = 0.9
    """Of the requests that must be in time for a rate to count as served."""

    @property
    def are_set(self) -> bool:
        """Whether there is any."""
        return any(limit is not None for limit in (self.ttft, self.itl, self.tpot, self.e2e))

    def hold(self, result: Result) -> bool:
        """Whether a request was served in time; one that failed was not."""
        if result.failure:
            return False
        pairs = [(result.ttft, self.ttft), (result.e2e, self.e2e), (result.tpot, self.tpot)]
        pairs.append((max(result.gaps, default=0.0), self.itl))
        return all(limit is None or value is None or value <= limit for value, limit in pairs)

    def share_held(self, results: Sequence[Result], planned: int) -> float:
        """Of all that were to be sent."""
        return sum(self.hold(result) for result in results) / planned

    def describe(self) -> str:
        """As a person would say it."""
        names = {"TTFT": self.ttft, "each gap": self.itl, "TPOT": self.tpot, "end to end": self.e2e}
        return ", ".join(f"{name} <= {limit * 1000:g} ms" for name, limit in names.items() if limit is not None)


@dataclass(frozen=True)
class Estimate:
    """A mean over repeats; `spread` is half of its 95 % confidence interval, None after a single run."""

    value: float
    spread: float | None = None

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """From one value a repeat, by Student's t."""
        if len(values) < 2:
            return cls(values[0])
        t = T_95[len(values) - 2] if len(values) - 2 < len(T_95) else 1.96
        return cls(statistics.fmean(values), t * statistics.stdev(values) / math.sqrt(len(values)))

    @classmethod
    def ratio(cls, ours: Sequence[float], base: Sequence[float]) -> Estimate | None:
        """Of values taken in turns, pair by pair: their geometric mean."""
        pairs = [(a, b) for a, b in zip(ours, base, strict=True) if a > 0 and b > 0]
        if not pairs:
            return None
        logarithm = cls.of([math.log(a / b) for a, b in pairs])
        value = math.exp(logarithm.value)
        return cls(value, None if logarithm.spread is None else value * math.expm1(logarithm.spread))


@dataclass(frozen=True)
class Row:
    """One figure of all targets; a None was not measured. `ratios` are those to the first target."""

    name: str
    unit: str
    estimates: list[Estimate | None]
    ratios: list[Estimate | None]


def in_words(estimate: Estimate | None) -> str:
    """With as many digits as tell something."""
    if estimate is None:
        return "–"
    digits = max(0, 2 - math.floor(math.log10(abs(estimate.value)))) if estimate.value else 0
    text = f"{estimate.value:,.{min(digits, 3)}f}"
    return text if estimate.spread is None else f"{text} ± {estimate.spread:,.{min(digits, 3)}f}"


def numbers(run: Run, limits: Limits) -> dict[tuple[str, str], float]:
    """All figures of one run, by (name, unit)."""
    good = [result for result in run.results if not result.failure]
    seconds = run.seconds or 1.0
    samples = {
        "TTFT": [result.ttft for result in good],
        "ITL": [gap for result in good for gap in result.gaps],
        "TPOT": [tpot for result in good if (tpot := result.tpot) is not None],
        "end to end": [result.e2e for result in good],
    }
    figures: dict[tuple[str, str], float] = {
        ("requests", "1/s"): len(good) / seconds,
        ("output", "tokens/s"): sum(result.tokens for result in good) / seconds,
        ("input", "tokens/s"): sum(result.prompt_tokens or 0 for result in good) / seconds,
    }
    if limits.are_set:
        in_time = sum(limits.hold(result) for result in run.results)
        figures["goodput", "1/s"] = in_time / seconds
        figures["in time", "%"] = 100 * in_time / max(run.planned, 1)
    for name, values in samples.items():
        if values:
            figures[f"{name} mean", "ms"] = statistics.fmean(values) * 1000
            for percentile in PERCENTILES:
                figures[f"{name} p{percentile}", "ms"] = float(np.percentile(values, percentile)) * 1000
    figures["at once", "requests"] = sum(result.ended for result in run.results) / seconds
    figures["prompt", "tokens"] = statistics.fmean([result.prompt_tokens or 0 for result in good] or [0])
    figures["answer", "tokens"] = statistics.fmean([result.tokens for result in good] or [0])
    figures["failed", "%"] = 100 * (1 - len(good) / max(len(run.results), 1))
    return figures


def failures(runs: Sequence[Run]) -> Counter[str]:
    """How many requests failed, by cause."""
    return Counter(result.failure for run in runs for result in run.results if result.failure)


@dataclass(frozen=True)
class Overhead:
    """What making the load cost, over all runs; seconds and shares of a core."""

    cpu: float
    """Of the busiest generator process in its busiest run."""
    lag: float
    """99th percentile of how much later than asked an event loop woke."""
    late: float
    """99th percentile of how much later than planned a request left."""
    stamp: float
    """99th percentile of how long bytes waited for their time stamp."""
    stamp_limit: float
    """Above which that is too long for the gaps that were measured."""
    most_running: int
    """Requests at once in all processes together."""
    warnings: tuple[str, ...]

    @classmethod
    def of(cls, runs: Sequence[Run]) -> Overhead:
        """Of runs with at least one generator each."""
        cpu = max((done.cpu / done.wall for run in runs for done in run.generators if done.wall), default=0.0)
        lag = _p99([lag for run in runs for done in run.generators for lag in done.lags])
        late = _p99([result.late for run in runs for result in run.results])
        stamp = _p99([wait for run in runs for done in run.generators for wait in done.stamps])
        gaps = [gap for run in runs for result in run.results for gap in result.gaps]
        gap = statistics.median(gaps) if gaps else math.inf
        allowed = min(max(LATE_SHARE * gap, LEAST_LATE_SECONDS), LATE_SECONDS)
        warnings = []
        if cpu > BUSY_SHARE:
            warnings.append(f"a generator process used {cpu:.0%} of a core")
        if stamp > allowed:
            warnings.append(f"1 % of the bytes waited over {stamp * 1000:.1f} ms for their time stamp")
        if late > LATE_SECONDS:
            warnings.append(f"1 % of the requests left over {late * 1000:.1f} ms late")
        most = max((sum(done.most_running for done in run.generators) for run in runs), default=0)
        return cls(cpu, lag, late, stamp, allowed, most, tuple(warnings))

    @property
    def advice(self) -> str:
        """What to do where there are warnings."""
        if self.cpu > BUSY_SHARE:
            return "its core is full: more --processes share the work"
        return "its core is not full, so something else delays it: is this machine busy with other work, the server's?"

    def figures(self) -> list[Figure]:
        """For the table and the JSON file."""
        return [
            Figure("generator: busiest process", 100 * self.cpu, "% of a core", f"<= {100 * BUSY_SHARE:g}"),
            Figure("generator: loop lag p99", 1000 * self.lag, "ms"),
            Figure("generator: request left late p99", 1000 * self.late, "ms", f"<= {1000 * LATE_SECONDS:g}"),
            Figure(
                "generator: byte waited for its stamp p99", 1000 * self.stamp, "ms", f"<= {1000 * self.stamp_limit:.3g}"
            ),
            Figure("generator: streams at once, most", self.most_running, "requests"),
        ]


def _p99(values: Sequence[float]) -> float:
    return float(np.percentile(values, 99)) if values else 0.0
