"""`make bench-overload`: what a mesh does when five times what it can do is asked of it.

The mesh is real, with the built-in model on a CPU: gateway, Redis, one prefill and one decode worker. Its capacity is
what clients get done who each wait for their answer, and as long as they are told to where they are refused; as many of
them as get the most done. Then requests arrive at five times that rate, at random times, and whoever is refused goes
away. After that the capacity is measured again, since the speed of a machine that others share drifts.
"""

from __future__ import annotations

import argparse
import asyncio
import operator
import os
import random
import statistics
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

from headrace.loadtest.local_mesh import LocalMesh, local_mesh
from headrace.loadtest.proc import parent
from headrace.loadtest.report import Figure, conclude
from headrace.loadtest.timed_stream import EACH_TOKEN, StreamFailed, completion, timed_stream

PROMPT_TOKENS = 96
OUTPUT_TOKENS = 24
VOCABULARY = 49000
PLACES = 12
"""`--max-num-seqs`: more would be slower than the target for inter-token time on two cores."""
MAX_TTFT = 1.0
"""`--max-ttft`: the rest of the target is for the prompt's own prefill."""
TTFT_TARGET = 2.0
ITL_TARGET = 0.25
"""Seconds, the mean of a request."""
CLIENTS = (PLACES // 2, PLACES, PLACES * 3 // 2)
"""Of the closed loops that look for how many get the most done."""
RAMP_SECONDS = 3.0
"""Of a closed loop, at first, that do not count: all its clients begin at once."""
OVERLOAD = 5
GROWTH_MIB = 64.0
STEADY_MIB = 4.0
"""Growth below this, from one look to the next, is none."""
STEADY_SECONDS = 5.0
"""Between two looks: longer than it takes until workers begin (`engine/host_memory.py`)."""
STEADY_TIMEOUT_SECONDS = 90.0
RECOVERY_SECONDS = 20.0
PAGE_MIB = os.sysconf("SC_PAGE_SIZE") / 2**20


@dataclass
class Outcome:
    """How one request went; times in seconds."""

    status: int
    ended: float = 0.0
    ttft: float = 0.0
    itl: float = 0.0
    tokens: int = 0
    retry_after: float = 0.0

    @property
    def is_good(self) -> bool:
        """Whether it was complete and within its targets."""
        return self.tokens == OUTPUT_TOKENS and self.ttft <= TTFT_TARGET and self.itl <= ITL_TARGET


class Clients:
    """Sends requests with prompts of random tokens."""

    def __init__(self, url: str, seed: int) -> None:
        connector = aiohttp.TCPConnector(limit=0)
        self._session = aiohttp.ClientSession(url, connector=connector, timeout=aiohttp.ClientTimeout(total=120))
        self._random = random.Random(seed)

    async def ask(self) -> Outcome:
        """One streamed completion."""
        prompt = [self._random.randrange(100, VOCABULARY) for _ in range(PROMPT_TOKENS)]
        try:
            stream = await timed_stream(self._session, completion("smollm2", prompt, OUTPUT_TOKENS) | EACH_TOKEN)
        except StreamFailed as failed:
            return Outcome(failed.status, time.perf_counter(), retry_after=failed.retry_after)
        return Outcome(200, stream.event_times[-1], stream.ttft, stream.itl, len(stream.token_times))

    async def closed_loop(self, clients: int, seconds: float) -> list[Outcome]:
        """So many clients that ask again as soon as they have their answer, or may; what ended in those seconds."""
        begin = time.perf_counter() + RAMP_SECONDS
        end = begin + seconds
        outcomes: list[Outcome] = []

        async def client() -> None:
            while time.perf_counter() < end:
                outcomes.append(await self.ask())
                await asyncio.sleep(outcomes[-1].retry_after)

        await asyncio.gather(*(client() for _ in range(clients)))
        return [outcome for outcome in outcomes if begin < outcome.ended <= end]

    async def open_loop(self, rate: float, seconds: float) -> list[asyncio.Task[Outcome]]:
        """Requests that arrive at random, `rate` a second, whatever becomes of the others; some may still run."""
        started = time.perf_counter()
        at, tasks = started, []
        while (at := at + self._random.expovariate(rate)) < started + seconds:
            await asyncio.sleep(at - time.perf_counter())
            tasks.append(asyncio.create_task(self.ask()))
        return tasks

    async def close(self) -> None:
        """Close all connections."""
        await self._session.close()


@dataclass
class Memory:
    """Resident memory of the mesh's processes in MiB, once a second; `names` by process id."""

    names: dict[int, str]
    samples: list[dict[int, float]] = field(default_factory=list)

    @classmethod
    def of(cls, mesh: LocalMesh) -> Memory:
        """Of the supervisor and all its children, Redis among them."""
        supervisor = parent(next(iter(mesh.pids.values())))
        children = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
        known = {pid: name for name, pid in mesh.pids.items()}
        return cls({supervisor: "up"} | {pid: known.get(pid, "redis") for pid in children if parent(pid) == supervisor})

    async def until_steady(self) -> None:
        """Wait until nobody's has grown for a while: workers touch all of their KV cache soon after their start.

        Raises `TimeoutError`.
        """
        async with asyncio.timeout(STEADY_TIMEOUT_SECONDS):
            before: list[float] = []
            while True:
                now = [_resident(pid) for pid in self.names]
                if before and max(map(operator.sub, now, before)) < STEADY_MIB:
                    return
                before = now
                await asyncio.sleep(STEADY_SECONDS)

    async def watch(self) -> None:
        """Until cancelled."""
        while True:
            self.samples.append({pid: _resident(pid) for pid in self.names})
            await asyncio.sleep(1.0)

    def growth(self) -> tuple[float, str]:
        """By how much the process that grew most is larger in the last third than it was in the first two."""
        cut = len(self.samples) * 2 // 3
        grown = {
            name: max(sample[pid] for sample in self.samples[cut:]) - max(sample[pid] for sample in self.samples[:cut])
            for pid, name in self.names.items()
        }
        most = max(grown, key=lambda name: grown[name])
        return grown[most], most


def _resident(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE_MIB


async def bench(seconds_at_capacity: float, seconds: float) -> list[Figure]:
    """All figures."""
    flags = ("--max-num-seqs", str(PLACES), "--max-ttft", str(MAX_TTFT), "--log-level", "warning")
    async with local_mesh(*flags) as mesh:
        clients, memory = Clients(mesh.url, seed=0), Memory.of(mesh)
        await memory.until_steady()
        try:
            await clients.closed_loop(PLACES, 2)
            alone = await _alone(clients)
            loops = {number: await clients.closed_loop(number, seconds_at_capacity) for number in CLIENTS}
            number = max(loops, key=lambda number: len(_served(loops[number])))
            before = await clients.closed_loop(number, seconds_at_capacity)
            capacity = len(_served(before)) / seconds_at_capacity
            asked = await _beside(memory.watch, clients.open_loop(OVERLOAD * capacity, seconds))
            end = time.perf_counter()
            recovery = await _recovery(clients, alone)
            overloaded = [outcome for outcome in await asyncio.gather(*asked) if outcome.ended <= end]
            after = await clients.closed_loop(number, seconds_at_capacity)
        finally:
            await clients.close()
    goodputs = [_goodput(outcomes, seconds_at_capacity) for outcomes in (before, after)]
    return _figures(number, goodputs, overloaded, seconds, memory, alone, recovery)


async def _alone(clients: Clients) -> float:
    """Time to first token of one request at a time."""
    return statistics.median([(await clients.ask()).ttft for _ in range(5)])


async def _beside(
    watch: Callable[[], Awaitable[None]], work: Awaitable[list[asyncio.Task[Outcome]]]
) -> list[asyncio.Task[Outcome]]:
    watching = asyncio.ensure_future(watch())
    try:
        return await work
    finally:
        watching.cancel()


async def _recovery(clients: Clients, alone: float) -> float:
    """Seconds from the last arrival of the overload until the first token comes as fast as to one alone, or nearly."""
    started = time.perf_counter()
    while (now := time.perf_counter()) < started + RECOVERY_SECONDS:
        outcome = await clients.ask()
        if outcome.tokens and outcome.ttft <= 2 * alone:
            return now + outcome.ttft - started
    return RECOVERY_SECONDS


def _goodput(outcomes: list[Outcome], seconds: float) -> float:
    return sum(outcome.is_good for outcome in outcomes) / seconds


def _figures(
    clients: int,
    goodputs: list[float],
    overloaded: list[Outcome],
    seconds: float,
    memory: Memory,
    alone: float,
    recovery: float,
) -> list[Figure]:
    at_capacity, good = statistics.mean(goodputs), _goodput(overloaded, seconds)
    served = _served(overloaded)
    refused = sum(outcome.status == 429 for outcome in overloaded)
    failed = len(overloaded) - len(served) - refused
    growth, grown = memory.growth()
    late = sum(outcome.ttft > TTFT_TARGET for outcome in served)
    return [
        Figure("clients that get the most done", clients, "clients"),
        Figure("goodput at capacity, before the overload", goodputs[0], "requests/s"),
        Figure("goodput at capacity, after it", goodputs[1], "requests/s"),
        Figure("overload, requests sent", len(overloaded) / seconds, "requests/s"),
        Figure("overload, goodput", good, "requests/s"),
        Figure("overload, goodput over that at capacity", good / max(at_capacity, 1e-9), "ratio", ">= 0.9"),
        Figure("overload, refused with 429", refused / max(len(overloaded), 1), "of all"),
        Figure("overload, failed otherwise", failed, "requests", "= 0"),
        Figure("overload, served but late", late / max(len(served), 1), "of served"),
        Figure("overload, slow between tokens", _part(served, lambda o: o.itl > ITL_TARGET), "of served"),
        Figure("overload, median time to first token", _median(served, lambda o: o.ttft) * 1000, "ms"),
        Figure("overload, median inter-token time", _median(served, lambda o: o.itl) * 1000, "ms"),
        Figure(f"memory, growth in the last third ({grown})", growth, "MiB", f"<= {GROWTH_MIB:g}"),
        Figure("memory, all processes at the end", sum(memory.samples[-1].values()), "MiB"),
        Figure("time to first token alone", alone * 1000, "ms"),
        Figure("time to first token back", recovery, "s", "<= 5"),
    ]


def _served(outcomes: list[Outcome]) -> list[Outcome]:
    return [outcome for outcome in outcomes if outcome.tokens]


def _part(outcomes: list[Outcome], condition: Callable[[Outcome], bool]) -> float:
    return sum(condition(outcome) for outcome in outcomes) / max(len(outcomes), 1)


def _median(outcomes: list[Outcome], value: Callable[[Outcome], float]) -> float:
    return statistics.median([value(outcome) for outcome in outcomes]) if outcomes else 0.0


def main() -> None:
    """Run, print, write; exit with 1 where a target was missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="3 and 12 seconds instead of 20 and 60")
    quick = parser.parse_args().quick
    figures = asyncio.run(bench(*((3.0, 12.0) if quick else (20.0, 60.0))))
    conclude("overload", figures)


if __name__ == "__main__":
    main()
