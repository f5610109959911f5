"""`make bench-kv`: the handoff's transports against memcpy, raw pyzmq and other systems, all in turns.

`--peers` names the Python of a virtual environment with `mooncake-transfer-engine-non-cuda`, `nixl` and `nixl-cu12`.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from pathlib import Path

import numpy as np

from headrace.data_line import STRIPES
from headrace.engine.kv_cache import CacheLayout, KVCache
from headrace.fleet import LARGE_COPIES
from headrace.keys import MeshKey
from headrace.kvtransfer.messages import TransportName, WireDtype
from headrace.loadtest.client import StreamClient
from headrace.loadtest.kv_fp8_effect import fp8_effect
from headrace.loadtest.kv_pair import Pair, PairConfig, pair, touched_cache
from headrace.loadtest.local_mesh import local_mesh
from headrace.loadtest.prompts import unique_tokens
from headrace.loadtest.raw_zmq import RawZmq, touched
from headrace.loadtest.report import RESULTS, Figure, conclude

LAYOUT = CacheLayout(dtype="bfloat16", num_layers=32, num_kv_heads=8, head_dim=128, page_size=16)
"""Of a model of 8 billion parameters."""
MIB = 2**20
MAIN_SIZE = 256
FRAME_BYTES = MIB
EXPOSED = "headrace_handoff_exposed_seconds_total"
BY_NIXL = "handoff by nixl, UCX on loopback"
"""Our own, with its checksums; UCX takes shared memory here."""
PEER_SYSTEMS = ("mooncake-tcp", "nixl-tcp", "nixl-shm")

Transfer = Callable[[int], Awaitable[float]]
"""Moves so many bytes; returns the seconds."""
Rates = dict[str, dict[int, list[float]]]
"""GB/s by name and MiB, one for each round."""


class Peer:
    """Another system, in processes of its own (`kv_peers.py`), stopped while others are measured: some never rest."""

    def __init__(self, python: str, system: str, max_bytes: int) -> None:
        script = Path(__file__).with_name("kv_peers.py")
        self._process = subprocess.Popen(
            [python, str(script), system, str(max_bytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        self._answer("ready")
        self._signal(signal.SIGSTOP)

    def _signal(self, number: signal.Signals) -> None:
        os.killpg(self._process.pid, number)

    def _answer(self, key: str) -> dict[str, object]:
        """The next line of JSON that has `key`; the systems log between them. Raises `EOFError`."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{") and key in (answer := json.loads(line)):
                return dict(answer)
        raise EOFError

    async def transfer(self, size: int) -> float:
        """See `Transfer`."""
        assert self._process.stdin is not None
        self._signal(signal.SIGCONT)
        self._process.stdin.write(f"{size}\n")
        self._process.stdin.flush()
        answer = self._answer("seconds")
        self._signal(signal.SIGSTOP)
        assert answer["right"], "the peer's bytes are wrong"
        return float(str(answer["seconds"]))

    def close(self) -> None:
        """End its processes."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._signal(signal.SIGKILL)
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()


async def measure(sizes: list[int], rounds: int, peers: str | None) -> tuple[Rates, dict[str, str]]:
    """All transfers in turns, and why some could not be measured."""
    largest = max(sizes) * MIB
    absent: dict[str, str] = {}
    async with AsyncExitStack() as stack:
        transfers: dict[str, Transfer] = {}
        cache = touched_cache(_config("tcp", largest))
        for name, config in {
            "shm": _config("shm", largest),
            "tcp": _config("tcp", largest),
            "tcp, fp8": _config("tcp", largest, wire_dtype="fp8"),
            "tcp, CURVE": _config("tcp", largest, secured=True),
        }.items():
            transfers[name] = _pages(await stack.enter_async_context(pair(config, cache)))
        if importlib.util.find_spec("nixl") is not None:
            transfers[BY_NIXL] = _pages(await stack.enter_async_context(pair(_config("nixl", largest), cache)))
        else:
            absent[BY_NIXL] = "this Python has no nixl"
        target = touched_cache(_config("tcp", largest))
        copiers = stack.enter_context(ThreadPoolExecutor(STRIPES))
        transfers["memcpy"] = _memcpy(cache, target, 1, copiers)
        transfers[f"memcpy, {STRIPES} threads"] = _memcpy(cache, target, STRIPES, copiers)
        frames = touched(MAIN_SIZE * MIB)
        for sockets in (1, 2):
            raw = RawZmq(sockets, FRAME_BYTES, frames)
            stack.callback(raw.close)
            transfers[f"raw pyzmq, {sockets} sockets"] = _raw(raw)
        for system in PEER_SYSTEMS:
            try:
                peer = Peer(_peers_python(peers), system, largest)
            except (EOFError, OSError) as error:
                absent[system] = (
                    f"not installed: PEERS= names no Python that runs it, or libibverbs1 is missing ({error!r})"
                )
                continue
            stack.callback(peer.close)
            transfers[system] = peer.transfer
        return await _in_turns(transfers, sizes, rounds), absent


def _peers_python(peers: str | None) -> str:
    if peers is None:
        raise FileNotFoundError("no PEERS")
    return peers


def _config(
    transport: TransportName, largest: int, wire_dtype: WireDtype = "auto", secured: bool = False
) -> PairConfig:
    key = MeshKey.make() if secured else None
    num_pages = largest // (LAYOUT.page_bytes * LAYOUT.num_layers)
    return PairConfig(
        LAYOUT, num_pages, transport, wire_dtype=wire_dtype, key=(key.public, key.secret) if key else None
    )


def _pages(both: Pair) -> Transfer:
    checked: set[int] = set()

    async def transfer(size: int) -> float:
        num_pages = size // (LAYOUT.page_bytes * LAYOUT.num_layers)
        seconds = await both.transfer(num_pages)
        if size not in checked and both.config.wire_dtype == "auto":
            assert await both.arrived_right(range(num_pages)), "wrong bytes arrived"
            checked.add(size)
        return seconds

    return transfer


def _memcpy(source: KVCache, target: KVCache, threads: int, copiers: ThreadPoolExecutor) -> Transfer:
    """From cache to cache, both memory files as for `shm`. Each thread copies its part at once, which is fastest."""
    views = [cache.host_views(0, range(cache.num_pages * LAYOUT.num_layers)) for cache in (source, target)]
    arrays = [np.frombuffer(view[0], dtype=np.uint8) for view in views if view is not None]

    async def transfer(size: int) -> float:
        started = time.perf_counter()
        parts = [slice(part * size // threads, (part + 1) * size // threads) for part in range(threads)]
        list(copiers.map(lambda part: np.copyto(arrays[1][part], arrays[0][part]), parts))
        return time.perf_counter() - started

    return transfer


def _raw(raw: RawZmq) -> Transfer:
    async def transfer(size: int) -> float:
        return raw.transfer(size)

    return transfer


async def _in_turns(transfers: dict[str, Transfer], sizes: list[int], rounds: int) -> Rates:
    rates: Rates = {name: {size: [] for size in sizes} for name in transfers}
    for number in range(rounds + 1):
        for size in sizes:
            for name, transfer in transfers.items():
                seconds = await transfer(size * MIB)
                if number:  # the first time connects and faults memory in
                    rates[name][size].append(size * MIB / seconds / 1e9)
    return rates


def figures_of(rates: Rates, absent: dict[str, str]) -> list[Figure]:
    """What the handoff must show, each ratio the median of the rounds'."""
    median = {name: statistics.median(of[MAIN_SIZE]) for name, of in rates.items()}
    figures = [Figure(f"{name}, {MAIN_SIZE} MiB", value, "GB/s") for name, value in median.items()]
    raw, memcpy = (max((n for n in rates if n.startswith(kind)), key=median.__getitem__) for kind in ("raw", "memcpy"))
    if BY_NIXL in absent:
        figures.append(Figure(f"{BY_NIXL}, {MAIN_SIZE} MiB", None, "GB/s", "", absent[BY_NIXL]))
    figures += [
        Figure(f"1 tcp over the best raw pyzmq ({raw})", _ratio(rates, "tcp", raw), "ratio", ">= 0.85"),
        Figure(f"1 shm over the best memcpy ({memcpy})", _ratio(rates, "shm", memcpy), "ratio", ">= 0.8"),
    ]
    for system in PEER_SYSTEMS:
        ours = system.rpartition("-")[2]
        name = f"2 {ours} over {system}"
        why = absent.get(system, "")
        for size in rates["tcp"]:
            value = None if why else _ratio(rates, ours, system, size)
            figures.append(Figure(f"{name}, {size} MiB", value, "ratio", ">= 2", why))
    return figures


def _ratio(rates: Rates, name: str, other: str, size: int = MAIN_SIZE) -> float:
    """Each round's own ratio, since the speed of a shared machine drifts; then their median."""
    return statistics.median(a / b for a, b in zip(rates[name][size], rates[other][size], strict=True))


async def exposed(rounds: int, tokens: int) -> list[Figure]:
    """Through a real mesh with the built-in model: how long the first token waits for the handoff."""
    shares = []
    async with local_mesh("--dtype", "float32") as mesh, StreamClient(mesh.url, "smollm2") as client:
        for number in range(rounds + 1):
            before = (await mesh.metrics(EXPOSED)).get("prefill-0", 0.0)
            await client.complete(unique_tokens(tokens, 1000 + number), 2)
            after = before
            for _ in range(100):  # the worker tells its figures from time to time
                after = (await mesh.metrics(EXPOSED))["prefill-0"]
                if after != before:
                    break
                await asyncio.sleep(0.1)
            assert after != before, "the handoff was not counted"
            prefill = float(re.findall(r"prefill (\d+) kv", "\n".join(mesh.log))[-1]) / 1000
            if number:
                shares.append((after - before) / prefill)
    return [
        Figure(
            f"3 exposed over prefill, {tokens} tokens, CPU, built-in model",
            statistics.median(shares),
            "ratio",
            "<= 0.03",
        )
    ]


def main() -> None:
    """Run, print, write; exit with 1 where a target was missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two sizes and few rounds: within 45 seconds")
    parser.add_argument("--peers", help="Python of an environment with the other systems")
    options = parser.parse_args()
    if "GLIBC_TUNABLES" not in os.environ:  # as `headrace up` starts workers; it counts from a process's start
        os.environ["GLIBC_TUNABLES"] = LARGE_COPIES
        os.execv(sys.executable, [sys.executable, "-m", "headrace.loadtest.kv_bench", *sys.argv[1:]])
    sizes, rounds = ([16, MAIN_SIZE], 3) if options.quick else ([16, 64, MAIN_SIZE, 1024], 7)
    load = Figure("others' load before the run", os.getloadavg()[0], "processes")
    rates, absent = asyncio.run(measure(sizes, rounds, options.peers))
    figures = [load, *figures_of(rates, absent)]
    figures += asyncio.run(exposed(1 if options.quick else 5, 2048))
    figures += fp8_effect(5 if options.quick else 50)
    if not options.quick:
        from headrace.loadtest.kv_plots import plot_rates  # a quick run needs no matplotlib

        plot_rates(rates, RESULTS / "kv_rates.png")
    conclude("kv", figures)


if __name__ == "__main__":
    main()
