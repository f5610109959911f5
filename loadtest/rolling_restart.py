"""Replaces all workers of a mesh, one at a time, under load: what do its clients notice? `make chaos-restart`."""

from __future__ import annotations

import argparse
import asyncio
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import aiohttp

from headrace.control import give_order
from headrace.loadtest.client import StreamClient
from headrace.loadtest.local_mesh import LocalMesh, local_mesh
from headrace.loadtest.prompts import unique_tokens
from headrace.loadtest.report import Figure, conclude
from headrace.loadtest.timed_stream import StreamFailed, TimedStream
from headrace.tasks import end_task

MODEL = "smollm2"
MESH = ("--dtype", "float32", "--speculation", "off", "--max-num-seqs", "32", "--cpu-threads", "1")
"""In float32 a text does not depend on what else is in the batch."""
PROMPT_TOKENS = 200
LOOK_SECONDS = 0.1
RECOMPUTED, MOVED = "headrace_handoff_recomputed_total", "headrace_handoff_moved_here_total"
REQUEUES = re.compile(r"^headrace_gateway_requeues_total (\S+)$", re.MULTILINE)


@dataclass
class Totals:
    """Sums of workers' counters, those of workers that left among them: each starts at 0 and is looked at often."""

    sums: Counter[str] = field(default_factory=Counter)
    _last: dict[tuple[str, str], float] = field(default_factory=dict)

    def see(self, name: str, values: dict[str, float]) -> None:
        """A worker whose counter has fallen is another one of that name."""
        for worker, value in values.items():
            before = self._last.get((name, worker), 0.0)
            self.sums[name] += int(value - before if value >= before else value)
            self._last[name, worker] = value


@dataclass
class Load:
    """Streams that ask one after the other until told to stop."""

    client: StreamClient
    streams: int
    tokens: int
    expected: dict[int, str]
    """Undisturbed texts, by prompt."""
    answers: list[TimedStream] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    wrong: int = 0

    async def run(self, stopped: asyncio.Event) -> None:
        """All streams, each until its answer has ended."""
        await asyncio.gather(*[self._stream(index, stopped) for index in range(self.streams)])

    async def _stream(self, index: int, stopped: asyncio.Event) -> None:
        while not stopped.is_set():
            index = (index + 1) % len(self.expected)
            try:
                answer = await self.client.complete(prompt(index), self.tokens)
            except (StreamFailed, OSError, aiohttp.ClientError) as error:
                self.failures.append(repr(error))
                continue
            self.answers.append(answer)
            self.wrong += answer.text != self.expected[index] or len(answer.token_times) != self.tokens


def prompt(index: int) -> list[int]:
    """Unlike all others from its first token on."""
    return unique_tokens(PROMPT_TOKENS, index)


async def watch(mesh: LocalMesh, totals: Totals) -> None:
    """Follow the counters until cancelled."""
    while True:
        for name in (RECOMPUTED, MOVED):
            totals.see(name, await mesh.metrics(name))
        await asyncio.sleep(LOOK_SECONDS)


async def requeues(mesh: LocalMesh) -> float:
    """TimedStreams that the gateway had to queue anew."""
    async with aiohttp.ClientSession() as session, session.get(f"{mesh.url}/metrics") as response:
        found = REQUEUES.search(await response.text())
    return float(found[1]) if found else 0.0


async def measure(
    flags: list[str], streams: int, tokens: int, workers: int, say_all: bool, common: Sequence[str] = MESH
) -> list[Figure]:
    """All figures of one rolling restart."""
    async with local_mesh(*common, *flags) as mesh, StreamClient(mesh.url, MODEL) as client:
        calm = await asyncio.gather(*[client.complete(prompt(index), tokens) for index in range(streams)])
        load = Load(client, streams, tokens, {index: answer.text for index, answer in enumerate(calm)})
        totals, stopped = Totals(), asyncio.Event()
        watching, loading = asyncio.create_task(watch(mesh, totals)), asyncio.create_task(load.run(stopped))
        port = urlsplit(mesh.url).port
        assert port is not None
        try:
            await give_order(port, "restart", {}, print if say_all else lambda line: None)
            stopped.set()
            await loading
            await mesh.until_no_page_is_used()
        finally:
            await end_task(watching)
            await end_task(loading)
        anew = await requeues(mesh)
        log = list(mesh.log)
    left = [line for line in log if "exited with code 0, as it was told to" in line]
    for failure in load.failures:
        print(failure, file=sys.stderr)
    return [
        Figure("requests", len(load.answers), ""),
        Figure("failed", len(load.failures), "", "= 0"),
        Figure("texts or counts unlike undisturbed ones", load.wrong, "", "= 0"),
        Figure("workers replaced that exited with 0", len(left), "", f"= {workers}"),
        Figure("prompts computed again", totals.sums[RECOMPUTED], "", "= 0"),
        Figure("queued anew by the gateway", anew, "", "= 0"),
        Figure("running requests that moved", totals.sums[MOVED], "", ">= 1"),
        Figure("pages leaked", 0, "", "= 0"),
        Figure("worst pause", max(answer.worst_pause for answer in load.answers), "s", "<= 1"),
        Figure("worst pause before the restart", max(answer.worst_pause for answer in calm), "s"),
    ]


def main() -> None:
    """Parse flags, measure, publish."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one worker a tier, two streams")
    parser.add_argument("--colocate", action="store_true", help="one worker that is both tiers, and its successor")
    parser.add_argument("--verbose", action="store_true", help="say what is being replaced")
    options = parser.parse_args()
    prefill, decode, streams, tokens = (1, 1, 2, 60) if options.quick else (2, 3, 12, 200)
    flags = ["--prefill", str(prefill), "--decode", str(decode)]
    workers = prefill + decode
    if options.colocate:
        flags, workers = ["--colocate"], 1
    figures = asyncio.run(measure(flags, streams, tokens, workers, options.verbose))
    conclude("rolling_restart" + ("_colocated" if options.colocate else ""), figures)


if __name__ == "__main__":
    main()
