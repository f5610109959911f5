"""The command's side of the generator processes: starts them, deals out a run's requests, gathers results."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from headrace.loadtest.load.arrivals import Planned
from headrace.loadtest.load.messages import (
    PROBE,
    Begin,
    Done,
    End,
    FromCommand,
    FromGenerator,
    Job,
    Result,
    Tick,
    frame,
    read_frame,
)
from headrace.loadtest.load.prompts import Prompts
from headrace.loadtest.load.target import Target
from headrace.processes import end_process
from headrace.tasks import end_task

PROBE_SECONDS = 0.01
STOP_SECONDS = 5.0
LEAD_SECONDS = 0.3
"""Between the first job's dispatch to the generators and a run's start."""

_decode = msgspec.msgpack.Decoder(FromGenerator).decode


@dataclass
class Run:
    """What came of one run. `planned` counts all requests, also those that a cut-off kept from being sent."""

    target: str
    rate: float | None
    concurrency: int
    planned: int
    results: list[Result] = field(default_factory=list)
    generators: list[Done] = field(default_factory=list)
    was_cut_off: bool = False

    @property
    def seconds(self) -> float:
        """From the first request to the last end."""
        if not self.results:
            return 0.0
        return max(r.sent + r.ended for r in self.results) - min(r.sent for r in self.results)


class Watcher(Protocol):
    """Is told of a run's progress."""

    def on_result(self, result: Result) -> None: ...
    def on_tick(self, running: int, pieces: int) -> None: ...


@dataclass
class _Generator:
    process: asyncio.subprocess.Process
    probe: socket.socket
    tick: Tick = field(default_factory=lambda: Tick(0, 0))

    async def feed(self, messages: Iterable[FromCommand]) -> None:
        """Write as fast as it reads."""
        assert self.process.stdin is not None
        self.tick = Tick(0, 0)
        for message in messages:
            self.process.stdin.write(frame(message))
            await self.process.stdin.drain()

    async def gather(self, on_result: Callable[[Result], Awaitable[None]], on_tick: Callable[[], None]) -> Done:
        """Read until a run is over. Raises `RuntimeError` where the process dies."""
        assert self.process.stdout is not None
        while (data := await read_frame(self.process.stdout)) is not None:
            match _decode(data):
                case Result() as result:
                    await on_result(result)
                case Tick() as tick:
                    self.tick = tick
                    on_tick()
                case Done() as done:
                    return done
        raise RuntimeError("a generator process died; its error is above")


class Crew:
    """Some generator processes, used for one run at a time."""

    def __init__(self, generators: Sequence[_Generator], timeout: float) -> None:
        self._generators = generators
        self._timeout = timeout

    async def run(
        self,
        target: Target,
        plan: Sequence[Planned],
        prompts: Prompts,
        *,
        rate: float | None = None,
        concurrency: int = 0,
        is_enough: Callable[[Result], bool] = lambda result: False,
        watcher: Watcher | None = None,
    ) -> Run:
        """Make all requests of a plan, or those until `is_enough` says so of a result; the others are cancelled.

        With `concurrency`, that many run at once; otherwise each is sent at its own time. Raises `RuntimeError` where a
        generator dies.
        """
        run = Run(target.name, rate, concurrency, len(plan))
        count = len(self._generators) if not concurrency else min(len(self._generators), concurrency)
        generators = self._generators[:count]
        origin = time.perf_counter() + LEAD_SECONDS
        feeding = []
        for first, generator in enumerate(generators):
            share = concurrency // count + (first < concurrency % count)
            begin = Begin(*target.address(), target.head(), origin, self._timeout, share)
            numbers = range(first, len(plan), count)
            jobs = (Job(number, plan[number].at or 0.0, prompts.body(number, plan[number])) for number in numbers)
            feeding.append(asyncio.create_task(generator.feed(itertools.chain([begin], jobs, [End()]))))

        async def on_result(result: Result) -> None:
            if run.was_cut_off:
                return
            run.results.append(result)
            if watcher:
                watcher.on_result(result)
            if is_enough(result):
                run.was_cut_off = True
                await self._stop(generators, feeding)

        def on_tick() -> None:
            if watcher:
                watcher.on_tick(sum(g.tick.running for g in generators), sum(g.tick.pieces for g in generators))

        gathering = [asyncio.create_task(g.gather(on_result, on_tick)) for g in generators]
        probing = asyncio.create_task(self._probe(generators))
        try:
            run.generators = await asyncio.gather(*gathering)
        finally:
            for task in [probing, *feeding, *gathering]:
                await end_task(task)
        return run

    async def _stop(self, generators: Sequence[_Generator], feeding: Sequence[asyncio.Task[None]]) -> None:
        for task in feeding:
            await end_task(task)  # frames are written whole, so nothing is cut in two
        for generator in generators:
            assert generator.process.stdin is not None
            generator.process.stdin.write(frame(End(at_once=True)))

    async def _probe(self, generators: Sequence[_Generator]) -> None:
        while True:
            await asyncio.sleep(PROBE_SECONDS)
            for generator in generators:
                with contextlib.suppress(BlockingIOError, ConnectionError):
                    generator.probe.send(PROBE.pack(time.perf_counter()))


@asynccontextmanager
async def start_crew(processes: int, timeout: float) -> AsyncIterator[Crew]:
    """So many generator processes; `timeout` is the seconds that one request may take."""
    async with AsyncExitStack() as stack:
        yield Crew([await stack.enter_async_context(_start()) for _ in range(processes)], timeout)


@asynccontextmanager
async def _start() -> AsyncIterator[_Generator]:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with ours:
        with theirs:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "headrace.loadtest.load.generator", str(theirs.fileno())),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # ^C is the command's to handle
                limit=2**20,
            )
        try:
            yield _Generator(process, ours)
        finally:
            await end_process(process, signal.SIGTERM, STOP_SECONDS)
