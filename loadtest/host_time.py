"""`make bench-host`: what a decode step costs the host beside the model, by the number of requests; on any machine.

A real decode worker, its mesh and a process that stands for the gateway, around a GPU's batch whose steps have ended
when they are started. What is left is a step's tokens collected, taken and sent and the next step scheduled, with both
changes of thread. `changing`: at each step a request ends and another joins. `to the next start`: steps take a while,
which needs no processor, and what counts is the time from a step's tokens on.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import statistics
import tempfile
import time
from collections import deque
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import patch

import torch
import uvloop

from headrace.data_lines import DataLines, data_listener
from headrace.decode import step_runner
from headrace.decode.worker import DecodeWorker
from headrace.engine.arriving import ArrivingTokens
from headrace.engine.device_thread import DeviceThread
from headrace.engine.engine import Engine
from headrace.engine.graph_batch import GraphBatch, _Running
from headrace.engine.step_tokens import StepTokens
from headrace.kvtransfer.host import this_host
from headrace.kvtransfer.incoming import ReceivedRequest
from headrace.kvtransfer.layout import layout_of
from headrace.kvtransfer.messages import Commit, Offer
from headrace.loadtest.engine_bench import Shape, load
from headrace.loadtest.report import Figure, publish
from headrace.loadtest.shapes import TINY
from headrace.loadtest.stand_ins import FINGERPRINT, Tokens
from headrace.messages.request import SamplingParams
from headrace.node import ModelIdentity, join_mesh
from headrace.redis_server import private_redis
from headrace.settings import Settings

BATCHES = (1, 8, 64, 256)
PROMPT, STEPS = 32, 1000
STEP_SECONDS = 0.0006
"""Of a step that takes a while."""
MODEL = ModelIdentity("random", FINGERPRINT, PROMPT + STEPS)
SHAPE = Shape("tiny", TINY | {"max_position_embeddings": 2 * STEPS}, (), options={"cpu_threads": 1})


class ReadyBatch(GraphBatch[Any]):
    """A GPU's batch without the GPU. Every token is 1, and what changed is sent nowhere."""

    def __init__(self, engine: Engine, rows: int, step_seconds: float) -> None:
        """`rows`: of a full batch, whose steps are timed. A step takes `step_seconds` of nobody's time."""
        block_table = torch.empty(rows, engine.pool.pages_for(engine.max_model_len))
        super().__init__(engine, cast(Any, SimpleNamespace(block_table=block_table, state=None, limits=None)))
        self._ones = torch.ones(rows, dtype=torch.int64)
        self._step_seconds = step_seconds
        self._ends = deque[float]()
        """Of steps that are under way."""
        self._since = 0.0
        self.host_seconds: list[float] = []
        """From the start of a step, or from its tokens if it takes a while, to the start of the next."""

    def start(self, *drafts: Any) -> None:
        """See `RunningBatch`."""
        now, rows = time.perf_counter(), len(self)
        if rows == len(self._ones) and self._since:
            self.host_seconds.append(now - self._since)
        self._table_changes.clear()
        if self._members_changed:
            self._members, self._members_changed = tuple(self._keys), False
        self._running.append(_Running(self._members, ArrivingTokens(self._ones[:rows], {})))
        self._since = time.perf_counter() if rows == len(self._ones) else 0.0
        if self._step_seconds:
            self._ends.append(max([time.perf_counter(), *self._ends]) + self._step_seconds)

    def collect(self) -> StepTokens[Any]:
        """See `RunningBatch`."""
        if self._step_seconds:
            time.sleep(max(self._ends.popleft() - time.perf_counter(), 0.0))
        tokens = super().collect()
        if self._step_seconds:
            self._since = time.perf_counter()
        return tokens


def hear(url: str) -> None:
    """The process that stands for the gateway, until it is ended."""

    async def serve() -> None:
        async with join_mesh(Settings(redis=url, worker_id="gateway"), "gateway", MODEL) as node:
            await Tokens(node).hear()

    uvloop.run(serve())


def received(engine: Engine, number: int, max_tokens: int) -> ReceivedRequest:
    """A request as the receiver hands it over."""
    offer = Offer(
        request_id=f"chatcmpl-{number:024x}.0",
        attempt=0,
        gateway="gateway",
        layout=layout_of(FINGERPRINT, engine.layout, engine.model_config.vocab_size),
        token_ids=[1] * PROMPT,
        generated=0,
        sampling=SamplingParams(max_tokens=max_tokens, temperature=0, stop_token_ids=(2, 3)),
        deadline=time.time() + 600,
        host=this_host(),
    )
    commit = Commit(request_id=offer.request_id, attempt=0, sequence=0, token_id=1, logprobs=None)
    pages = engine.pool.allocate(engine.pool.pages_for(PROMPT))
    return ReceivedRequest(offer, pages, commit, [*offer.token_ids], 0)


async def measure(
    engine: Engine, thread: DeviceThread, url: str, rows: int, changing: bool, step_seconds: float = 0.0
) -> list[float]:
    """Seconds of each step of a full batch of so many requests."""
    settings, batches = Settings(redis=url, worker_id="decode"), list[ReadyBatch]()

    def ready_batch(engine: Engine) -> ReadyBatch:
        batches.append(ReadyBatch(engine, rows, step_seconds))
        return batches[-1]

    layout = layout_of(FINGERPRINT, engine.layout, engine.model_config.vocab_size)
    async with (
        data_listener("127.0.0.1", None) as listener,
        join_mesh(settings, "decode", MODEL, listener.address) as node,
        DataLines(node.registry, None) as lines,
    ):
        while not node.registry.tier("gateway"):  # noqa: ASYNC110 (it comes once)
            await asyncio.sleep(0.1)
        with patch.object(step_runner, "new_batch", ready_batch):
            worker = DecodeWorker(node, engine, thread, layout, rows, listener, lines)
            lengths = [STEPS - 16] * rows
            if changing:  # one of the first ends at each step, and so does one of those that take their places
                lengths = [2 + number for number in range(rows)] + [rows] * (STEPS - rows)
            for number, length in enumerate(lengths):
                worker._start_decoding(received(engine, number, length))
            stopped = asyncio.get_running_loop().create_future()
            running = asyncio.create_task(worker.run(stopped, 60.0))
            while worker._scheduler.has_work:  # noqa: ASYNC110 (the scheduler tells nobody)
                await asyncio.sleep(0.05)
            stopped.set_result(None)
            await running
    return batches[0].host_seconds[16:]


async def measure_all(rounds: int) -> list[Figure]:
    """All figures; each of `rounds` rounds has all batches in turn."""
    loop, seconds = asyncio.get_running_loop(), dict[str, list[float]]()
    with tempfile.TemporaryDirectory() as folder, DeviceThread() as thread:
        engine, _ = await loop.run_in_executor(thread, load, SHAPE, max(BATCHES), "cpu", PROMPT + STEPS)
        async with private_redis(Path(folder)) as url:
            gateway = multiprocessing.get_context("spawn").Process(target=hear, args=(url,), daemon=True)
            gateway.start()
            full = [(max(BATCHES), changing, took) for took in (0.0, STEP_SECONDS) for changing in (False, True)]
            for rows, changing, took in [*[(rows, False, 0.0) for rows in BATCHES[:-1]], *full]:
                name = f"batch {rows}" + ", changing" * changing + ", to the next start" * (took > 0)
                for _ in range(rounds):
                    seconds.setdefault(name, []).extend(await measure(engine, thread, url, rows, changing, took))
            gateway.terminate()
            await asyncio.to_thread(gateway.join)
    figures = []
    for name, found in seconds.items():
        figures.append(Figure(f"{name}, host time a step, least of {len(found)}", min(found) * 1e6, "us"))
        figures.append(Figure(f"{name}, median", statistics.median(found) * 1e6, "us"))
    return figures


def main() -> None:
    """Measure and publish."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one round of each instead of four")
    quick = parser.parse_args().quick
    publish("host-quick" if quick else "host", uvloop.run(measure_all(1 if quick else 4)))


if __name__ == "__main__":
    main()
