"""A colocated mesh under Poisson arrivals of streaming requests: how late tokens are, and how many requests a second
are served in time.

Starts `headrace up --colocate` with random weights in the shape of Llama 3.1 8B, sends 1,024 tokens in and asks for
128 out at fixed rates, then looks for the highest rate at which 90 % of the requests see their first token within
200 ms and no gap of more than 20 ms. The client is this process; the mesh's are others. Flags that are not this
script's go to `headrace up`.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import uvloop

from headrace.loadtest.local_mesh import LocalMesh, local_mesh
from headrace.loadtest.report import Figure, publish
from headrace.loadtest.shapes import LLAMA_8B, TINY, servable_folder
from headrace.tasks import end_task

REQUEST_SECONDS = 60.0
LAG_SECONDS = 0.005
"""How often the client looks how late it is itself."""
EVENT = b"data: {"


@dataclass(frozen=True)
class Plan:
    """What is sent. Rates are requests a second, limits seconds."""

    config: dict[str, Any]
    tokens_in: int
    tokens_out: int
    rates: tuple[tuple[float, int], ...]
    """(rate, requests)."""
    highest_rate: float
    """Where the search begins: nothing can serve it."""
    sweep_runs: int
    sweep_seconds: float
    flags: tuple[str, ...] = ()
    first_token_limit: float = 0.2
    gap_limit: float = 0.02
    good_share: float = 0.9


FULL = Plan(
    config=LLAMA_8B,
    tokens_in=1024,
    tokens_out=128,
    rates=((8.0, 160), (16.0, 320)),
    highest_rate=40.0,
    sweep_runs=6,
    sweep_seconds=10.0,
    flags=("--max-model-len", "2048", "--max-num-seqs", "128", "--max-num-prefills", "32"),
)
QUICK = Plan(
    config=TINY | {"vocab_size": 4096},
    tokens_in=64,
    tokens_out=16,
    rates=((4.0, 8), (8.0, 16)),
    highest_rate=32.0,
    sweep_runs=2,
    sweep_seconds=1.0,
    flags=("--device", "cpu", "--dtype", "float32"),
)
TARGETS = {("16 req/s", "first token p50"): "<= 56", ("16 req/s", "first token p99"): "<= 167"}
TARGETS |= {("16 req/s", "inter-token p99"): "<= 15"}


@dataclass
class Stream:
    """One request as the client saw it; times are seconds."""

    sent: float
    events: list[float] = field(default_factory=list)
    tokens: int = 0
    failure: str = ""

    @property
    def first_token(self) -> float:
        """From the request to its first token."""
        return self.events[0] - self.sent

    @property
    def gaps(self) -> np.ndarray:
        """Between one event and the next."""
        return np.diff(self.events)

    def is_good(self, plan: Plan) -> bool:
        """Whether it was served in time."""
        if self.failure or self.tokens != plan.tokens_out:
            return False
        return self.first_token <= plan.first_token_limit and bool((self.gaps <= plan.gap_limit).all())


@dataclass
class Run:
    """All requests at one rate."""

    rate: float
    seconds: float
    streams: list[Stream]
    was_cut_off: bool
    """Too many were bad already."""
    lags: list[float]
    """How much later than planned this process did something, and sent each request."""

    def good_share(self, plan: Plan, requests: int) -> float:
        """Of all that were to be sent."""
        return sum(stream.is_good(plan) for stream in self.streams) / requests


class Client:
    """Sends prompts that share no prefix."""

    def __init__(self, url: str, model: str, plan: Plan) -> None:
        self.plan = plan
        timeout = aiohttp.ClientTimeout(total=REQUEST_SECONDS)
        self._session = aiohttp.ClientSession(url, timeout=timeout, connector=aiohttp.TCPConnector(limit=0))
        self._model = model
        self._random = random.Random(1)

    def body(self) -> bytes:
        """One request."""
        prompt = [self._random.randrange(256, self.plan.config["vocab_size"]) for _ in range(self.plan.tokens_in)]
        return json.dumps(
            {
                "model": self._model,
                "prompt": prompt,
                "max_tokens": self.plan.tokens_out,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
        ).encode()

    async def ask(self, body: bytes) -> Stream:
        """Send one and note when each event comes; nothing is parsed meanwhile."""
        stream = Stream(time.perf_counter())
        last = b""
        try:
            headers = {"Content-Type": "application/json"}
            async with self._session.post("/v1/completions", data=body, headers=headers) as response:
                async for line in response.content:
                    if line.startswith(EVENT):
                        stream.events.append(time.perf_counter())
                        last = line
                if response.status != 200:
                    stream.failure = f"status {response.status}"
        except (aiohttp.ClientError, TimeoutError) as error:
            stream.failure = repr(error)
        if not stream.failure:
            answer = json.loads(last.removeprefix(b"data: ")) if last else {}
            stream.tokens = (answer.get("usage") or {}).get("completion_tokens", 0)
            stream.failure = "" if "usage" in answer else f"it ended with {last.decode()[:200]}"
            stream.events.pop()  # usage is no token
        return stream

    async def run(self, rate: float, requests: int, *, may_cut_off: bool) -> Run:
        """Send so many at random times; where `may_cut_off`, end once too many are bad."""
        bodies = [self.body() for _ in range(requests)]
        pauses = [self._random.expovariate(rate) for _ in range(requests)]
        lags: list[float] = []
        watching = asyncio.create_task(_watch_lag(lags))
        started = time.perf_counter()
        tasks: list[asyncio.Task[Stream]] = []
        allowed = requests - math.ceil(self.plan.good_share * requests) if may_cut_off else requests
        try:
            for at, body in zip(itertools.accumulate(pauses), bodies, strict=True):
                await asyncio.sleep(max(started + at - time.perf_counter(), 0))
                lags.append(time.perf_counter() - started - at)
                tasks.append(asyncio.create_task(self.ask(body)))
                if self._bad(tasks) > allowed:
                    break
            waiting = set(tasks)
            while waiting and self._bad(tasks) <= allowed:
                _, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        finally:
            was_cut_off = self._bad(tasks) > allowed
            for task in [watching, *tasks]:
                await end_task(task)
        streams = [task.result() for task in tasks if not task.cancelled()]
        return Run(rate, time.perf_counter() - started, streams, was_cut_off, lags)

    def _bad(self, tasks: Sequence[asyncio.Task[Stream]]) -> int:
        return sum(task.done() and not task.result().is_good(self.plan) for task in tasks)

    async def close(self) -> None:
        """Close the connections."""
        await self._session.close()


async def _watch_lag(lags: list[float]) -> None:
    while True:
        due = time.perf_counter() + LAG_SECONDS
        await asyncio.sleep(LAG_SECONDS)
        lags.append(time.perf_counter() - due)


def figures_of(run: Run, plan: Plan) -> Iterator[Figure]:
    """The table of one rate; in milliseconds."""
    name = f"{run.rate:g} req/s"
    served = [stream for stream in run.streams if not stream.failure and stream.events]
    firsts = np.array([stream.first_token for stream in served])
    gaps = np.concatenate([stream.gaps for stream in served]) if served else np.array([])
    for what, values in (("first token", firsts), ("inter-token", gaps), ("client's own lag", np.array(run.lags))):
        for percentile in (50, 99):
            figure = f"{what} p{percentile}"
            value = float(np.percentile(values, percentile)) * 1000 if len(values) else None
            yield Figure(f"{name}, {figure}", value, "ms", TARGETS.get((name, figure), ""))
    incomplete = sum(bool(stream.failure) or stream.tokens != plan.tokens_out for stream in run.streams)
    for failure in sorted({stream.failure for stream in run.streams} - {""})[:5]:
        print(f"{name}: {failure}", file=sys.stderr)
    yield Figure(f"{name}, failed", incomplete, f"of {len(run.streams)}", "= 0")
    yield Figure(f"{name}, output", sum(stream.tokens for stream in served) / run.seconds, "tokens/s")


async def sweep(client: Client, mesh: LocalMesh) -> list[Figure]:
    """Bisect for the highest rate that is served in time."""
    plan = client.plan
    low, high, found = 0.0, plan.highest_rate, []
    for _ in range(plan.sweep_runs):
        rate = (low + high) / 2
        requests = max(int(rate * plan.sweep_seconds), 10)
        run = await client.run(rate, requests, may_cut_off=True)
        share = run.good_share(plan, requests)
        print(f"{rate:.2f} req/s: {share:.0%} in time{', cut off' if run.was_cut_off else ''}", flush=True)
        if share >= plan.good_share:
            low = rate
            found.append(Figure(f"sweep, {rate:.2f} req/s", share, "in time"))
        else:
            high = rate
        await mesh.until_no_page_is_used(30)
    return [*found, Figure(f"highest rate with {plan.good_share:.0%} in time", low, "req/s")]


async def measure(plan: Plan, flags: Sequence[str], folder: Path) -> list[Figure]:
    """Start the mesh, send, stop it."""
    model = await asyncio.to_thread(servable_folder, plan.config, folder / "random")
    started = time.perf_counter()
    figures: list[Figure] = []
    async with local_mesh("--colocate", "--model", str(model), "--load-format", "dummy", *plan.flags, *flags) as mesh:
        figures.append(Figure("start", time.perf_counter() - started, "s"))
        client = Client(mesh.url, model.name, plan)
        try:
            await client.run(plan.rates[0][0], 16, may_cut_off=False)  # warms up whatever is not
            for rate, requests in plan.rates:
                run = await client.run(rate, requests, may_cut_off=False)
                figures += figures_of(run, plan)
                print(*[f"{f.name}: {f.value} {f.unit}" for f in figures[-8:]], sep="\n", flush=True)
                await mesh.until_no_page_is_used(30)
            figures += await sweep(client, mesh)
        finally:
            await client.close()
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
