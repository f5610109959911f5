"""`make chaos-kv`: ten thousand handoffs between processes that are killed, abort, and lose and damage messages.

Prefill and decode workers are the real ones, in processes of their own, around a `KeyedModel`: a page that is wrong,
stale or another prompt's gives a wrong token.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import logging
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from headrace.data_line import Make
from headrace.data_lines import DataLines, data_listener
from headrace.decode.worker import DecodeWorker
from headrace.engine.engine import Engine
from headrace.kvtransfer.departures import Lines
from headrace.kvtransfer.messages import Grant
from headrace.kvtransfer.transports import Wanted
from headrace.loadtest.bare_gateway import BareGateway
from headrace.loadtest.forked_workers import ForkedWorkers, end_with_parent
from headrace.loadtest.keyed_model import LAYOUT, MAX_NUM_SEQS, PAGE_SIZE, KeyedModel, keyed_engine, undisturbed
from headrace.loadtest.report import Figure, conclude
from headrace.messages.stream import TokenBatch
from headrace.node import ModelIdentity, Node, join_mesh, until_stopped
from headrace.prefill.turns import OwnDevice
from headrace.prefill.worker import PrefillWorker
from headrace.redis_server import private_redis
from headrace.registry import Tier
from headrace.settings import Settings
from headrace.tasks import end_task, run_beside
from headrace.wire import Message

MODEL = ModelIdentity("keyed", "keyed", 4096)
NAMESPACE = "chaos"
LEASE_SECONDS = 0.5
WORKERS_A_TIER = 3
PAGES = 96
"""Of each worker: fewer than the requests at once want."""
CHUNK_TOKENS = 3 * PAGE_SIZE
PREFILLS_AT_ONCE = 16
AT_ONCE = 48
MEAN_LIFE_SECONDS = 0.7
CANCELLED = 0.05
"""Share of the requests whose client goes away."""
DRAIN_SECONDS = 1.0
SETTLE_SECONDS = 40.0
"""Longer than a lease of the handoff, which is what a lost Abort waits for."""
MISTAKEN = 3
"""Exit status of a worker that still held pages when it stopped."""


class Accidents:
    """What goes wrong in one worker short of its death."""

    LOST = 0.0005
    REPEATED = 0.002
    DAMAGED = 0.002
    ABORTED = 0.01

    def __init__(self, lines: Lines, seed: int) -> None:
        self._lines = lines
        self._random = random.Random(seed)

    def befall_prefill(self, node: Node, engine: Engine) -> None:
        """Its messages of the handoff, and its computing; before there is a worker."""
        send = node.mesh.send

        async def send_or_not(peer: str, message: Message) -> None:
            for _ in range(self._times()):
                await send(peer, message)

        node.mesh.send = send_or_not  # type: ignore[method-assign, assignment]
        assert isinstance(engine.model, KeyedModel)
        engine.model.accident = self._fail

    def befall_decode(self, node: Node, worker: DecodeWorker) -> None:
        """Its answers, and its patience."""
        post = node.mesh.post

        def post_or_not(peer: str, message: Message) -> None:
            if not self._happens(self.LOST) or isinstance(message, TokenBatch):
                post(peer, message)
            if isinstance(message, Grant) and self._happens(self.ABORTED):
                asyncio.get_running_loop().call_soon(worker.receiver.cancel, message.request_id, message.attempt)

        node.mesh.post = post_or_not  # type: ignore[method-assign, assignment]

    def _happens(self, chance: float) -> bool:
        return self._random.random() < chance

    def _times(self) -> int:
        """How often a message arrives."""
        return 0 if self._happens(self.LOST) else 2 if self._happens(self.REPEATED) else 1

    def submit(self, peer_id: str, make: Make, failed: Callable[[str], None], now: bool) -> None:
        """See `Lines`."""
        for _ in range(self._times()):
            damaged = functools.partial(self._damage, make) if self._happens(self.DAMAGED) else make
            self._lines.submit(peer_id, damaged, failed, now)

    def reconnect(self, peer_id: str) -> None:
        """See `Lines`."""
        self._lines.reconnect(peer_id)

    def _damage(self, make: Make) -> tuple[bytes, Sequence[memoryview]]:
        """Flip a bit anywhere in header or payload."""
        header, payload = make()
        frame = bytearray(header + b"".join(payload))
        frame[self._random.randrange(len(frame))] ^= 1 << self._random.randrange(8)
        return bytes(frame[: len(header)]), [memoryview(frame)[len(header) :]]

    def _fail(self) -> None:
        if self._happens(self.ABORTED / 10):
            raise RuntimeError("accident")


def settings(url: str, name: str) -> Settings:
    """Of one process of this mesh."""
    return Settings(redis=url, namespace=NAMESPACE, worker_id=name, lease_seconds=LEASE_SECONDS)


def serve(name: str, url: str, seed: int) -> None:
    """A worker process's life. `name` begins with its tier."""
    end_with_parent()
    sys.exit(asyncio.run(_serve(name, url, seed)))


async def _serve(name: str, url: str, seed: int) -> int:
    logging.disable()  # there is an accident in every other line
    tier: Tier = "prefill" if name.startswith("prefill") else "decode"
    engine = keyed_engine(PAGES)
    with ThreadPoolExecutor(1) as device_thread:
        await _work(name, tier, url, seed, engine, device_thread)
    engine.pool.check_integrity()
    return MISTAKEN if engine.pool.num_in_use else 0


async def _work(name: str, tier: Tier, url: str, seed: int, engine: Engine, device_thread: ThreadPoolExecutor) -> None:
    async with (
        data_listener("127.0.0.1", None) as listener,
        join_mesh(settings(url, name), tier, MODEL, listener.address if tier == "decode" else "") as node,
        DataLines(node.registry, None) as lines,
    ):
        accidents = Accidents(lines, seed)
        if tier == "prefill":
            accidents.befall_prefill(node, engine)
            turns = OwnDevice(engine, device_thread, CHUNK_TOKENS)
            prefill = PrefillWorker(
                node, engine, LAYOUT, turns, PREFILLS_AT_ONCE, LEASE_SECONDS, accidents, wire_dtype="auto"
            )
            await prefill.run(until_stopped(), DRAIN_SECONDS)
        else:
            transport: Wanted = "tcp" if name.endswith("0") else "auto"
            decode = DecodeWorker(
                node,
                engine,
                device_thread,
                LAYOUT,
                MAX_NUM_SEQS,
                listener,
                lines,
                transport=transport,
                most_prompt_tokens=CHUNK_TOKENS,
            )
            accidents.befall_decode(node, decode)
            await decode.run(until_stopped(), DRAIN_SECONDS)


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
        self._forked = ForkedWorkers(["headrace.loadtest.kv_chaos"])
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
