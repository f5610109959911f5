"""Handing pages over between two processes, by the real sender, receiver and data lines, in the shape of Llama 3.1 8B.

The copy alone: 256 MiB out of the other process's cache on the same GPU, beside a copy within one process. And what a
handoff adds to the time to first token of a 2,048-token prompt, whose layers travel while later ones are computed: the
time from the first token until the receiver has acknowledged all pages. Each handoff's bytes are compared at its end.

`python -m headrace.loadtest.kv_gpu` writes loadtest/results/kv_gpu.json; where there is a second GPU, the receiver is
measured there, too, where sender and receiver do not take turns. `--quick` runs the same code on a CPU, with a tiny
model and other transports.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import queue
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from headrace.engine.base import Ready
from headrace.engine.engine import Engine, EngineConfig, PrefillChunk
from headrace.engine.kv_cache import CacheLayout, KVCache, OpenedCache
from headrace.engine.page_copier import PageCopier
from headrace.kernels.copy_pages import copy_blocks
from headrace.kvtransfer.messages import TransportName
from headrace.kvtransfer.segments import Segment
from headrace.loadtest.kv_pair import Pair, PairConfig, pair
from headrace.loadtest.report import Figure, publish
from headrace.loadtest.shapes import LLAMA_8B, TINY, model_folder
from headrace.messages.request import SamplingParams

WARM_UPS = 3


@dataclass(frozen=True)
class Way:
    """Pages to a process whose cache lies on `device`, with a target for what is exposed, over the prefill."""

    name: str
    transport: TransportName
    device: str
    target: str


@dataclass(frozen=True)
class Case:
    """What is measured."""

    model: dict[str, Any]
    device: str
    dtype: str
    prompt: int
    num_pages: int
    """In each layer of either cache."""
    repeats: int
    ways: tuple[Way, ...]
    page_size: int = 16

    @property
    def layout(self) -> CacheLayout:
        """Of both caches."""
        model = self.model
        layers, heads = model["num_hidden_layers"], model["num_key_value_heads"]
        return CacheLayout(self.dtype, layers, heads, model["head_dim"], self.page_size)

    @property
    def prompt_pages(self) -> int:
        """Of each layer."""
        return self.prompt // self.page_size


def on_gpu() -> Case:
    """The real one."""
    ways = [Way("cuda_ipc", "cuda_ipc", "cuda", "<= 0.05"), Way("shm", "shm", "cuda", "<= 0.15")]
    if torch.cuda.device_count() > 1:
        ways += [replace(way, name=f"{way.name}, two GPUs", device="cuda:1") for way in ways]
    return Case(LLAMA_8B, "cuda", "bfloat16", prompt=2048, num_pages=1024, repeats=15, ways=tuple(ways))


def on_cpu() -> Case:
    """To try the code."""
    ways = (Way("shm", "shm", "cpu", ""), Way("tcp", "tcp", "cpu", ""))
    return Case(TINY, "cpu", "float32", prompt=512, num_pages=128, repeats=3, ways=ways)


def load(case: Case) -> Engine:
    """An engine with random weights and a cache full of random numbers."""
    with tempfile.TemporaryDirectory() as folder:
        config = EngineConfig(
            model_folder(case.model, Path(folder)),
            device=case.device,
            dtype=case.dtype,
            max_model_len=case.num_pages * case.page_size // 2,
            kv_cache_bytes=case.num_pages * case.layout.num_layers * case.layout.page_bytes,
            random_weights=True,
        )
        engine = Engine.load(config)
    engine.cache.pages.normal_()
    engine.warm_up()
    return engine


def random_pages(case: Case, seed: int) -> list[int]:
    """A prompt's pages in a cache that has been in use for a while: anywhere."""
    return random.Random(seed).sample(range(case.num_pages), case.prompt_pages)


def copying_process(connection: Connection, case: Case) -> None:
    """Opens the sender's cache and copies a prompt's pages, all layers at once, again and again."""
    cache = KVCache(case.layout, case.num_pages, torch.device(case.device))
    num_blocks = case.layout.num_layers * case.num_pages
    shared = json.loads(connection.recv_bytes())
    if shared is None:
        memory = torch.zeros(num_blocks, case.layout.page_bytes, dtype=torch.uint8)
        copier = PageCopier(cache.pages.view(num_blocks, -1).view(torch.uint8))
        opened = OpenedCache(memory, copier, case.num_pages)
    else:
        found = cache.open(shared["device"], bytes.fromhex(shared["handle"]), shared["offset"], num_blocks)
        assert found is not None
        opened = found
    done: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()
    theirs, mine = random_pages(case, 1), random_pages(case, 2)
    parts = [
        opened.part([layer * case.num_pages + page for page in theirs], range(layer, layer + 1), mine, done.put)
        for layer in range(case.layout.num_layers)
    ]

    def submit_all() -> None:
        for part in parts:
            opened.copier.submit(part)
        for _ in parts:
            assert done.get() is None

    seconds = median_seconds(lambda: opened.copier.copy(parts), case)
    submitted = median_seconds(submit_all, case)
    moves = torch.cat([torch.from_numpy(part.moves) for part in parts]).to(cache.pages.device)
    target = cache.pages.view(num_blocks, -1).view(torch.uint8)
    kernel = median_seconds(lambda: copy_blocks(parts[0].source, target, moves), case)
    sums = checksums(cache, mine)
    times = {"seconds": seconds, "submitted": submitted, "kernel": kernel}
    connection.send_bytes(json.dumps(times | {"sums": sums}).encode())
    connection.recv_bytes()


def checksums(cache: KVCache, pages: list[int]) -> list[int]:
    """One a layer."""
    return [int(layer[pages].view(torch.int16).long().sum()) for layer in cache.pages]


def median_seconds(run: Callable[[], object], case: Case) -> float:
    """Of some runs, each from and to an idle device."""

    def wait() -> None:
        if case.device == "cuda":
            torch.cuda.synchronize()

    times = []
    for _ in range(WARM_UPS + case.repeats):
        wait()
        started = time.perf_counter()
        run()
        wait()
        times.append(time.perf_counter() - started)
    return statistics.median(times[WARM_UPS:])


def copy_figures(engine: Engine, case: Case) -> list[Figure]:
    """The copy alone."""
    size = case.prompt_pages * case.layout.num_layers * case.layout.page_bytes
    source = torch.ones(size // 8, dtype=torch.int64, device=case.device)
    target = torch.empty_like(source)
    plain = median_seconds(lambda: target.copy_(source), case)
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=copying_process, args=(there, case), daemon=True)
    process.start()
    there.close()
    shared = engine.cache.share()
    if shared is None:
        assert case.device == "cpu", "the driver shares no memory"
        here.send_bytes(b"null")
    else:
        device, handle, offset = shared
        here.send_bytes(json.dumps({"device": device, "handle": handle.hex(), "offset": offset}).encode())
    answer = json.loads(here.recv_bytes())
    if shared is not None:
        assert answer["sums"] == checksums(engine.cache, random_pages(case, 1)), "other bytes arrived"
    here.send_bytes(b"null")
    process.join()
    mib = size / 2**20
    return [
        Figure(f"copy within a process, {mib:.0f} MiB", size / plain / 1e9, "GB/s"),
        Figure(f"copy between processes, {mib:.0f} MiB, all layers at once", size / answer["seconds"] / 1e9, "GB/s"),
        Figure("of it, the kernel alone", size / answer["kernel"] / 1e9, "GB/s"),
        Figure("the same, a message a layer, by the copier's thread", size / answer["submitted"] / 1e9, "GB/s"),
        Figure("4 cuda_ipc over a copy within a process", plain / answer["seconds"], "ratio", ">= 0.7"),
    ]


@dataclass(frozen=True)
class Times:
    """Of one prompt, in seconds."""

    alone: float
    """A prefill without a handoff."""
    computing: float
    """One with a handoff, to its first token."""
    exposed: float
    """From the first token to the receiver's acknowledgement."""


class Prompts:
    """Prefills on a thread of their own, as in a prefill worker."""

    def __init__(self, engine: Engine, case: Case, device_thread: ThreadPoolExecutor) -> None:
        self._engine = engine
        self._case = case
        self._device_thread = device_thread
        self._count = 0
        self.pages = random_pages(case, 3)

    async def prefill(self, on_layer: Callable[[int, Ready | None], None] | None = None) -> tuple[int, float]:
        """Compute a new prompt. Returns its first token and the seconds."""
        numbers = random.Random(self._count)
        self._count += 1
        tokens = [numbers.randrange(self._case.model["vocab_size"]) for _ in range(self._case.prompt)]
        chunk = PrefillChunk(tokens, 0, len(tokens), self.pages, SamplingParams(max_tokens=1, temperature=0))
        loop = asyncio.get_running_loop()
        started = time.perf_counter()
        (output,) = await loop.run_in_executor(self._device_thread, self._engine.prefill, [chunk], on_layer)
        seconds = time.perf_counter() - started
        assert output.token is not None
        return output.token.token_id, seconds

    async def hand_over(self, both: Pair) -> Times:
        """One prompt alone, then another one with its handoff, both right after one: a device that has been idle for a
        while, as it is while bytes are compared, runs at another clock.
        """
        await self.prefill()
        _, alone = await self.prefill()
        loop = asyncio.get_running_loop()
        handoff = both.handoff(self.pages)

        def on_layer(layer: int, ready: Ready | None) -> None:
            loop.call_soon_threadsafe(handoff.layer_ready, Segment(layer, 0, len(self.pages), ready))

        delivering = asyncio.create_task(both.deliver(handoff))
        token_id, computing = await self.prefill(on_layer)
        handoff.finish(token_id, None)
        await delivering
        assert await both.arrived_right(self.pages), "other bytes arrived"
        return Times(alone, computing, handoff.timings.acknowledged - handoff.timings.computed)


async def handoff_figures(engine: Engine, case: Case, way: Way) -> list[Figure]:
    """Of one transport."""
    config = PairConfig(case.layout, case.num_pages, way.transport, way.device)
    with ThreadPoolExecutor(1) as device_thread:
        async with pair(config, engine.cache) as both:
            prompts = Prompts(engine, case, device_thread)
            times = [await prompts.hand_over(both) for _ in range(WARM_UPS + case.repeats)][WARM_UPS:]
            whole = [await both.transfer(case.prompt_pages) for _ in range(WARM_UPS + case.repeats)][WARM_UPS:]
            assert await both.arrived_right(range(case.prompt_pages)), "other bytes arrived"
    alone = statistics.median(one.alone for one in times)
    added = statistics.median((one.computing + one.exposed - one.alone) / one.alone for one in times)
    exposed = statistics.median(one.exposed for one in times)
    size = case.prompt_pages * case.layout.num_layers * case.layout.page_bytes
    return [
        Figure(f"{way.name}: prefill alone", alone * 1000, "ms"),
        Figure(
            f"{way.name}: prefill while pages travel", statistics.median(one.computing for one in times) * 1000, "ms"
        ),
        Figure(f"{way.name}: exposed after the first token", exposed * 1000, "ms"),
        Figure(f"{way.name}: longest of {case.repeats}", max(one.exposed for one in times) * 1000, "ms"),
        Figure(f"3 exposed over prefill, {case.prompt} tokens, {way.name}", exposed / alone, "ratio", way.target),
        Figure(f"{way.name}: all that the handoff adds to the first token, over prefill", added, "ratio"),
        Figure(f"{way.name}: the same", added * alone * 1000, "ms"),
        Figure(
            f"{way.name}: Offer to Ack, {size / 2**20:.0f} MiB that are there",
            size / statistics.median(whole) / 1e9,
            "GB/s",
        ),
    ]


def main() -> None:
    """Measure and publish."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="on a CPU, to try the code")
    quick = parser.parse_args().quick
    case = on_cpu() if quick else on_gpu()
    engine = load(case)
    figures = copy_figures(engine, case)
    for way in case.ways:
        figures += asyncio.run(handoff_figures(engine, case, way))
    engine.cache.close()
    publish("kv_gpu-quick" if quick else "kv_gpu", figures, card=None if quick else torch.cuda.get_device_name())


if __name__ == "__main__":
    main()
