"""`headrace loadtest` against guidellm, on the same server under the same load, in turns; and what its generator alone
sustains.

The server is a stand-in with known timings, which also says what it really did, and then a mesh around synthetic
engines. guidellm lives in an environment of its own: `--peers` names its Python.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import uvloop

from headrace.loadtest.load.arrivals import Lengths, Planned, Workload
from headrace.loadtest.load.crew import Crew, Run, start_crew
from headrace.loadtest.load.figures import Limits, Overhead, numbers
from headrace.loadtest.load.prompts import Prompts
from headrace.loadtest.load.target import Target, find_target
from headrace.loadtest.local_mesh import local_mesh
from headrace.loadtest.mesh_scale import COSTS
from headrace.loadtest.report import Figure, conclude
from headrace.processes import end_process

WITHIN = "<= 5"
RAMP_SECONDS = 2.5
"""In which many streams begin: at once, they would all be due at once, again and again."""
PEER_SECONDS = 300.0
SHARED = {
    ("requests", "1/s"): ("requests_per_second", "mean"),
    ("output", "tokens/s"): ("output_tokens_per_second", "mean"),
    ("TTFT mean", "ms"): ("time_to_first_token_ms", "mean"),
    ("TTFT p50", "ms"): ("time_to_first_token_ms", "p50"),
    ("TTFT p90", "ms"): ("time_to_first_token_ms", "p90"),
    ("TPOT mean", "ms"): ("inter_token_latency_ms", "mean"),
    ("TPOT p50", "ms"): ("inter_token_latency_ms", "p50"),
    ("TPOT p90", "ms"): ("inter_token_latency_ms", "p90"),
    ("end to end mean", "ms"): ("request_latency", "mean"),
    ("end to end p50", "ms"): ("request_latency", "p50"),
    ("end to end p90", "ms"): ("request_latency", "p90"),
    ("at once", "requests"): ("request_concurrency", "mean"),
    ("prompt", "tokens"): ("prompt_token_count", "mean"),
    ("answer", "tokens"): ("output_token_count", "mean"),
}
"""Our figures and guidellm's names of the same ones."""


@dataclass(frozen=True)
class Job:
    """One load. With `rate`, requests leave at even distances; otherwise `concurrency` of them run at once."""

    name: str
    requests: int
    prompt: int
    output: int
    rate: float | None = None
    concurrency: int = 0

    def profile(self) -> str:
        """As guidellm calls it."""
        return f"kind=constant,rate={self.rate}" if self.rate else f"kind=concurrent,streams={self.concurrency}"

    def plan(self) -> list[Planned]:
        """As we call it."""
        lengths = Lengths.parse(str(self.prompt)), Lengths.parse(str(self.output))
        return Workload(*lengths, burstiness=float("inf")).plan(self.rate, self.requests, 1)


QUICK = (Job("8 req/s", 64, 100, 40, rate=8.0),)
# guidellm takes some 20 to 30 ms from one answer to the next request: in a closed loop that is less load, so answers
# are long there
PACED = (Job("10 req/s", 160, 100, 40, rate=10.0), Job("8 streams", 160, 100, 60, concurrency=8))
MESH = (Job("mesh, 8 streams", 160, 100, 60, concurrency=8),)


@asynccontextmanager
async def paced_process(first: float, gap: float) -> AsyncIterator[str]:
    """The stand-in in a process of its own; yields its URL."""
    command = ["-m", "headrace.loadtest.paced_server", "--first", str(first), "--gap", str(gap)]
    process = await asyncio.create_subprocess_exec(sys.executable, *command, stdout=asyncio.subprocess.PIPE)
    try:
        assert process.stdout is not None
        yield (await process.stdout.readline()).decode().strip()
    finally:
        await end_process(process, signal.SIGTERM, 10)


async def ours(crew: Crew, target: Target, job: Job, salt: int) -> Run:
    """One run of our own; raises `RuntimeError` where a request fails."""
    run = await crew.run(target, job.plan(), Prompts(target, (salt,)), rate=job.rate, concurrency=job.concurrency)
    failed = {result.failure for result in run.results if result.failure}
    if failed:
        raise RuntimeError(f"{job.name}: {failed}")
    return run


async def theirs(python: Path, target: Target, job: Job, salt: int) -> dict[str, Any]:
    """Metrics of guidellm under the same load; raises `RuntimeError` with what it said."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prompts = Prompts(target, (salt,))
        with (folder / "prompts.jsonl").open("w") as file:
            for number, planned in enumerate(job.plan()):
                text = json.loads(prompts.body(number, planned))["messages"][0]["content"]
                file.write(json.dumps({"prompt": text, "output_tokens_count": job.output}) + "\n")
        backend = f"kind=openai_http,target={target.url},model={target.model},validate_backend=false,http2=false"
        flags = ["--backend", f"{backend},request_format=/v1/chat/completions", "--profile", job.profile()]
        flags += ["--constraint", f"kind=max_requests,count={job.requests}", "--disable-console"]
        flags += ["--data", f"kind=json_file,path={folder / 'prompts.jsonl'}"]
        flags += ["--output", f"kind=json,path={folder / 'report.json'}"]
        process = await asyncio.create_subprocess_exec(
            *(str(python), "-m", "guidellm", "run", *flags),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            cwd=folder,
        )
        async with asyncio.timeout(PEER_SECONDS):
            said, _ = await process.communicate()
        try:
            report = json.loads((folder / "report.json").read_text())
        except (OSError, ValueError) as error:
            raise RuntimeError(f"guidellm: {said.decode(errors='replace')[-2000:]}") from error
    metrics: dict[str, Any] = report["benchmarks"][0]["metrics"]
    totals = metrics["request_totals"]
    # as it stops guidellm now and then leaves its last request out of all its counts
    if totals["errored"] or totals["successful"] < job.requests - 1:
        raise RuntimeError(f"guidellm, {job.name}: {totals}")
    return metrics


def _theirs(metrics: dict[str, Any], name: str, what: str) -> float:
    numbers = metrics[name]["successful"]
    value = float(numbers["mean"] if what == "mean" else numbers["percentiles"][what])
    return value * 1000 if name == "request_latency" else value  # the only one in seconds


async def compare(crew: Crew, url: str, peers: Path | None, job: Job, rounds: int) -> list[Figure]:
    """Medians over rounds of both, and how far apart they are."""
    target = await find_target(url, None, None, "chat", {})
    pairs: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    await ours(crew, target, job, 0)  # warms the server up
    for number in range(rounds):
        run = numbers(await ours(crew, target, job, 1 + 2 * number), Limits())
        if peers is None:
            return [
                Figure(f"{job.name}, {key[0]}: apart", None, "%", WITHIN, "no --peers with guidellm") for key in SHARED
            ]
        metrics = await theirs(peers, target, job, 2 + 2 * number)
        for key, their_name in SHARED.items():
            pairs[key].append((run[key], _theirs(metrics, *their_name)))
    figures = []
    for (name, unit), values in pairs.items():
        mine, other = (statistics.median(column) for column in zip(*values, strict=True))
        apart = statistics.median(abs(a / b - 1) * 100 for a, b in values)
        figures += [
            Figure(f"{job.name}, {name}: ours", mine, unit),
            Figure(f"{job.name}, {name}: guidellm", other, unit),
            Figure(f"{job.name}, {name}: apart", apart, "%", WITHIN),
        ]
    return figures


async def against_truth(crew: Crew, url: str, job: Job) -> list[Figure]:
    """Our figures against what the stand-in says that it did."""
    target = await find_target(url, None, None, "auto", {})
    async with aiohttp.ClientSession() as session:
        await (await session.get(f"{url}/served")).read()
        figures = numbers(await ours(crew, target, job, 99), Limits())
        async with session.get(f"{url}/served") as response:
            served: list[list[float]] = await response.json()
    truth = {
        "TTFT mean": statistics.fmean(times[0] for times in served),
        "TPOT mean": statistics.fmean((times[-1] - times[0]) / (len(times) - 1) for times in served),
        "end to end mean": statistics.fmean(times[-1] for times in served),
    }
    return [
        Figure(
            f"{job.name}, {name}: off the server's own",
            abs(figures[name, "ms"] / 1000 / seconds - 1) * 100,
            "%",
            WITHIN,
        )
        for name, seconds in truth.items()
    ]


async def many_streams(streams: int, tokens: int, gap: float) -> list[Figure]:
    """The generator alone, in one process, with a server in another."""
    async with paced_process(1.0, gap) as url, start_crew(1, 120.0) as crew:
        target = await find_target(url, None, None, "auto", {})
        job = Job("", streams, 8, tokens, rate=streams / RAMP_SECONDS)
        run = await ours(crew, target, job, 1)
    name = f"{streams} streams at once"
    return [
        Figure(f"{name}: reached", run.generators[0].most_running, "streams", f">= {streams}"),
        Figure(f"{name}: events", sum(len(result.times) for result in run.results) / run.seconds, "1/s"),
        *(Figure(f"{name}, {f.name}", f.value, f.unit) for f in Overhead.of([run]).figures()[:4]),
    ]


async def measure(quick: bool, peers: Path | None) -> list[Figure]:
    """All figures."""
    figures: list[Figure] = []
    jobs = QUICK if quick else PACED
    async with start_crew(1, 120.0) as crew:
        async with paced_process(0.1, 0.02) as url:
            for job in jobs:
                figures += await against_truth(crew, url, job)
                figures += await compare(crew, url, peers, job, 1 if quick else 3)
        if not quick:
            # guidellm's processes would slow a model beside them on few cores
            async with local_mesh("--load-format", "synthetic", "--step-costs", str(COSTS)) as mesh:
                for job in MESH:
                    figures += await compare(crew, mesh.url, peers, job, 3)
    return figures + await many_streams(2000, 4 if quick else 20, 0.5)


def main() -> None:
    """Run, print, write; exit with 1 where a target was missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one load, one round, no mesh")
    parser.add_argument("--peers", type=Path, metavar="PYTHON", help="of an environment with guidellm")
    options = parser.parse_args()
    figures = uvloop.run(measure(options.quick, options.peers))
    conclude("loadtest-quick" if options.quick else "loadtest", figures)


if __name__ == "__main__":
    main()
