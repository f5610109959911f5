"""The process that makes the load: takes jobs from its standard input, sends them, and times what comes back.

It has an event loop for itself: bodies are made, and figures computed, elsewhere. What delays it is measured and
reported with each run: how late the loop wakes, how late requests leave, and how long bytes wait for their time stamp
(the command writes its clock into a socket that this loop reads like any other).
"""

from __future__ import annotations

import asyncio
import gc
import os
import socket
import sys
import time
from collections.abc import Callable

import msgspec
import uvloop

from headrace.loadtest.load.messages import (
    PROBE,
    Begin,
    Done,
    End,
    FromCommand,
    Job,
    Result,
    Tick,
    frame,
    read_frame,
)
from headrace.loadtest.load.sse import error_text, read_stream
from headrace.loadtest.load.stream import ConnectionPool, StreamFailed
from headrace.tasks import end_task

LAG_SECONDS = 0.01
TICK_SECONDS = 0.25
MAX_AHEAD = 512
"""Jobs read before their time; the pipe holds back the others."""
MAX_SAMPLES = 60_000
"""Of lags and of stamps: ten minutes; later ones are left out."""

_decode = msgspec.msgpack.Decoder(FromCommand).decode


class Probe(asyncio.Protocol):
    """Measures how long bytes wait for their time stamp."""

    def __init__(self) -> None:
        self.waits: list[float] = []

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        if len(self.waits) < MAX_SAMPLES and len(data) % PROBE.size == 0:
            self.waits += [now - sent for (sent,) in PROBE.iter_unpack(data)]


class Run:
    """One run of this process."""

    def __init__(self, begin: Begin, pool: ConnectionPool, post: Callable[[Result | Tick | Done], None]) -> None:
        self.begin = begin
        self.jobs: asyncio.Queue[Job | None] = asyncio.Queue(MAX_AHEAD)
        self.running = self.most_running = 0
        self._pool = pool
        self._post = post
        self._lags: list[float] = []
        self._started, self._cpu = time.perf_counter(), time.process_time()
        self._tasks: set[asyncio.Task[None]] = set()

    async def make_load(self, probe: Probe) -> None:
        """Send all jobs until the one that is None, and wait for their ends."""
        probe.waits.clear()
        watching = asyncio.create_task(self._watch_lag(self._pool.pieces))
        try:
            await asyncio.sleep(max(self.begin.origin - time.perf_counter(), 0))
            if self.begin.concurrency:
                async with asyncio.TaskGroup() as streams:
                    for _ in range(self.begin.concurrency):
                        streams.create_task(self._one_after_the_other())
            else:
                await self._each_at_its_time()
        finally:
            for task in self._tasks:
                task.cancel()
            for task in [watching, *self._tasks]:
                await end_task(task)

    def report(self, probe: Probe) -> None:
        """Tell what the run cost."""
        wall, cpu = time.perf_counter() - self._started, time.process_time() - self._cpu
        self._post(Done(cpu, wall, self._lags, list(probe.waits), self.most_running))

    async def _one_after_the_other(self) -> None:
        while (job := await self.jobs.get()) is not None:
            await self._ask(job)
        self.jobs.put_nowait(None)  # for the others

    async def _each_at_its_time(self) -> None:
        while (job := await self.jobs.get()) is not None:
            wait = self.begin.origin + job.at - time.perf_counter()
            if wait > 0:
                await asyncio.sleep(wait)
            task = asyncio.create_task(self._ask(job))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        while self._tasks:
            await asyncio.wait(list(self._tasks))

    async def _ask(self, job: Job) -> None:
        begin = self.begin
        request = b"%bContent-Length: %d\r\n\r\n%b" % (begin.head, len(job.body), job.body)
        self.running += 1
        self.most_running = max(self.running, self.most_running)
        sent = time.perf_counter()
        late = 0.0 if begin.concurrency else sent - begin.origin - job.at
        result = Result(job.number, sent - begin.origin, late)
        try:
            async with asyncio.timeout(begin.timeout):
                response = await self._pool.ask(request)
        except TimeoutError:
            result.failure = f"not over after {begin.timeout:g} s"
        except StreamFailed as error:
            result.failure = str(error)
        else:
            if response.status == 200:
                reply = read_stream(response.pieces)
                result.times = [at - sent for at in reply.times]
                result.failure = reply.failure
                result.prompt_tokens, result.output_tokens = reply.prompt_tokens, reply.output_tokens
            else:
                result.failure = _refusal(response.status, b"".join(piece for _, piece in response.pieces))
        finally:
            self.running -= 1
        result.ended = time.perf_counter() - sent
        self._post(result)

    async def _watch_lag(self, pieces: int) -> None:
        tick = 0.0
        while True:
            due = time.perf_counter() + LAG_SECONDS
            await asyncio.sleep(LAG_SECONDS)
            now = time.perf_counter()
            if len(self._lags) < MAX_SAMPLES:
                self._lags.append(now - due)
            if now - tick > TICK_SECONDS:
                tick = now
                self._post(Tick(self.running, self._pool.pieces - pieces))


def _refusal(status: int, body: bytes) -> str:
    try:
        return f"status {status}: {error_text(msgspec.json.decode(body))}"
    except msgspec.MsgspecError:
        return f"status {status}"


async def _read_jobs(reader: asyncio.StreamReader, jobs: asyncio.Queue[Job | None]) -> None:
    """Returns where all that runs is to end at once."""
    while (data := await read_frame(reader)) is not None:
        match _decode(data):
            case Job() as job:
                await jobs.put(job)
            case End(at_once=True):
                return
            case End():
                await jobs.put(None)


async def _serve(probe_fd: int) -> None:
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=2**20)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    transport, protocol = await loop.connect_write_pipe(asyncio.streams.FlowControlMixin, os.fdopen(1, "wb"))
    writer = asyncio.StreamWriter(transport, protocol, None, loop)
    probe = Probe()
    await loop.create_connection(lambda: probe, sock=socket.socket(fileno=probe_fd))
    pools: dict[tuple[str, int, bool], ConnectionPool] = {}
    gc.freeze()
    while (data := await read_frame(reader)) is not None:
        match _decode(data):
            case Begin() as begin:
                address = (begin.host, begin.port, begin.tls)
                pool = pools.setdefault(address, ConnectionPool(*address))
                run = Run(begin, pool, lambda message: writer.write(frame(message)))
                await _one_run(run, reader, probe)
                await writer.drain()
            case _:
                continue  # of a run that is over
    for pool in pools.values():
        pool.close()


async def _one_run(run: Run, reader: asyncio.StreamReader, probe: Probe) -> None:
    reading = asyncio.create_task(_read_jobs(reader, run.jobs))
    working = asyncio.create_task(run.make_load(probe))
    try:
        await asyncio.wait([reading, working], return_when=asyncio.FIRST_COMPLETED)
    finally:
        await end_task(reading)
        await end_task(working)
    if not working.cancelled():
        working.result()
    run.report(probe)


if __name__ == "__main__":
    uvloop.run(_serve(int(sys.argv[1])))
