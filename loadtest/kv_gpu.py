"""Handing pages over between two processes that share one GPU, in the shape of Llama 3.1 8B.

The copy alone: 256 MiB out of the other process's cache, beside a copy within one process. And what a handoff adds to
the time to first token: a 2,048-token prompt whose layers the other process copies while later ones are computed.
Layers are announced over a pipe here, where workers use a data line.

`python -m headrace.loadtest.kv_gpu` writes loadtest/results/kv_gpu.json.
"""

from __future__ import annotations

import json
import multiprocessing
import queue
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from headrace.engine.base import Ready
from headrace.engine.engine import Engine, EngineConfig, PrefillChunk
from headrace.engine.kv_cache import CacheLayout, KVCache
from headrace.loadtest.report import Figure, publish
from headrace.loadtest.shapes import LLAMA_8B, model_folder
from headrace.messages.request import SamplingParams

COPIED_BYTES = 256 * 2**20
PROMPT = 2048
PAGE_SIZE = 16
LAYERS = int(LLAMA_8B["num_hidden_layers"])
PAGES = 4096
"""In each layer of either cache: 256 MiB."""
REPEATS = 15
LAYOUT = CacheLayout("bfloat16", LAYERS, LLAMA_8B["num_key_value_heads"], LLAMA_8B["head_dim"], PAGE_SIZE)


def receive(connection: Connection) -> None:
    """The receiving process: opens the sender's cache and copies what it is told to."""
    layout = CacheLayout("bfloat16", LAYERS, LAYOUT.num_kv_heads, LAYOUT.head_dim, PAGE_SIZE)
    cache = KVCache(layout, PAGES, torch.device("cuda"))
    shared = json.loads(connection.recv_bytes())
    opened = cache.open(shared["device"], bytes.fromhex(shared["handle"]), shared["offset"], LAYERS * PAGES)
    assert opened is not None
    connection.send_bytes(b"{}")
    while order := json.loads(connection.recv_bytes()):
        times = []
        for _ in range(order.get("repeats", 1)):
            started = time.perf_counter()
            for layer in order["layers"]:
                first = layer * PAGES
                opened.copy([first + page for page in order["pages"]], layer, order["pages"])
            times.append(time.perf_counter() - started)
        sums = {}
        if order.get("check"):
            sums = {
                layer: int(cache.pages[layer, order["pages"]].view(torch.int16).long().sum())
                for layer in order["layers"]
            }
        connection.send_bytes(json.dumps({"seconds": statistics.median(times), "sums": sums}).encode())


class Receiver:
    """The other process, seen from this one."""

    def __init__(self, cache: KVCache) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=receive, args=(theirs,), daemon=True)
        self._process.start()
        shared = cache.share()
        assert shared is not None, "the driver shares no memory"
        device, handle, offset = shared
        self.ask({"device": device, "handle": handle.hex(), "offset": offset})

    def ask(self, order: dict[str, Any]) -> dict[str, Any]:
        """Send an order and wait for the answer."""
        self._connection.send_bytes(json.dumps(order).encode())
        answer: dict[str, Any] = json.loads(self._connection.recv_bytes())
        return answer

    def close(self) -> None:
        """End the process."""
        self._connection.send_bytes(b"null")
        self._process.join(30)


def device_copy_seconds() -> float:
    """A copy of `COPIED_BYTES` from device memory to device memory."""
    source = torch.empty(COPIED_BYTES // 8, dtype=torch.int64, device="cuda").random_()
    target = torch.empty_like(source)
    return _median_seconds(lambda: target.copy_(source))


def _median_seconds(run: Callable[[], object]) -> float:
    times = []
    for _ in range(REPEATS):
        torch.cuda.synchronize()
        started = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def exposed_seconds(engine: Engine, receiver: Receiver, pages: list[int]) -> tuple[float, float]:
    """(time of the prefill, time from its first token until the last page is there), medians."""
    tokens = [(31 * i) % 1000 for i in range(PROMPT)]
    chunk = PrefillChunk(tokens, 0, PROMPT, pages, SamplingParams(max_tokens=1, temperature=0))
    computing, exposed = [], []
    for _ in range(REPEATS):
        layers: queue.SimpleQueue[tuple[int, Ready | None]] = queue.SimpleQueue()

        def send(layers: queue.SimpleQueue[tuple[int, Ready | None]] = layers) -> None:
            for _ in range(LAYERS):
                layer, ready = layers.get()
                if ready is not None:
                    ready.synchronize()
                receiver.ask({"layers": [layer], "pages": pages})

        sender = threading.Thread(target=send)
        sender.start()
        started = time.perf_counter()
        engine.prefill([chunk], lambda layer, ready, layers=layers: layers.put((layer, ready)))  # type: ignore[misc]
        first_token = time.perf_counter()
        sender.join()
        computing.append(first_token - started)
        exposed.append(time.perf_counter() - first_token)
    return statistics.median(computing[1:]), statistics.median(exposed[1:])


def main() -> None:
    """Measure and publish."""
    figures = []
    with tempfile.TemporaryDirectory() as folder:
        config = EngineConfig(
            model_folder(LLAMA_8B, Path(folder)),
            device="cuda",
            dtype="bfloat16",
            max_model_len=4096,
            kv_cache_bytes=PAGES * LAYERS * LAYOUT.page_bytes,
            random_weights=True,
        )
        engine = Engine.load(config)
    engine.cache.pages.normal_()
    receiver = Receiver(engine.cache)
    pages = engine.pool.allocate(PROMPT // PAGE_SIZE)
    everything = list(range(PAGES))
    found = receiver.ask({"layers": [0], "pages": everything, "check": True})
    assert found["sums"]["0"] == int(engine.cache.pages[0].view(torch.int16).long().sum()), "other bytes arrived"
    plain = device_copy_seconds()
    one = receiver.ask({"layers": [0], "pages": everything, "repeats": REPEATS})["seconds"]
    by_layer = receiver.ask({"layers": list(range(LAYERS)), "pages": pages, "repeats": REPEATS})["seconds"]
    gigabytes = COPIED_BYTES / 1e9
    figures += [
        Figure("copy within a process, 256 MiB", gigabytes / plain, "GB/s"),
        Figure("cuda_ipc, 256 MiB in one message", gigabytes / one, "GB/s"),
        Figure("cuda_ipc over a copy within a process", plain / one, "ratio", ">= 0.7"),
        Figure("cuda_ipc, 256 MiB in 32 messages, one after the other", gigabytes / by_layer, "GB/s"),
    ]
    engine.warm_up()
    computing, exposed = exposed_seconds(engine, receiver, pages)
    sums = receiver.ask({"layers": list(range(LAYERS)), "pages": pages, "check": True})["sums"]
    for layer in range(LAYERS):
        assert sums[str(layer)] == int(engine.cache.pages[layer, pages].view(torch.int16).long().sum()), layer
    figures += [
        Figure("prefill of 2,048 tokens", computing * 1000, "ms"),
        Figure("exposed time of its handoff by cuda_ipc", exposed * 1000, "ms"),
        Figure("exposed time over prefill, cuda_ipc", exposed / computing, "ratio", "<= 0.05"),
        Figure(
            "exposed time over prefill, shm", None, "ratio", "<= 0.15", why="a cache on a GPU is not offered by shm"
        ),
    ]
    receiver.close()
    publish("kv_gpu", figures, card=torch.cuda.get_device_name())


if __name__ == "__main__":
    main()
