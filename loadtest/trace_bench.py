"""`make bench-trace`: what tracing costs, in processor time of the whole path, with tracing off and on in turns.

A gateway process and a process with both workers (real ones, around a model of two tiny layers, so that nearly all time
is spent on requests and not on the model) for each way: off, one request in a hundred sampled, and all. In each round
every way answers the same number of requests, in changing order; processor time is that of both processes.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import re
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
from aiohttp import web

from headrace.data_lines import DataLines, data_listener
from headrace.decode.worker import DecodeWorker
from headrace.engine.engine import Engine, EngineConfig
from headrace.kvtransfer.layout import layout_of
from headrace.loadtest.loopback import serving
from headrace.loadtest.proc import processor_seconds
from headrace.loadtest.report import Figure, publish
from headrace.loadtest.shapes import TINY, model_folder
from headrace.models.locate import locate_model
from headrace.node import ModelIdentity, join_mesh, until_stopped
from headrace.prefill.turns import OwnDevice
from headrace.prefill.worker import PrefillWorker
from headrace.processes import end_process
from headrace.redis_server import private_redis
from headrace.settings import Settings

MODEL = "smollm2"
VOCABULARY = 49152
MAX_MODEL_LEN = 96
PAGES = 512
STREAMS = 8
PROMPT, OUTPUT = 32, 16
DECISIONS = 10_000
STOP_SECONDS = 10.0
READY_SECONDS = 60.0
WAYS = {
    "off": {},
    "1 in 100": {"OTEL_TRACES_SAMPLER": "parentbased_traceidratio", "OTEL_TRACES_SAMPLER_ARG": "0.01"},
    "all": {"OTEL_TRACES_SAMPLER": "parentbased_always_on"},
}
SERVES = re.compile(rb"serves \S+ on (http://\S+)/v1")


@dataclass
class Way:
    """One mesh, and the processor seconds of a request in each round."""

    url: str
    pids: list[int]
    seconds: list[float] = field(default_factory=list)

    def processor_seconds(self) -> float:
        """Of its processes so far."""
        return sum(processor_seconds(pid) for pid in self.pids)


@dataclass
class Collector:
    """Takes what is exported and looks at none of it."""

    bytes: int = 0

    async def take(self, request: web.Request) -> web.Response:
        """POST /v1/traces and /v1/metrics."""
        self.bytes += len(await request.read())
        return web.Response(content_type="application/x-protobuf")


@asynccontextmanager
async def mesh(redis: str, namespace: str, environment: dict[str, str]) -> AsyncIterator[Way]:
    """A gateway and both workers in processes of their own."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")} | environment
    flags = ("--redis", redis, "--namespace", namespace)
    pipe = asyncio.subprocess.PIPE
    gateway = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "headrace", "gateway", "--port", "0", *flags), env=environment, stderr=pipe
    )
    workers = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "headrace.loadtest.trace_bench", "--workers", redis, namespace), env=environment
    )
    try:
        assert gateway.stderr is not None
        async with asyncio.timeout(READY_SECONDS):
            while not (found := SERVES.search(line := await gateway.stderr.readline())):
                if not line:
                    raise RuntimeError("the gateway did not start")
            url = found[1].decode()
            draining = asyncio.create_task(_drain(gateway.stderr))
            await _until_ready(url)
        yield Way(url, [gateway.pid, workers.pid])
        draining.cancel()
    finally:
        for process in (gateway, workers):
            await end_process(process, signal.SIGTERM, STOP_SECONDS)


async def _drain(log: asyncio.StreamReader) -> None:
    while await log.readline():
        pass


async def _until_ready(url: str) -> None:
    async with aiohttp.ClientSession() as http:
        while True:
            async with http.get(f"{url}/ready") as response:
                if response.status == 200:
                    return
            await asyncio.sleep(0.05)


async def workers(redis: str, namespace: str) -> None:
    """Both workers, until stopped."""
    model = await asyncio.to_thread(locate_model, MODEL)
    identity = ModelIdentity(model.name, model.fingerprint, MAX_MODEL_LEN)
    settings = Settings(redis=redis, namespace=namespace)
    with tempfile.TemporaryDirectory() as folder:
        config = EngineConfig(
            model_folder(TINY | {"vocab_size": VOCABULARY}, Path(folder)),
            device="cpu",
            dtype="float32",
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=STREAMS,
            cpu_threads=1,
            random_weights=True,
            kv_cache_bytes=PAGES * 2 * 2 * 16 * 2 * 16 * 4,  # layers, K and V, page size, heads, head size, bytes
        )
        engines = [await asyncio.to_thread(Engine.load, config) for _ in range(2)]
    layout = layout_of("tiny", engines[0].layout, VOCABULARY)
    stopped = asyncio.Event()
    async with AsyncExitStack() as stack:
        listener = await stack.enter_async_context(data_listener("127.0.0.1", None))
        decode_node = await stack.enter_async_context(join_mesh(settings, "decode", identity, listener.address))
        prefill_node = await stack.enter_async_context(join_mesh(settings, "prefill", identity))
        lines = await stack.enter_async_context(DataLines(prefill_node.registry, None))
        threads = [stack.enter_context(ThreadPoolExecutor(1)) for _ in range(2)]
        decode = DecodeWorker(decode_node, engines[0], threads[0], layout, STREAMS, listener, lines)
        turns = OwnDevice(engines[1], threads[1], 256)
        prefill = PrefillWorker(prefill_node, engines[1], layout, turns, STREAMS, settings.lease_seconds, lines, "auto")
        async with asyncio.TaskGroup() as group:
            group.create_task(decode.run(_until(stopped), 1.0))
            group.create_task(prefill.run(_until(stopped), 1.0))
            await until_stopped()
            stopped.set()


async def _until(event: asyncio.Event) -> None:
    await event.wait()


async def answer(way: Way, http: aiohttp.ClientSession, requests: int, numbers: itertools.count[int]) -> None:
    """So many requests, `STREAMS` at a time; remembers what one took of the processors."""
    left = itertools.repeat(None, requests)

    async def client() -> None:
        for _ in left:
            number = next(numbers)
            prompt = [1000 + (number * 31 + position * 7) % 40000 for position in range(PROMPT)]
            body = {"model": MODEL, "prompt": prompt, "max_tokens": OUTPUT, "min_tokens": OUTPUT, "temperature": 0}
            async with http.post(f"{way.url}/v1/completions", json=body | {"stream": True}) as response:
                assert response.status == 200, await response.text()
                async for _ in response.content:
                    pass

    before = way.processor_seconds()
    await asyncio.gather(*(client() for _ in range(STREAMS)))
    way.seconds.append((way.processor_seconds() - before) / requests)


def decision_seconds() -> float:
    """What every request pays that is not sampled: its header is looked at and the sampler asked."""
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    tracer = TracerProvider(sampler=ParentBasedTraceIdRatio(0.0), shutdown_on_exit=False).get_tracer("bench")
    propagator, headers = TraceContextTextMapPropagator(), {"Content-Type": "application/json"}
    started = time.perf_counter()
    for _ in range(DECISIONS):
        tracer.start_span("chat", propagator.extract(headers)).is_recording()
    return (time.perf_counter() - started) / DECISIONS


async def bench(rounds: int, requests: int) -> list[Figure]:
    """All figures."""
    numbers = itertools.count()
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        redis = await stack.enter_async_context(private_redis(folder))
        collector, app = Collector(), web.Application(client_max_size=2**26)
        app.add_routes([web.post("/v1/{signal}", collector.take)])
        url = await stack.enter_async_context(serving(app))
        environments = [v | ({"OTEL_EXPORTER_OTLP_ENDPOINT": url} if v else {}) for v in WAYS.values()]
        opened = [stack.enter_async_context(mesh(redis, f"trace-{i}", v)) for i, v in enumerate(environments)]
        ways = dict(zip(WAYS, await asyncio.gather(*opened), strict=True))
        http = await stack.enter_async_context(aiohttp.ClientSession())
        for way in ways.values():
            await answer(way, http, requests // 4, numbers)
            way.seconds.clear()
        for number in range(rounds):
            order = list(ways.values())
            shift = number % len(order)
            for way in order[shift:] + order[:shift]:
                await answer(way, http, requests, numbers)
    figures = [Figure("a request, tracing off", statistics.median(ways["off"].seconds) * 1000, "ms of processor time")]
    for name, target in (("1 in 100", "<= 1.01"), ("all", "")):
        ratios = [on / off for on, off in zip(ways[name].seconds, ways["off"].seconds, strict=True)]
        figures.append(Figure(f"tracing {name} over off", statistics.median(ratios), "ratio", target))
        if len(ratios) > 1:
            error = statistics.stdev(ratios) / len(ratios) ** 0.5
            figures.append(Figure(f"tracing {name}, standard error", error, "ratio"))
    decision, off = decision_seconds(), statistics.median(ways["off"].seconds)
    reckoned = 1 + (statistics.median(ratios) - 1) / 100 + decision / off  # the last ratios are those of `all`
    figures.append(Figure("deciding that a request is not sampled", decision * 1e6, "us"))
    figures.append(Figure("tracing 1 in 100 over off, from `all` and that", reckoned, "ratio"))
    return [
        *figures,
        Figure("rounds", rounds, f"of {requests} requests a way"),
        Figure("exported", collector.bytes / 1e3, "kB"),
    ]


def main() -> None:
    """Parse the command line, measure, write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two short rounds")
    parser.add_argument("--rounds", type=int, help="interleaved rounds")
    parser.add_argument("--workers", nargs=2, metavar=("REDIS", "NAMESPACE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.workers:
        asyncio.run(workers(*options.workers))
        return
    rounds = options.rounds or (2 if options.quick else 24)
    publish("trace", asyncio.run(bench(rounds, 48 if options.quick else 400)))


if __name__ == "__main__":
    main()
