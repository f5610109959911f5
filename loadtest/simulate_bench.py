"""`make bench-simulate`: what the simulator says of three traces beside what a local mesh does with them.

The mesh's step costs are measured first, through its own API and counters. Then each trace is replayed in real time.
The engines are synthetic, which leaves the machine to the mesh; without --quick the built-in model runs them, too.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from headrace.loadtest.local_mesh import LocalMesh, local_mesh
from headrace.loadtest.prompts import unique_tokens
from headrace.loadtest.report import Figure, conclude, machine
from headrace.loadtest.timed_stream import EACH_TOKEN, TimedStream, completion, timed_stream
from headrace.scaling.policy import Targets
from headrace.scaling.simulator import Simulation
from headrace.scaling.step_costs import Cost, Handoff, Limits, StepCosts
from headrace.scaling.trace import TraceRequest, read_trace

MODEL = "smollm2"
PROMPTS = (16, 128, 512)
ROWS = (1, 3, 8, 16)
SHORT, LONG = 16, 512
BUDGET = 512
"""Prompt tokens of a step, the default on a CPU."""
STEPS = 24
SETTLED_SECONDS, TIMEOUT_SECONDS = 1.2, 60.0
"""A registration, and with it what a gateway shows of a worker, is half a second behind."""
COUNTERS = (
    "prompts",
    "prefill_busy_seconds",
    "inter_token_steps",
    "inter_token_step_requests",
    "inter_token_step_seconds",
)
"""Of workers; without `headrace_` and `_total`."""
TARGET = "<= 15"


@dataclass(frozen=True)
class Case:
    """A mesh, and how much of it the traces ask for."""

    name: str
    flags: tuple[str, ...]
    prefill: int
    decode: int
    rate: float
    """Requests a second of the steady trace."""
    prompt_tokens: int
    """Median."""


SYNTHETIC = Case("synthetic", ("--load-format", "synthetic"), 2, 2, 7.0, 200)
BUILT_IN = Case("built-in model", ("--speculation", "off", "--cpu-threads", "1"), 1, 1, 0.8, 100)
SYNTHETIC_COSTS = StepCosts(
    machine="made up: like a small GPU's, ten times slower",
    prefill=Cost([(16, 0.02), (512, 0.2)], seconds_per_context=2e-7),
    decode=Cost([(1, 0.03), (64, 0.09)], seconds_per_context=1e-6),
)


def make_trace(kind: str, case: Case, seconds: float) -> list[dict[str, object]]:
    """Lines in Mooncake's layout. `steady`: at random; `bursty`: all in the first third of each 4 s; `long`: prompts
    of several chunks among short ones.
    """
    generator = random.Random(kind)
    lines: list[dict[str, object]] = []
    at = 0.0
    while True:
        at += generator.expovariate(case.rate / 2 if kind == "long" else case.rate)
        if at >= seconds:
            return lines
        when = at if kind != "bursty" else at // 4 * 4 + at % 4 / 3
        prompt = generator.lognormvariate(0, 0.5) * case.prompt_tokens
        if kind == "long" and generator.random() < 0.3:
            prompt *= 5
        output = min(int(generator.lognormvariate(0, 0.4) * 40) + 4, 120)
        length = min(max(int(prompt), 4), 1800)
        lines.append({"timestamp": when * 1000, "input_length": length, "output_length": output})


class Bench:
    """One running mesh."""

    def __init__(self, case: Case, mesh: LocalMesh, session: aiohttp.ClientSession) -> None:
        self._case = case
        self._mesh = mesh
        self._session = session
        self._counts: dict[str, dict[str, float]] = {}
        self._number = random.Random(case.name).randrange(10**6)

    def _new_prompt(self, length: int) -> list[int]:
        """One that nobody has seen."""
        self._number += 1
        return unique_tokens(length, self._number)

    async def _ask(self, prompt: Sequence[int], tokens: int) -> TimedStream:
        return await timed_stream(self._session, completion(MODEL, prompt, tokens) | EACH_TOKEN)

    async def _new_counts(self) -> dict[str, dict[str, float]]:
        """By how much each worker's counters have grown since the last call, by counter and worker, once they stand
        still.
        """
        found: dict[str, dict[str, float]] = {}
        async with asyncio.timeout(TIMEOUT_SECONDS):
            while True:
                last = found
                found = {name: await self._mesh.metrics(f"headrace_{name}_total") for name in COUNTERS}
                if found == last:
                    break
                await asyncio.sleep(SETTLED_SECONDS)
        before, self._counts = self._counts, found
        return {
            name: {worker: value - before.get(name, {}).get(worker, 0.0) for worker, value in values.items()}
            for name, values in found.items()
        }

    async def _prefill_seconds(self, lengths: Sequence[int]) -> tuple[float, list[float]]:
        """Seconds that a worker takes for one of these prompts on average, and their times to first token."""
        waits = [(await self._ask(self._new_prompt(length), 1)).ttft for length in lengths]
        counts = await self._new_counts()
        return sum(counts["prefill_busy_seconds"].values()) / sum(counts["prompts"].values()), waits

    async def measure_costs(self, rounds: int) -> StepCosts:
        """From the workers' own counters, by prompts and streams of known size."""
        await self._ask(self._new_prompt(SHORT), 4)
        await self._new_counts()
        chunks, overheads = {}, []
        for length in PROMPTS:
            chunks[length], waits = await self._prefill_seconds([length] * rounds)
            overheads.append(statistics.median(waits) - chunks[length])
        both, _ = await self._prefill_seconds([2 * BUDGET] * rounds)
        per_pair = max(both - 2 * chunks[BUDGET], 0.0) / BUDGET**2
        steps = [point for rows in ROWS for point in await self._steps(rows, SHORT)]
        line = _rising(steps, 0.0)
        far = [(s - line.seconds(round(r), 0)) / (r * (LONG - SHORT)) for r, s in await self._steps(4, LONG)]
        per_kv = max(statistics.mean(far), 0.0)
        pages = min((await self._mesh.metrics("headrace_kv_pages_total")).values())
        return StepCosts(
            machine=machine(),
            prefill=_rising([(n, s - per_pair * n * n / 2) for n, s in chunks.items()], per_pair),
            decode=_rising([(r, s - per_kv * r * (SHORT + STEPS / 2)) for r, s in steps], per_kv),
            handoff=Handoff(),  # small pages: it is in the overhead
            limits=Limits(pages=int(pages), max_num_batched_tokens=BUDGET),
            overhead_seconds=max(statistics.median(overheads), 0.0),
        )

    async def _steps(self, rows: int, context: int) -> list[tuple[float, float]]:
        """(rows, seconds) of each decode worker's steps, on average, beside about so many streams."""
        prompt = self._new_prompt(context)
        for _ in range(2 * self._case.prefill):  # all workers know it then, and the streams begin together
            await self._ask(prompt, 1)
        await asyncio.gather(*(self._ask(prompt, STEPS + rows) for _ in range(rows * self._case.decode)))
        steps, requests, seconds = (counts for name, counts in (await self._new_counts()).items() if "step" in name)
        return [
            (requests[worker] / taken, seconds[worker] / taken) for worker, taken in steps.items() if taken >= STEPS / 2
        ]

    async def replay(self, trace: Sequence[TraceRequest]) -> tuple[list[float], list[float]]:
        """Times to first token and mean inter-token times, as clients see them."""
        began = time.perf_counter()

        async def one(request: TraceRequest) -> tuple[float, float]:
            await asyncio.sleep(max(began + request.at - time.perf_counter(), 0.0))
            stream = await self._ask(self._new_prompt(request.prompt_tokens), request.output_tokens)
            return stream.ttft, (stream.event_times[-1] - stream.event_times[0]) / (request.output_tokens - 1)

        found = await asyncio.gather(*(one(request) for request in trace))
        return [ttft for ttft, _ in found], [itl for _, itl in found]


def _rising(measured: Sequence[tuple[float, float]], per_pair: float) -> Cost:
    """Points of rising size and time; those of one size become their mean."""
    by_size: dict[int, list[float]] = {}
    for size, seconds in measured:
        by_size.setdefault(round(size), []).append(seconds)
    points, least = [], 0.0
    for size, all_seconds in sorted(by_size.items()):
        least = max(least, statistics.mean(all_seconds))
        points.append((size, least))
    return Cost(points, per_pair)


async def compare(case: Case, folder: Path, seconds: float, rounds: int) -> list[Figure]:
    """One mesh, three traces."""
    flags = [*case.flags, "--prefill", str(case.prefill), "--decode", str(case.decode)]
    if "synthetic" in case.flags:
        SYNTHETIC_COSTS.write(folder / "costs.json")
        flags += ["--step-costs", str(folder / "costs.json")]
    connector, timeout = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=300)
    async with (
        local_mesh(*flags) as mesh,
        aiohttp.ClientSession(mesh.url, connector=connector, timeout=timeout) as session,
    ):
        bench = Bench(case, mesh, session)
        costs = await bench.measure_costs(rounds)
        print(costs, file=sys.stderr)
        figures: list[Figure] = []
        for kind in ("steady", "bursty", "long"):
            path = folder / f"{kind}.jsonl"
            path.write_text("\n".join(json.dumps(line) for line in make_trace(kind, case, seconds)))
            trace = read_trace(path)
            measured = await bench.replay(trace)
            replay = Simulation(trace, costs, Targets(0.5, 0.05), case.prefill, case.decode).run()
            predicted = [s.ttft or 0.0 for s in replay.served], [s.itl or 0.0 for s in replay.served]
            figures += _figures(f"{case.name}, {kind}", len(trace), measured, predicted)
        return figures


def _figures(
    name: str, count: int, measured: tuple[list[float], list[float]], predicted: tuple[list[float], list[float]]
) -> list[Figure]:
    figures = [Figure(f"{name}: requests", count, "requests")]
    for label, real, said in zip(("time to first token", "inter-token time"), measured, predicted, strict=True):
        for statistic, of in (
            ("mean", statistics.mean),
            ("p90", lambda values: statistics.quantiles(values, n=10)[-1]),
        ):
            is_, was_said = of(real), of(said)
            figures += [
                Figure(f"{name}: {label}, {statistic}, measured", is_ * 1000, "ms"),
                Figure(f"{name}: {label}, {statistic}, predicted", was_said * 1000, "ms"),
                Figure(f"{name}: {label}, {statistic}, off by", abs(was_said / is_ - 1) * 100, "%", TARGET),
            ]
    return figures


async def bench(quick: bool) -> list[Figure]:
    """All figures."""
    with tempfile.TemporaryDirectory() as folder:
        if quick:
            return await compare(SYNTHETIC, Path(folder), 5.0, 2)
        figures = await compare(SYNTHETIC, Path(folder), 40.0, 5)
        return figures + await compare(BUILT_IN, Path(folder), 40.0, 5)


def main() -> None:
    """Run, print, write; exit with 1 where a target was missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the synthetic engine alone, and short traces")
    figures = asyncio.run(bench(parser.parse_args().quick))
    conclude("simulate", figures)


if __name__ == "__main__":
    main()
