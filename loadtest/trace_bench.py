"""`make bench-trace`: what tracing costs, in processor time of the whole path, with tracing off and on in turns.

A mesh around synthetic engines, whose steps sleep, for each way: off, one request in a hundred sampled, and all.
In each round every way answers the same number of requests, in changing order; processor time is that of the gateway
and both workers.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import statistics
import tempfile
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
from aiohttp import web

from headrace.loadtest.local_mesh import LocalMesh, local_mesh
from headrace.loadtest.loopback import serving
from headrace.loadtest.proc import processor_seconds
from headrace.loadtest.prompts import unique_tokens
from headrace.loadtest.report import Figure, publish
from headrace.loadtest.timed_stream import completion, timed_stream
from headrace.scaling.step_costs import Cost, StepCosts

MODEL = "smollm2"
STREAMS = 8
PROMPT, OUTPUT = 32, 16
DECISIONS = 10_000
COSTS = StepCosts(machine="none", prefill=Cost([(1, 0.002)]), decode=Cost([(1, 0.005)]))
"""So long that all streams are in each step."""
WAYS = {
    "off": {},
    "1 in 100": {"OTEL_TRACES_SAMPLER": "parentbased_traceidratio", "OTEL_TRACES_SAMPLER_ARG": "0.01"},
    "all": {"OTEL_TRACES_SAMPLER": "parentbased_always_on"},
}


@dataclass
class Way:
    """One mesh, and the processor seconds of a request in each round."""

    mesh: LocalMesh
    seconds: list[float] = field(default_factory=list)

    async def answer(self, http: aiohttp.ClientSession, requests: int, numbers: itertools.count[int]) -> None:
        """So many requests, `STREAMS` at a time; remembers what one took of the processors."""
        left = itertools.repeat(None, requests)

        async def client() -> None:
            for _ in left:
                body = completion(MODEL, unique_tokens(PROMPT, next(numbers)), OUTPUT)
                await timed_stream(http, body, url=self.mesh.url)

        before = self._processor_seconds()
        await asyncio.gather(*(client() for _ in range(STREAMS)))
        self.seconds.append((self._processor_seconds() - before) / requests)

    def _processor_seconds(self) -> float:
        return sum(map(processor_seconds, self.mesh.pids.values()))


@dataclass
class Collector:
    """Takes what is exported and looks at none of it."""

    bytes: int = 0

    async def take(self, request: web.Request) -> web.Response:
        """POST /v1/traces and /v1/metrics."""
        self.bytes += len(await request.read())
        return web.Response(content_type="application/x-protobuf")


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
        costs = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "costs.json"
        COSTS.write(costs)
        collector, app = Collector(), web.Application(client_max_size=2**26)
        app.add_routes([web.post("/v1/{signal}", collector.take)])
        url = await stack.enter_async_context(serving(app))
        plain = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
        ways: dict[str, Way] = {}
        for name, sampler in WAYS.items():
            environment = plain | sampler | ({"OTEL_EXPORTER_OTLP_ENDPOINT": url} if sampler else {})
            mesh = local_mesh("--load-format", "synthetic", "--step-costs", str(costs), environment=environment)
            ways[name] = Way(await stack.enter_async_context(mesh))
        http = await stack.enter_async_context(aiohttp.ClientSession())
        for way in ways.values():
            await way.answer(http, requests // 4, numbers)
            way.seconds.clear()
        for number in range(rounds):
            order = list(ways.values())
            shift = number % len(order)
            for way in order[shift:] + order[:shift]:
                await way.answer(http, requests, numbers)
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
    rounds, requests = (2, 48) if parser.parse_args().quick else (24, 400)
    publish("trace", asyncio.run(bench(rounds, requests)))


if __name__ == "__main__":
    main()
