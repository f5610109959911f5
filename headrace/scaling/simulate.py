"""`headrace simulate TRACE`: workers by tier over time, what they cost, and what clients would have seen."""

from __future__ import annotations

import argparse
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from headrace.scaling.policy import TIERS, Bounds, ScaledTier, Targets
from headrace.scaling.replay import Replay
from headrace.scaling.simulator import Simulation
from headrace.scaling.step_costs import StepCosts
from headrace.scaling.trace import read_trace

MOST_ROWS = 24
"""Changes of the number of workers that are printed."""


def simulate(options: argparse.Namespace) -> None:
    """Print the replay. Raises `SettingsError` where the trace or the costs can't be read."""
    trace, costs = read_trace(options.trace), StepCosts.read(options.step_costs)
    targets = Targets(options.ttft, options.itl)
    limits: dict[ScaledTier, tuple[int, int]] = {"prefill": options.prefill, "decode": options.decode}
    scales = any(least != most for least, most in limits.values())
    if options.colocate is not None:
        replay = Simulation(trace, costs, targets, options.colocate, options.colocate, colocated=True).run()
    else:
        bounds = {tier: Bounds(*limits[tier]) for tier in TIERS} if scales else None
        replay = Simulation(trace, costs, targets, options.prefill[0], options.decode[0], bounds).run()
    summary = summarize(replay, targets)
    if options.json:
        print(msgspec.json.format(msgspec.json.encode(summary)).decode())
    else:
        _print(summary, targets)


def summarize(replay: Replay, targets: Targets) -> dict[str, Any]:
    """What is printed, as JSON; times in seconds."""
    return {
        "requests": len(replay.served),
        "refused": replay.refused,
        "seconds": replay.seconds,
        "workers": [{"at": at, **workers} for at, workers in replay.workers],
        "worker_seconds": replay.worker_seconds,
        "ttft": replay.percentiles("ttft"),
        "itl": replay.percentiles("itl"),
        "attainment": replay.attainment(targets),
    }


def _print(summary: dict[str, Any], targets: Targets) -> None:
    console = Console(highlight=False)
    table = Table("from", *TIERS, title="workers", title_justify="left")
    changes = summary["workers"]
    for change in changes[:MOST_ROWS]:
        table.add_row(f"{change['at']:.0f} s", *(str(change[tier]) for tier in TIERS))
    console.print(table)
    if len(changes) > MOST_ROWS:
        console.print(f"and {len(changes) - MOST_ROWS} changes more (--json has all)")
    console.print(
        f"{summary['requests']} requests in {summary['seconds']:.0f} s, {summary['refused']} too long for any worker\n"
        f"cost: {summary['worker_seconds']:.0f} worker-seconds"
    )
    for name, label in (("ttft", "time to first token"), ("itl", "inter-token time")):
        if (found := summary[name]) is not None:
            console.print(f"{label}: " + ", ".join(f"p{p} {value * 1000:.1f} ms" for p, value in found.items()))
    console.print(
        f"{summary['attainment'] * 100:.1f} % of the requests within {targets.ttft * 1000:.0f} ms "
        f"and {targets.itl * 1000:.0f} ms a token"
    )
