"""A colocated mesh under Poisson arrivals of streaming requests: how late tokens are, and how many requests a second
are served in time.

Starts `headrace up --colocate` with random weights in the shape of Llama 3.1 8B, sends 1,024 tokens in and asks for
128 out at fixed rates, then looks for the highest rate at which 90 % of the requests see their first token within
200 ms and no gap of more than 20 ms. Each rate is run several times, each time with other arrivals; figures are the
medians of these runs. The load is that of `headrace loadtest`. Flags that are not this script's go to `headrace up`.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvloop
from rich.console import Console

from headrace.loadtest.load.arrivals import Lengths, Workload
from headrace.loadtest.load.crew import Run, start_crew
from headrace.loadtest.load.figures import Estimate, Limits, Overhead, failures, numbers
from headrace.loadtest.load.prompts import Prompts
from headrace.loadtest.load.session import Load, Session
from headrace.loadtest.load.target import find_target
from headrace.loadtest.local_mesh import local_mesh
from headrace.loadtest.report import Figure, publish
from headrace.loadtest.shapes import LLAMA_8B, TINY, servable_folder

REQUEST_SECONDS = 60.0
LIMITS = Limits(ttft=0.2, itl=0.02, share=0.9)


@dataclass(frozen=True)
class Plan:
    """What is sent. Rates are requests a second."""

    config: dict[str, Any]
    tokens_in: int
    tokens_out: int
    rates: tuple[tuple[float, int], ...]
    """(rate, requests of a run)."""
    repeats: int
    """Runs a rate."""
    sweep_start: float
    sweep_seconds: float
    precision: float
    flags: tuple[str, ...] = ()

    @property
    def workload(self) -> Workload:
        """Poisson arrivals of requests that are all as long."""
        return Workload(Lengths.parse(str(self.tokens_in)), Lengths.parse(str(self.tokens_out)))


FULL = Plan(
    config=LLAMA_8B,
    tokens_in=1024,
    tokens_out=128,
    rates=((8.0, 64), (16.0, 320)),
    repeats=3,
    sweep_start=20.0,
    sweep_seconds=8.0,
    precision=0.2,
    flags=("--max-model-len", "2048", "--max-num-seqs", "128", "--max-num-prefills", "32"),
)
QUICK = Plan(
    config=TINY | {"vocab_size": 4096},
    tokens_in=64,
    tokens_out=16,
    rates=((4.0, 8), (8.0, 16)),
    repeats=2,
    sweep_start=8.0,
    sweep_seconds=1.0,
    precision=2.0,
    flags=("--device", "cpu", "--dtype", "float32"),
)
TARGETS = {("16 req/s", "first token p50"): "<= 56", ("16 req/s", "first token p99"): "<= 167"}
TARGETS |= {("16 req/s", "inter-token p99"): "<= 15"}


def figures_of(runs: Sequence[Run], plan: Plan) -> Iterator[Figure]:
    """The table of one rate: medians of its runs."""
    name = f"{runs[0].rate:g} req/s"
    measured = [numbers(run, LIMITS) for run in runs]

    def figure(what: str, key: tuple[str, str]) -> Figure:
        values = [of_run[key] for of_run in measured if key in of_run]
        value, spread = (statistics.median(values), Estimate.of(values).spread) if values else (None, None)
        return Figure(f"{name}, {what}", value, key[1], TARGETS.get((name, what), ""), spread=spread)

    for what, ours in (("first token", "TTFT"), ("inter-token", "ITL")):
        for percentile in ("p50", "p99"):
            yield figure(f"{what} {percentile}", (f"{ours} {percentile}", "ms"))
    yield figure("in time", ("in time", "%"))
    yield figure("output", ("output", "tokens/s"))
    incomplete = sum(bool(result.failure) or result.tokens != plan.tokens_out for run in runs for result in run.results)
    for failure, count in failures(runs).most_common(5):
        print(f"{name}: {failure} ({count} times)", file=sys.stderr)
    yield Figure(f"{name}, failed", incomplete, f"of {sum(run.planned for run in runs)}", "= 0")
    for figure_of_cost in Overhead.of(runs).figures():
        yield Figure(f"{name}, {figure_of_cost.name}", figure_of_cost.value, figure_of_cost.unit)


async def measure(plan: Plan, flags: Sequence[str], folder: Path) -> list[Figure]:
    """Start the mesh, send, stop it."""
    model = await asyncio.to_thread(servable_folder, plan.config, folder / "random")
    started = time.perf_counter()
    figures: list[Figure] = []
    mesh_flags = ("--colocate", "--model", str(model), "--load-format", "dummy", *plan.flags, *flags)
    async with local_mesh(*mesh_flags) as mesh, start_crew(1, REQUEST_SECONDS) as crew:
        figures.append(Figure("start", time.perf_counter() - started, "s"))
        target = await find_target(mesh.url, model.name, None, "completions", {})

        async def one_run(rate: float, requests: int, seed: int) -> Run:
            prompts = Prompts(target, (round(rate), seed))
            done = await crew.run(target, plan.workload.plan(rate, requests, seed), prompts, rate=rate)
            await mesh.until_no_page_is_used(30)
            return done

        await one_run(plan.rates[0][0], 16, 0)
        for rate, requests in plan.rates:
            runs = [await one_run(rate, requests, seed) for seed in range(1, plan.repeats + 1)]
            figures += figures_of(runs, plan)
            for run in runs:
                words = [f"{name} {value:.1f} {unit}" for (name, unit), value in numbers(run, LIMITS).items()]
                print(f"{rate:g} req/s", *words, sep="; ", flush=True)
        load = Load(
            plan.workload,
            LIMITS,
            rate=plan.sweep_start,
            seconds=plan.sweep_seconds,
            repeats=1,
            precision=plan.precision,
            finds_rate=True,
        )
        session = Session(crew, [target], load, Console())
        await session.find_rates()
        (outcome,) = session.outcomes
    for number, run in enumerate(outcome.searched, 1):
        share = LIMITS.share_held(run.results, run.planned)
        figures.append(Figure(f"sweep run {number}, {run.rate:.2f} req/s", share, "in time"))
    figures.append(Figure(f"highest rate with {LIMITS.share:.0%} in time", outcome.highest_rate, "req/s"))
    return figures


def _card() -> str | None:
    """The GPU's name."""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def main() -> None:
    """Measure and publish."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model on the CPU: does it run at all?")
    parser.add_argument("--redis-server", type=Path, metavar="FILE", help="server to start if none is installed")
    options, flags = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.redis_server is not None:
            (Path(folder) / "redis-server").symlink_to(options.redis_server.resolve(strict=True))
            os.environ["PATH"] = f"{folder}:{os.environ['PATH']}"
        figures = uvloop.run(measure(QUICK if options.quick else FULL, flags, Path(folder)))
    publish("colocated-quick" if options.quick else "colocated", figures, card=None if options.quick else _card())


if __name__ == "__main__":
    main()
