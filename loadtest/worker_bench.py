"""Decode steps through the decode worker's real loop, over those of the bare engine in the same process.

The worker is the real one, with random weights. This process stands for its prefill worker, which hands prompts over
without computing them (what the pages hold changes no kernel's time), and for the gateway, which takes the tokens.
A step's time is that between two messages of tokens as they arrive here, over a window in which all requests run.
Then the bare engine runs as many steps from the same contexts, request by request.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import multiprocessing
import statistics
import tempfile
import time
from collections import deque
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from headrace.data_lines import DataLines, data_listener
from headrace.decode import step_runner
from headrace.decode.worker import DecodeWorker
from headrace.engine.decode_batch import RunningBatch, new_batch
from headrace.engine.device_thread import DeviceThread
from headrace.engine.engine import Engine
from headrace.engine.step_tokens import StepTokens
from headrace.kvtransfer.layout import layout_of
from headrace.loadtest.engine_bench import INPUT, OUTPUT, Shape, decode_step_seconds, load
from headrace.loadtest.report import Figure, publish
from headrace.loadtest.shapes import LLAMA_8B, TINY
from headrace.loadtest.stand_ins import DECODE, FINGERPRINT, SETTLED_TOKENS, Extent, Prompts, Tokens
from headrace.node import ModelIdentity, join_mesh
from headrace.redis_server import private_redis
from headrace.settings import Settings
from headrace.tasks import run_beside

BATCHES = (1, 64, 256)
LONGEST = INPUT + 2 * OUTPUT
MODEL = ModelIdentity("random", FINGERPRINT, LONGEST)
MAX_TIMES = 4096
STOP_SECONDS = 30.0


FULL = Extent(rounds=3, steps=OUTPUT, most_behind=192)
QUICK = Extent(rounds=1, steps=32, most_behind=256)


@dataclass(frozen=True)
class HostTimes:
    """Medians of one step, in seconds, on the device's thread. Turning a step's result into a list is not in them."""

    turn: float
    """From the tokens of one step to the start of the next: applied, sent, scheduled, with both changes of thread."""
    start: float
    """To start a step: on a GPU, until all is launched; on a CPU, with its computation."""


class TimedBatch:
    """A `RunningBatch` and when its steps were started and collected."""

    def __init__(self, batch: RunningBatch[Any]) -> None:
        self._batch = batch
        self._collected = 0.0
        self.turns: deque[tuple[int, float]] = deque(maxlen=MAX_TIMES)
        """(requests, seconds)."""
        self.starts: deque[tuple[int, float]] = deque(maxlen=MAX_TIMES)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batch, name)

    def __len__(self) -> int:
        return len(self._batch)

    def start(self, *drafts: Any) -> None:
        """See `RunningBatch`."""
        started = time.perf_counter()
        self.turns.append((len(self), started - self._collected))
        self._batch.start(*drafts)
        self.starts.append((len(self), time.perf_counter() - started))

    def collect(self) -> StepTokens[Any]:
        """See `RunningBatch`."""
        tokens = self._batch.collect()
        self._collected = time.perf_counter()
        return tokens

    def host_times(self, requests: int) -> HostTimes | None:
        """Of steps of so many requests, if there were any."""
        turn, start = ([seconds for rows, seconds in took if rows == requests] for took in (self.turns, self.starts))
        return HostTimes(statistics.median(turn), statistics.median(start)) if turn else None


def serve(connection: Connection, url: str, shape: Shape) -> None:
    """The decode worker's process. It gives the cache's shape when it serves, then bare steps for contexts."""
    asyncio.run(_serve(connection, url, shape))


async def _serve(connection: Connection, url: str, shape: Shape) -> None:
    loop = asyncio.get_running_loop()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    batches: list[TimedBatch] = []

    def timed_batch(engine: Engine) -> Any:
        batches.append(TimedBatch(new_batch(engine)))
        return batches[-1]

    with DeviceThread() as device_thread:
        largest = max(batch for batch, _ in shape.decode)
        engine, _ = await loop.run_in_executor(device_thread, load, shape, largest, device, LONGEST)
        layout = layout_of(MODEL.fingerprint, engine.layout, engine.model_config.vocab_size)
        settings = Settings(redis=url, worker_id=DECODE)
        async with (
            data_listener("127.0.0.1", None) as listener,
            join_mesh(settings, "decode", MODEL, listener.address) as node,
            DataLines(node.registry, None) as lines,
        ):
            with patch.object(step_runner, "new_batch", timed_batch):
                worker = DecodeWorker(node, engine, device_thread, layout, largest, listener, lines)
                stopped: asyncio.Future[None] = loop.create_future()
                running = asyncio.create_task(worker.run(stopped, 5.0))
                connection.send((engine.layout, engine.model_config.vocab_size))
                while asked := await asyncio.to_thread(connection.recv):
                    contexts, steps = asked
                    # all tokens have left, the last step may still run
                    while engine.pool.num_in_use:  # noqa: ASYNC110 (the pool tells nobody)
                        await asyncio.sleep(0.01)
                    bare = await loop.run_in_executor(device_thread, decode_step_seconds, engine, contexts, steps)
                    connection.send((bare, batches[-1].host_times(len(contexts))))
                stopped.set_result(None)
                await running


async def measure(shape: Shape, extent: Extent, redis: str | None) -> list[Figure]:
    """All figures. `redis` is its URL; without one, a private server is started."""
    with tempfile.TemporaryDirectory() as folder:
        async with contextlib.nullcontext(redis) if redis else private_redis(Path(folder)) as url:
            here, there = multiprocessing.Pipe()
            process = multiprocessing.get_context("spawn").Process(target=serve, args=(there, url, shape), daemon=True)
            process.start()
            there.close()
            layout, vocab_size = await asyncio.to_thread(here.recv)
            async with (
                join_mesh(Settings(redis=url, worker_id="gateway"), "gateway", MODEL) as gateway,
                join_mesh(Settings(redis=url, worker_id="prefill"), "prefill", MODEL) as prefill,
                DataLines(prefill.registry, None) as lines,
            ):
                tokens = Tokens(gateway)
                prompts = Prompts(prefill, lines, layout, vocab_size, gateway.id)
                work = _measure_all(here, tokens, prompts, [batch for batch, _ in shape.decode], extent)
                figures = await run_beside(work, [tokens.hear(), prompts.hear(), prompts.renew()])
            here.send(None)
            await asyncio.to_thread(process.join, STOP_SECONDS)
    return figures


async def _measure_all(
    worker: Connection, tokens: Tokens, prompts: Prompts, batches: list[int], extent: Extent
) -> list[Figure]:
    async def run(requests: list[str], max_tokens: int) -> None:
        handing = [prompts.hand_over(request, number, max_tokens) for number, request in enumerate(requests)]
        await asyncio.gather(*handing)

    async def bare(contexts: list[int]) -> tuple[float, HostTimes | None]:
        worker.send((contexts, extent.steps))
        answer: tuple[float, HostTimes | None] = await asyncio.to_thread(worker.recv)
        return answer

    first = [f"first-{number}" for number in range(max(batches))]
    await run(first, 2)  # brings the pages; from now on the worker knows the prompts, and requests start together
    await tokens.until(first, 2)
    figures = []
    for batch in batches:
        loops, bares, host = [], [(await bare([INPUT + SETTLED_TOKENS] * batch))[0]], None
        for number in range(extent.rounds):
            requests = [f"{batch}-{number}-{row}" for row in range(batch)]
            handing = asyncio.create_task(run(requests, extent.max_tokens))
            seconds, contexts = await tokens.window(requests, extent)
            await handing
            await tokens.until(requests, extent.max_tokens)
            loops.append(seconds)
            seconds, host = await bare(contexts)
            bares.append(seconds)
        assert host is not None, "there was no step of all requests"
        figures += _figures(f"batch {batch}", statistics.mean(loops), bares, host)
    return figures


def _figures(name: str, loop: float, bares: list[float], host: HostTimes) -> list[Figure]:
    """Targets are for a GPU, where the next step is under way before the tokens of this one are read."""
    like = statistics.mean(bares[1:])
    on_gpu = torch.cuda.is_available()
    figures = [
        Figure(f"{name}, through the worker", loop * 1e3, "ms a step"),
        Figure(f"{name}, bare, same contexts", like * 1e3, "ms a step"),
        Figure(f"{name}, bare before, all contexts {INPUT + SETTLED_TOKENS}", bares[0] * 1e3, "ms a step"),
        Figure(f"{name}, slowest bare over fastest", max(bares[1:]) / min(bares[1:]), "ratio"),
        Figure(f"{name}, worker over bare", loop / like, "ratio", "<= 1.03" if on_gpu else ""),
        Figure(f"{name}, from a step's tokens to the next start", host.turn * 1e6, "us"),
    ]
    if on_gpu:
        figures.append(Figure(f"{name}, start of a step", host.start * 1e6, "us"))
        figures.append(Figure(f"{name}, host time a step", (host.turn + host.start) * 1e6, "us", "<= 150"))
    return figures


def main() -> None:
    """Measure and publish."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tiny model, on whatever device there is")
    parser.add_argument("--redis", metavar="URL", help="of a server to use (default: start one)")
    options = parser.parse_args()
    quick = options.quick
    on_gpu = torch.cuda.is_available()
    if not on_gpu and not quick:
        parser.error("this machine has no GPU; --quick runs a tiny model on the CPU")
    batches = tuple((batch, "") for batch in BATCHES)
    shape = Shape("tiny", TINY, batches, options={"cpu_threads": 1}) if quick else Shape("8B", LLAMA_8B, batches)
    figures = asyncio.run(measure(shape, QUICK if quick else FULL, options.redis))
    publish("worker-quick" if quick else "worker", figures, card=torch.cuda.get_device_name() if on_gpu else None)


if __name__ == "__main__":
    main()
