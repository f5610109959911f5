"""`make chaos-kv`: ten thousand handoffs between processes that are killed, abort, and lose and damage messages.

Prefill and decode workers are the real ones, in processes of their own, around a `KeyedModel`: a page that is wrong,
stale or another prompt's gives a wrong token.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from headrace.loadtest.bare_gateway import BareGateway
from headrace.loadtest.chaos_worker import LEASE_SECONDS, MODEL, PAGES, serve, settings
from headrace.loadtest.forked_workers import ForkedWorkers
from headrace.loadtest.keyed_model import PAGE_SIZE, undisturbed
from headrace.loadtest.report import Figure, conclude
from headrace.node import Node, join_mesh
from headrace.redis_server import private_redis
from headrace.tasks import end_task, run_beside

WORKERS_A_TIER = 3
AT_ONCE = 48
MEAN_LIFE_SECONDS = 0.7
CANCELLED = 0.05
"""Share of the requests whose client goes away."""
SETTLE_SECONDS = 40.0
"""Longer than a lease of the handoff, which is what a lost Abort waits for."""


class Workers:
    """The processes, by name."""

    def __init__(self, url: str, seed: int) -> None:
        self.kills: Counter[str] = Counter()
        """By tier."""
        self.are_spared = False
        self.broken: list[str] = []
        """Workers that ended by themselves, or held pages at their end."""
        self._url = url
        self._random = random.Random(seed)
        self._forked = ForkedWorkers([serve.__module__])
        self.started: dict[str, int] = {}
        """Unix nanoseconds, by name: what registered before is an earlier life's."""
        for tier in ("prefill", "decode"):
            for number in range(WORKERS_A_TIER):
                self._start(f"{tier}-{number}")

    def _start(self, name: str) -> None:
        self.started[name] = time.time_ns()
        self._forked.start(name, serve, self._url, self._random.getrandbits(32))

    async def kill(self, name: str) -> None:
        """SIGKILL one and start it again under its name, at once or after its lease."""
        if (ended := await self._forked.kill(name)) is not None:
            self.broken.append(f"{name} ended with {ended}")
        self.kills[name.partition("-")[0]] += 1
        if self._random.random() < 0.5:
            await asyncio.sleep(2 * LEASE_SECONDS * self._random.random())
        self._start(name)

    async def stop(self) -> None:
        """SIGTERM all; each says by its exit status whether its pages were all free."""
        codes = await self._forked.stop()
        self.broken += [f"{name} ended with {code}" for name, code in codes.items() if code != 0]


@dataclass
class Findings:
    """What a run did and found."""

    seconds: float = 0.0
    answered: int = 0
    cancelled: int = 0
    unanswered: int = 0
    wrong: int = 0
    retries: Counter[str] = field(default_factory=Counter)
    """Attempts after the first, by what made them necessary."""
    kills: Counter[str] = field(default_factory=Counter)
    queued: int = 0
    """Entries left in the queue."""
    leaked: dict[str, float] = field(default_factory=dict)
    """Pages in use after everything has ended, by worker."""
    broken: list[str] = field(default_factory=list)


@asynccontextmanager
async def workers(url: str, seed: int) -> AsyncIterator[Workers]:
    """Processes that end with the block."""
    started = Workers(url, seed)
    try:
        yield started
    finally:
        await started.stop()


async def chaos(requests: int, mean_life_seconds: float, seed: int, folder: Path) -> Findings:
    """Serve so many requests while workers die."""
    findings = Findings()
    async with AsyncExitStack() as stack:
        url = await stack.enter_async_context(private_redis(folder))
        node = await stack.enter_async_context(join_mesh(settings(url, "gateway"), "gateway", MODEL))
        processes = await stack.enter_async_context(workers(url, seed))
        gateway = BareGateway(node)
        await run_beside(
            _ask_and_settle(gateway, processes, requests, mean_life_seconds, seed, findings), [gateway.run()]
        )
        findings.wrong += gateway.wrong
        findings.retries = gateway.retries
        findings.kills, findings.broken = processes.kills, processes.broken
    return findings


async def _ask_and_settle(
    gateway: BareGateway, processes: Workers, requests: int, mean_life_seconds: float, seed: int, findings: Findings
) -> None:
    started = time.monotonic()
    killing = [asyncio.create_task(_keep_killing(processes, name, mean_life_seconds)) for name in processes.started]
    try:
        await _ask_all(gateway, requests, seed, findings)
        findings.seconds = time.monotonic() - started
        processes.are_spared = True
        await asyncio.gather(*killing)
    finally:
        for killer in killing:
            await end_task(killer)
    findings.leaked = await _until_no_page_is_used(gateway.node, processes)
    findings.queued = await gateway.node.queue.depth()
    await processes.stop()


async def _keep_killing(processes: Workers, name: str, mean_life_seconds: float) -> None:
    """Let one worker live and die again and again."""
    chance = random.Random(name)
    while not processes.are_spared:
        await asyncio.sleep(2 * mean_life_seconds * chance.random())
        await processes.kill(name)


async def _ask_all(gateway: BareGateway, requests: int, seed: int, findings: Findings) -> None:
    chance = random.Random(seed)
    numbers = iter(range(requests))

    async def ask_some() -> None:
        for number in numbers:
            shared = [chance.randrange(4)] * PAGE_SIZE * chance.randrange(5)
            prompt = [*shared, *(chance.randrange(1000) for _ in range(chance.randrange(1, 30)))]
            await _ask(gateway, f"chaos-{number}", prompt, chance, findings)

    await asyncio.gather(*[ask_some() for _ in range(AT_ONCE)])


async def _ask(
    gateway: BareGateway, request_id: str, prompt: list[int], chance: random.Random, findings: Findings
) -> None:
    asking = asyncio.ensure_future(gateway.ask(request_id, prompt))
    if chance.random() < CANCELLED:
        await asyncio.sleep(chance.random() * 0.1)
        await gateway.cancel(request_id)
    await asyncio.wait([asking])
    if asking.cancelled():
        findings.cancelled += 1
    elif isinstance(asking.exception(), TimeoutError):
        findings.unanswered += 1
    else:
        findings.answered += 1
        findings.wrong += asking.result() != undisturbed(prompt)


async def _until_no_page_is_used(node: Node, processes: Workers) -> dict[str, float]:
    """Pages still in use when nothing changes any more."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while True:
        await node.registry.refresh()
        members = [node.registry.members.get(name) for name in processes.started]
        alive = [member for member in members if member is not None and member.epoch > processes.started[member.id]]
        used = {member.id: member.stats.get("kv_pages_in_use", PAGES) for member in alive}
        if len(used) == 2 * WORKERS_A_TIER and not any(used.values()) and not await node.queue.depth():
            return {}
        if time.monotonic() > deadline:
            return {name: pages for name, pages in used.items() if pages}
        await asyncio.sleep(0.1)


def figures(findings: Findings, requests: int) -> list[Figure]:
    """The table."""
    for line in findings.broken:
        print(line)
    ended = findings.answered + findings.cancelled
    handoffs = requests + findings.retries.total()
    return [
        Figure("requests", ended, "requests", f">= {requests}"),
        Figure("handoffs begun for them", handoffs, "handoffs", f">= {requests}"),
        Figure("answers that are not the undisturbed ones", findings.wrong, "answers", "= 0"),
        Figure("requests without an answer", findings.unanswered, "requests", "= 0"),
        Figure("pages in use afterwards, both tiers", sum(findings.leaked.values()), "pages", "= 0"),
        Figure("workers that failed or held pages at their end", len(findings.broken), "workers", "= 0"),
        Figure("entries left in the queue", findings.queued, "entries", "= 0"),
        Figure("prefill workers killed", findings.kills["prefill"], "workers", ">= 1"),
        Figure("decode workers killed", findings.kills["decode"], "workers", ">= 1"),
        Figure("requests cancelled", findings.cancelled, "requests"),
        *(Figure(f"attempts after: {why}", count, "attempts") for why, count in sorted(findings.retries.items())),
        Figure("time", findings.seconds, "s"),
    ]


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="800 requests instead of 10,000")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    requests = 800 if arguments.quick else 10_000
    with tempfile.TemporaryDirectory() as folder:
        findings = asyncio.run(chaos(requests, MEAN_LIFE_SECONDS, arguments.seed, Path(folder)))
    table = figures(findings, requests)
    conclude("kv_chaos", table)


if __name__ == "__main__":
    main()
