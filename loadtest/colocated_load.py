"""A colocated mesh under Poisson arrivals of streaming requests: how late tokens are, and how many requests a second
are served in time.

Starts `headrace up --colocate` with random weights in the shape of Llama 3.1 8B, sends 1,024 tokens in and asks for
128 out at fixed rates, then looks for the highest rate at which 90 % of the requests see their first token within
200 ms and no gap of more than 20 ms. The load is that of `headrace loadtest`. Flags that are not this script's go to
`headrace up`.
"""

from __future__ import annotations

import argparse
import asyncio
import os
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
from headrace.loadtest.load.figures import Limits, Overhead, failures, numbers
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
    """(rate, requests)."""
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
    rates=((8.0, 160), (16.0, 320)),
    sweep_start=10.0,
    sweep_seconds=10.0,
    precision=0.05,
    flags=("--max-model-len", "2048", "--max-num-seqs", "128", "--max-num-prefills", "32"),
)
QUICK = Plan(
    config=TINY | {"vocab_size": 4096},
    tokens_in=64,
    tokens_out=16,
    rates=((4.0, 8), (8.0, 16)),
    sweep_start=8.0,
    sweep_seconds=1.0,
    precision=2.0,
    flags=("--device", "cpu", "--dtype", "float32"),
)
TARGETS = {("16 req/s", "first token p50"): "<= 56", ("16 req/s", "first token p99"): "<= 167"}
TARGETS |= {("16 req/s", "inter-token p99"): "<= 15"}


def figures_of(run: Run, plan: Plan) -> Iterator[Figure]:
    """The table of one rate."""
    name = f"{run.rate:g} req/s"
    measured = numbers(run, LIMITS)
    for what, ours in (("first token", "TTFT"), ("inter-token", "ITL")):
        for percentile in ("p50", "p99"):
            figure = f"{what} {percentile}"
            value = measured.get((f"{ours} {percentile}", "ms"))
            yield Figure(f"{name}, {figure}", value, "ms", TARGETS.get((name, figure), ""))
    incomplete = sum(bool(result.failure) or result.tokens != plan.tokens_out for result in run.results)
    for failure, count in failures([run]).most_common(5):
        print(f"{name}: {failure} ({count} times)", file=sys.stderr)
    yield Figure(f"{name}, failed", incomplete, f"of {run.planned}", "= 0")
    yield Figure(f"{name}, output", measured["output", "tokens/s"], "tokens/s")
    for figure_of_cost in Overhead.of([run]).figures():
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
        warm_up = (plan.rates[0][0], 16)
        for number, (rate, requests) in enumerate((warm_up, *plan.rates)):
            run = await crew.run(
                target, plan.workload.plan(rate, requests, number), Prompts(target, (number,)), rate=rate
            )
            if number:
                figures += figures_of(run, plan)
                print(*[f"{f.name}: {f.value} {f.unit}" for f in figures[-11:]], sep="\n", flush=True)
            await mesh.until_no_page_is_used(30)
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
