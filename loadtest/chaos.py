"""`make chaos`: streams over a mesh whose workers, Redis and network fail, compared with undisturbed ones.

Three series: workers are killed and stopped; the same while Redis is killed and comes back empty; a proxy breaks the
connections between the tiers. The streams are greedy, sampled with a seed, and ended by stop strings, in turns; one in
four follows a grammar.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from headrace.loadtest.chaos_mesh import VOCABULARY, ChaosMesh, chaos_mesh
from headrace.loadtest.report import Figure, conclude
from headrace.loadtest.timed_stream import StreamFailed, TimedStream, timed_stream
from headrace.tasks import end_task

PROMPT_TOKENS = 40
STOP_CHARACTERS = 9
FORM = r"((t[0-9]+){1,3}-[a-f]{2};){999}"
"""Of the streams that follow a grammar; it lasts longer than they."""
FAULT_SECONDS = 3.0
STOP_SECONDS = 5.0
RESTART_SECONDS = 0.5
"""As `headrace up` waits before it starts a worker again."""
REDIS_AWAY_SECONDS = 1.5
PARTITION_SECONDS = 5.0
DELAY_SECONDS = 0.2
SETTLE_SECONDS = 30.0
MAX_REFUSALS = 60


@dataclass(frozen=True)
class Extent:
    """How much is asked."""

    requests: int = 500
    seconds: float = 45.0
    """A series lasts no shorter, with more requests where need be."""
    kinds: int = 48
    """Different requests; each runs undisturbed first."""
    output_tokens: int = 200
    at_once: int = 48
    network_fault_seconds: float = FAULT_SECONDS


QUICK = Extent(requests=40, seconds=6.5, kinds=9, output_tokens=64, at_once=10, network_fault_seconds=1.5)


@dataclass
class Findings:
    """What a series did and found."""

    outcomes: int = 0
    errors: list[str] = field(default_factory=list)
    duplicates: int = 0
    gaps: int = 0
    different: int = 0
    refused: int = 0
    """Times that a request was told to come back later."""
    worst_wait: float = 0.0
    worst_pause: float = 0.0
    faults: Counter[str] = field(default_factory=Counter)
    leaked: dict[str, float] = field(default_factory=dict)
    """Pages in use afterwards, by worker."""
    seconds: float = 0.0

    def add(self, stream: TimedStream | None, undisturbed: TimedStream) -> None:
        """Compare an answer, None where there is none, with the one that it should be."""
        self.outcomes += 1
        if stream is None:
            return
        self.worst_wait = max(self.worst_wait, stream.ttft)
        self.worst_pause = max(self.worst_pause, stream.worst_pause)
        if _says(stream) != _says(undisturbed):
            longer = len(stream.text) - len(undisturbed.text)
            self.duplicates += longer > 0
            self.gaps += longer < 0
            self.different += longer == 0


def _says(stream: TimedStream) -> tuple[str, str, int]:
    """What must be as without faults."""
    return stream.text, stream.finish_reason, stream.output_tokens


class Streams:
    """Asks for the same few kinds of streams again and again."""

    def __init__(self, model: str, session: aiohttp.ClientSession, extent: Extent) -> None:
        self._session = session
        self._bodies = [_body(model, number, extent.output_tokens) for number in range(extent.kinds)]
        self.undisturbed: list[TimedStream] = []
        self.errors: list[str] = []
        self.refused = 0

    async def run_undisturbed(self) -> None:
        """Fill `undisturbed`; a third of the kinds get a stop string that their text turned out to have."""
        streams = await asyncio.gather(*[self._ask(body) for body in self._bodies])
        for body, stream in zip(self._bodies[2::3], streams[2::3], strict=True):
            body["stop"] = [_late(stream.text)]
        self.undisturbed = list(await asyncio.gather(*[self._ask(body) for body in self._bodies]))

    async def ask(self, number: int) -> tuple[TimedStream | None, TimedStream]:
        """One stream, None where it failed, and what it should be."""
        kind = number % len(self._bodies)
        try:
            return await self._ask(self._bodies[kind]), self.undisturbed[kind]
        except (StreamFailed, aiohttp.ClientError, TimeoutError) as error:
            self.errors.append(repr(error))
            return None, self.undisturbed[kind]

    async def _ask(self, body: dict[str, Any]) -> TimedStream:
        for _ in range(MAX_REFUSALS):
            try:
                return await timed_stream(self._session, body)
            except StreamFailed as failed:
                if failed.status != 503:
                    raise
                self.refused += 1
                await asyncio.sleep(failed.retry_after)
        raise StreamFailed("refused for ever")


def _late(text: str) -> str:
    """A piece of the text that comes up for the first time as late as possible."""
    starts = range(len(text) - STOP_CHARACTERS + 1)
    first = max(text.find(text[start : start + STOP_CHARACTERS]) for start in starts)
    return text[first : first + STOP_CHARACTERS]


def _body(model: str, number: int, tokens: int) -> dict[str, Any]:
    chance = random.Random(number)
    form = {"structured_outputs": {"regex": FORM}} if number % 4 == 1 else {}
    return {
        **form,
        "model": model,
        "prompt": [chance.randrange(256, VOCABULARY) for _ in range(PROMPT_TOKENS)],
        "max_tokens": tokens,
        "temperature": 0.8 if number % 3 else 0,
        "seed": number,
        "ignore_eos": True,
        "stream_options": {"include_usage": True},
    }


class Faults:
    """What befalls a mesh, one thing every `FAULT_SECONDS`."""

    def __init__(self, mesh: ChaosMesh, seed: int) -> None:
        self.counts: Counter[str] = Counter()
        self._mesh = mesh
        self._random = random.Random(seed)
        self._under_way: set[asyncio.Task[None]] = set()
        self._well = set(mesh.workers.processes)
        self.had_all = asyncio.Event()
        """Everything has befallen the network once."""

    async def befall_workers(self) -> None:
        """Kill or stop one that runs, for ever."""
        while True:
            await asyncio.sleep(FAULT_SECONDS)
            name = self._random.choice(sorted(self._well))
            self.begin(self._random.choice([self._kill, self._stop])(name), name)

    async def befall_network(self, seconds: float) -> None:
        """Hurt the connections of one process every so many seconds, for ever, and no way again before all others."""
        faults = [self._drop, self._delay, self._part, self._forget]
        while True:
            self._random.shuffle(faults)
            for fault in faults:
                await asyncio.sleep(seconds)
                name = self._random.choice(sorted(self._mesh.proxies))
                self.begin(fault(name), name)
            self.had_all.set()

    def begin(self, fault: Awaitable[None], name: str) -> None:
        """Have something happen to a part; until it is over, the part is left alone otherwise."""

        async def run() -> None:
            self._well.discard(name)
            try:
                await fault
            finally:
                self._well |= {name} & set(self._mesh.workers.processes)

        task = asyncio.create_task(run())
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)

    async def end(self) -> None:
        """Wait until all is mended."""
        if self._under_way:
            await asyncio.wait(list(self._under_way))

    async def _kill(self, name: str) -> None:
        self.counts[f"{name.partition('-')[0]} workers killed"] += 1
        await self._mesh.workers.kill(name)
        await asyncio.sleep(RESTART_SECONDS)
        self._mesh.start(name)

    async def _stop(self, name: str) -> None:
        self.counts[f"{name.partition('-')[0]} workers stopped for {STOP_SECONDS:.0f} s"] += 1
        self._mesh.workers.signal(name, signal.SIGSTOP)
        await asyncio.sleep(STOP_SECONDS)
        self._mesh.workers.signal(name, signal.SIGCONT)

    async def empty_redis(self) -> None:
        """Kill it; it comes back with nothing in it."""
        self.counts["Redis killed and emptied"] += 1
        await self._mesh.redis.kill()
        await asyncio.sleep(REDIS_AWAY_SECONDS)
        await self._mesh.redis.start()

    async def _drop(self, name: str) -> None:
        self.counts["connections broken"] += 1
        for proxy in self._mesh.proxies[name]:
            proxy.drop()

    async def _delay(self, name: str) -> None:
        self.counts["delays of 200 ms"] += 1
        for proxy in self._mesh.proxies[name]:
            proxy.delay_seconds = DELAY_SECONDS
        await asyncio.sleep(FAULT_SECONDS)
        for proxy in self._mesh.proxies[name]:
            proxy.delay_seconds = 0.0

    async def _part(self, name: str) -> None:
        self.counts["partitions of 5 s"] += 1
        for proxy in self._mesh.proxies[name]:
            proxy.part()
        await asyncio.sleep(PARTITION_SECONDS)
        for proxy in self._mesh.proxies[name]:
            proxy.heal()

    async def _forget(self, name: str) -> None:
        self.counts["connections left half open"] += 1
        for proxy in self._mesh.proxies[name]:
            proxy.forget()


async def chaos(series: str, extent: Extent, seed: int, folder: Path) -> Findings:
    """One series: `workers`, `redis` or `network`."""
    findings = Findings()
    timeout = aiohttp.ClientTimeout(total=300)
    async with (
        chaos_mesh(folder, 2, 3, proxied=series == "network") as mesh,
        aiohttp.ClientSession(mesh.local.url, timeout=timeout) as session,
    ):
        streams = Streams(mesh.model, session, extent)
        await streams.run_undisturbed()
        faults = Faults(mesh, seed)
        started = time.monotonic()
        if series == "network":
            failing = asyncio.create_task(faults.befall_network(extent.network_fault_seconds))
            failing.add_done_callback(lambda _: faults.had_all.set())
        else:
            failing = asyncio.create_task(faults.befall_workers())
            faults.had_all.set()
        emptied_at = {extent.requests // 3, 2 * extent.requests // 3} if series == "redis" else set()
        numbers = itertools.count()

        async def ask_some() -> None:
            for number in numbers:
                is_late = number >= extent.requests and time.monotonic() - started >= extent.seconds
                if is_late and faults.had_all.is_set():
                    return
                if number in emptied_at:
                    faults.begin(faults.empty_redis(), "redis")
                findings.add(*await streams.ask(number))

        try:
            await asyncio.gather(*[ask_some() for _ in range(extent.at_once)])
        finally:
            await end_task(failing)
            await faults.end()
        findings.seconds = time.monotonic() - started
        findings.faults, findings.refused, findings.errors = faults.counts, streams.refused, streams.errors
        findings.leaked = await _leaked(mesh)
    return findings


async def _leaked(mesh: ChaosMesh) -> dict[str, float]:
    """Pages that are still in use when nothing has been asked for a while. Raises `TimeoutError` without a mesh."""
    await mesh.until_ready()
    try:
        await mesh.local.until_no_page_is_used(SETTLE_SECONDS)
    except TimeoutError:
        used = await mesh.local.metrics("headrace_kv_pages_in_use")
        return {worker: pages for worker, pages in used.items() if pages}
    return {}


def figures(series: str, findings: Findings, requests: int) -> list[Figure]:
    """The table of one series."""
    for error in findings.errors[:10]:
        print(f"{series}: {error}")
    pause = "" if series == "network" else "<= 4"
    return [
        Figure(f"{series}: requests", findings.outcomes, "requests", f">= {requests}"),
        Figure(f"{series}: failures", len(findings.errors), "requests", "= 0"),
        Figure(f"{series}: duplicates", findings.duplicates, "streams", "= 0"),
        Figure(f"{series}: gaps", findings.gaps, "streams", "= 0"),
        Figure(f"{series}: text, end or usage otherwise different", findings.different, "streams", "= 0"),
        Figure(f"{series}: pages in use afterwards", sum(findings.leaked.values()), "pages", "= 0"),
        Figure(f"{series}: worst pause in a stream", findings.worst_pause, "s", pause),
        Figure(f"{series}: worst wait for a first token", findings.worst_wait, "s"),
        Figure(f"{series}: answers of 503 with Retry-After", findings.refused, "answers"),
        *(Figure(f"{series}: {what}", count, "times") for what, count in sorted(findings.faults.items())),
        Figure(f"{series}: time", findings.seconds, "s"),
    ]


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="40 streams a series instead of 500")
    parser.add_argument("--series", choices=["workers", "redis", "network"], action="append")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep-logs", type=Path, help="folder for what the processes wrote")
    arguments = parser.parse_args()
    extent = QUICK if arguments.quick else Extent()
    table: list[Figure] = []
    for series in arguments.series or ["workers", "redis", "network"]:
        with tempfile.TemporaryDirectory() as folder:
            try:
                findings = asyncio.run(chaos(series, extent, arguments.seed, Path(folder)))
            finally:
                if arguments.keep_logs:
                    shutil.copytree(folder, arguments.keep_logs / series, dirs_exist_ok=True)
        print(f"{series}: {findings.outcomes} requests in {findings.seconds:.0f} s", flush=True)
        table += figures(series, findings, extent.requests)
    conclude("chaos", table)


if __name__ == "__main__":
    main()
