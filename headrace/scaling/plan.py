"""`headrace plan TRACE`: how few workers meet the targets, with prefill split from decode and without.

Splitting is not always right: where prompts are short, or one worker has time for both, a worker that is both tiers
needs no handoff and leaves no device idle.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from headrace.scaling.policy import Targets
from headrace.scaling.replay import Replay
from headrace.scaling.simulator import Simulation
from headrace.scaling.step_costs import StepCosts
from headrace.scaling.trace import TraceRequest, read_trace


@dataclass(frozen=True)
class Fit:
    """Workers of a kind and what they attain, 0 to 1."""

    prefill: int
    decode: int
    attainment: float

    @property
    def workers(self) -> int:
        """All of them."""
        return self.prefill + self.decode


def plan(options: argparse.Namespace) -> None:
    """Print both and which is better. Raises `SettingsError`."""
    trace, costs = read_trace(options.trace), StepCosts.read(options.step_costs)
    targets = Targets(options.ttft, options.itl)
    together = smallest_colocated(trace, costs, targets, options.attainment, options.most)
    split = smallest_split(trace, costs, targets, options.attainment, options.most)
    print(_describe("both tiers in each worker", together, f"{together.workers if together else 0} workers"))
    print(_describe("split", split, f"{split.prefill} prefill and {split.decode} decode" if split else ""))
    print(advice(together, split, options.most))


def _describe(kind: str, fit: Fit | None, workers: str) -> str:
    if fit is None:
        return f"{kind}: not within the targets with any number of workers tried"
    return f"{kind}: {workers}, {fit.attainment * 100:.1f} % of the requests within the targets"


def advice(together: Fit | None, split: Fit | None, most: int) -> str:
    """One sentence."""
    if together is None and split is None:
        return (
            f"No number of workers up to {most} meets these targets: one worker alone is too slow for them, or the "
            "trace has more than that many can serve. Give looser targets, faster workers, or a larger --most."
        )
    if split is None or (together is not None and together.workers <= split.workers):
        assert together is not None
        return f"Don't split: {together.workers} x `headrace colocate` is enough."
    return f"Split: `headrace up --prefill {split.prefill} --decode {split.decode}`" + (
        f", {together.workers - split.workers} workers fewer." if together else ", for nothing else meets the targets."
    )


def smallest_colocated(
    trace: Sequence[TraceRequest], costs: StepCosts, targets: Targets, attainment: float, most: int
) -> Fit | None:
    """The fewest workers that are both tiers and attain it; None where `most` don't."""

    def attained(count: int) -> float:
        return _replay(trace, costs, targets, count, count, colocated=True).attainment(targets)

    count = _fewest(lambda count: attained(count) >= attainment, most)
    return None if count is None else Fit(count, 0, attained(count))


def smallest_split(
    trace: Sequence[TraceRequest], costs: StepCosts, targets: Targets, attainment: float, most: int
) -> Fit | None:
    """The fewest workers of two tiers that attain it; None where `most` in all don't.

    Each tier is first sized beside as many as may be of the other, which gives a bound; few have to be added.
    """

    def attained(prefill: int, decode: int) -> float:
        return _replay(trace, costs, targets, prefill, decode).attainment(targets)

    prefill = _fewest(lambda count: attained(count, most) >= attainment, most)
    decode = _fewest(lambda count: attained(most, count) >= attainment, most)
    if prefill is None or decode is None:
        return None
    for workers in range(prefill + decode, most + 1):
        fits = [
            Fit(p, workers - p, found)
            for p in range(prefill, workers - decode + 1)
            if (found := attained(p, workers - p)) >= attainment
        ]
        if fits:
            return max(fits, key=lambda fit: fit.attainment)
    return None


def _replay(
    trace: Sequence[TraceRequest],
    costs: StepCosts,
    targets: Targets,
    prefill: int,
    decode: int,
    colocated: bool = False,
) -> Replay:
    return Simulation(trace, costs, targets, prefill, decode, colocated=colocated).run()


def _fewest(suffices: Callable[[int], bool], most: int) -> int | None:
    """The smallest number that suffices, where all larger ones do, too; None where `most` does not."""
    if not suffices(most):
        return None
    low, high = 1, most
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if suffices(middle) else (middle + 1, high)
    return low
