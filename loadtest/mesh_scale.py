"""`make bench-mesh`: thousands of streams through many real workers around synthetic engines, on one small machine.

The engines sleep for step costs measured with the built-in model and emit counted tokens, so every text is known:
what is measured is the mesh, above all the gateway, and that nothing is lost.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

from headrace.loadtest.local_mesh import LocalMesh, local_mesh
from headrace.loadtest.proc import processor_seconds
from headrace.loadtest.prompts import unique_tokens
from headrace.loadtest.report import Figure, conclude
from headrace.loadtest.timed_stream import StreamFailed, completion, timed_stream

MODEL = "smollm2"
COSTS = Path(__file__).resolve().parent / "step_costs" / "smollm2_cpu.json"
PROMPT_TOKENS = 16
OPENED_PER_SECOND = 300
"""Streams: the gateway, which reads 1,024 requests at once, keeps up."""
FAIR_PROMPT_TOKENS = 128
"""So long that the mesh has a backlog of both keys, whom the gateway reads faster."""
FAIR_PART = 8
"""One in so many of the streams that are run at once, for each key."""
KEYS = ("key-of-a", "key-of-b")
FAIR_TOKENS = 4
TIERS = ("gateway", "prefill", "decode")


@dataclass
class Extent:
    """How much is run."""

    prefill: int
    decode: int
    streams: int
    tokens: int
    """Of each: even one that runs alone at first has not ended when the last is opened."""


FULL, QUICK = Extent(8, 16, 2000, 256), Extent(2, 3, 300, 64)


@dataclass
class Crowd:
    """All streams of one run. Times are seconds of `time.perf_counter`."""

    session: aiohttp.ClientSession
    texts: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    first_tokens: list[tuple[float, str]] = field(default_factory=list)
    """(time, API key) of each stream's first token."""
    waits: list[float] = field(default_factory=list)
    begun: asyncio.Event = field(default_factory=asyncio.Event)
    """Some stream has its first token."""
    open: int = 0
    most_open: int = 0
    decoding: int = 0
    """Streams that have some of their tokens."""
    most_decoding: int = 0

    async def stream(self, number: int, tokens: int, key: str = KEYS[0], prompt_tokens: int = PROMPT_TOKENS) -> None:
        """Ask for `tokens` tokens and keep what came."""
        body = completion(MODEL, unique_tokens(prompt_tokens, number), tokens)
        started = time.perf_counter()

        def first() -> None:
            now = time.perf_counter()
            self.begun.set()
            self.first_tokens.append((now, key))
            self.waits.append(now - started)
            self.decoding += 1
            self.most_decoding = max(self.most_decoding, self.decoding)

        self.open += 1
        self.most_open = max(self.most_open, self.open)
        try:
            stream = await timed_stream(self.session, body, {"Authorization": f"Bearer {key}"}, first)
            self.texts.append(stream.text)
            self.decoding -= 1
        except (aiohttp.ClientError, StreamFailed, TimeoutError) as error:
            self.failures.append(str(error)[:200])
        finally:
            self.open -= 1


async def bench(extent: Extent) -> list[Figure]:
    """All figures of one mesh."""
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as file:
        for name, key in zip("ab", KEYS, strict=True):
            file.write(f'[{name}]\nkey = "{key}"\n')
        file.flush()
        return await _bench(extent, ("--api-keys-file", file.name))


async def _bench(extent: Extent, keys_flags: Sequence[str]) -> list[Figure]:
    flags = ["--load-format", "synthetic", "--step-costs", str(COSTS), *keys_flags]
    flags += ["--prefill", str(extent.prefill), "--decode", str(extent.decode), "--lease-seconds", "10"]
    connector, timeout = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=600)
    async with (
        local_mesh(*flags, api_key=KEYS[0]) as mesh,
        aiohttp.ClientSession(mesh.url, connector=connector, timeout=timeout) as session,
    ):
        await _until_all_joined(mesh, extent)
        figures = await many_streams(mesh, session, extent)
        figures.append(await fair_sharing(session, extent))
        await mesh.until_no_page_is_used(30)
        used = await mesh.metrics("headrace_kv_pages_in_use")
        return [*figures, Figure("pages in use at the end", sum(used.values()), "pages", "= 0")]


async def _until_all_joined(mesh: LocalMesh, extent: Extent) -> None:
    async with asyncio.timeout(120):
        while len(await mesh.metrics("headrace_kv_pages_total")) < extent.prefill + extent.decode:  # noqa: ASYNC110
            await asyncio.sleep(0.2)


async def many_streams(mesh: LocalMesh, session: aiohttp.ClientSession, extent: Extent) -> list[Figure]:
    """All streams at once; every text must be the one that a stream alone gets."""
    alone = Crowd(session)
    await alone.stream(0, extent.tokens)
    crowd = Crowd(session)
    before, started = _cpu_by_tier(mesh), time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for number in range(1, extent.streams + 1):
            group.create_task(crowd.stream(number, extent.tokens))
            await asyncio.sleep(1 / OPENED_PER_SECOND)
    seconds = time.perf_counter() - started
    cpu = {tier: after - before[tier] for tier, after in _cpu_by_tier(mesh).items()}
    tokens = extent.streams * extent.tokens
    for failure in crowd.failures[:3]:
        print(f"failed: {failure}", file=sys.stderr)
    return [
        Figure("worker processes", extent.prefill + extent.decode, "processes"),
        Figure("streams", extent.streams, "streams"),
        Figure("most streams open at once", crowd.most_open, "streams", f">= {extent.streams * 0.95:.0f}"),
        Figure("most streams with a part of their tokens at once", crowd.most_decoding, "streams"),
        Figure("failed streams", len(crowd.failures), "streams", "= 0"),
        Figure("wrong texts", sum(text != alone.texts[0] for text in crowd.texts), "streams", "= 0"),
        Figure("tokens a second, all streams", tokens / seconds, "tokens/s"),
        Figure("time to first token, median", statistics.median(crowd.waits), "s"),
        *(Figure(f"{tier} CPU per 1,000 tokens", cpu[tier] / tokens * 1e6, "ms") for tier in TIERS),
        Figure("gateway CPU per stream, tokens and all", cpu["gateway"] / extent.streams * 1e3, "ms"),
        Figure("gateway's largest resident memory", _peak_memory(mesh.pids["gateway"]) / 2**20, "MiB"),
        Figure("all processes' memory now", sum(map(_private_memory, mesh.pids.values())) / 2**20, "MiB"),
    ]


async def fair_sharing(session: aiohttp.ClientSession, extent: Extent) -> Figure:
    """One key queues all its requests, then another as many: while both wait, each has its turn.

    How much fewer prompts of the one began than of the other, in percent, from the second key's first token on.
    """
    crowd, each = Crowd(session), extent.streams // FAIR_PART
    async with asyncio.TaskGroup() as group:
        for number in range(each):
            group.create_task(crowd.stream(10**6 + number, FAIR_TOKENS, KEYS[0], FAIR_PROMPT_TOKENS))
        await crowd.begun.wait()
        for number in range(each):
            group.create_task(crowd.stream(2 * 10**6 + number, FAIR_TOKENS, KEYS[1], FAIR_PROMPT_TOKENS))
    by_key = [[at for at, key in crowd.first_tokens if key == mine] for mine in KEYS]
    begins, ends = min(by_key[1]), min(map(max, by_key))
    counts = [sum(begins <= at <= ends for at in times) for times in by_key]
    return Figure("fair sharing between two keys: difference", (1 - min(counts) / max(counts)) * 100, "%", "<= 10")


def _cpu_by_tier(mesh: LocalMesh) -> dict[str, float]:
    """CPU seconds that the processes of each tier have used."""
    pids = mesh.pids.items()
    return {tier: sum(processor_seconds(pid) for name, pid in pids if name.startswith(tier)) for tier in TIERS}


def _peak_memory(pid: int) -> int:
    return _kilobytes(f"/proc/{pid}/status", "VmHWM:")


def _private_memory(pid: int) -> int:
    return _kilobytes(f"/proc/{pid}/smaps_rollup", "Pss:")


def _kilobytes(file: str, field: str) -> int:
    line = next(line for line in Path(file).read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def main() -> None:
    """Run, print, write; exit with 1 where a target was missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer processes and streams: under 45 seconds")
    parser.add_argument("--streams", type=int, help="instead of the usual number")
    options = parser.parse_args()
    extent = QUICK if options.quick else FULL
    extent.streams = options.streams or extent.streams
    figures = asyncio.run(bench(extent))
    conclude("mesh", figures)


if __name__ == "__main__":
    main()
