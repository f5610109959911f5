"""A mesh of real processes around a tiny model, whose parts can be killed, stopped and cut off from each other.

Workers are forked from a server that has imported everything, so that one is back a moment after it was killed.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import aiohttp
import torch
import uvloop

from headrace.kvtransfer import transports
from headrace.kvtransfer.messages import Host
from headrace.loadtest.fault_proxy import FaultProxy
from headrace.loadtest.local_mesh import LocalMesh
from headrace.loadtest.loopback import free_port
from headrace.loadtest.redis_servers import RedisServer, redis_server
from headrace.loadtest.shapes import TINY, servable_folder
from headrace.processes import end_process
from headrace.redis_client import Keys, connect
from headrace.registry import Left, Member
from headrace.settings import Settings
from headrace.tasks import end_task
from headrace.wire import Decoder

NAMESPACE = "chaos"
VOCABULARY = 2048
MODEL = {**TINY, "vocab_size": VOCABULARY, "eos_token_id": 255}
START_SECONDS = 120.0
STOP_SECONDS = 10.0
PRELOADED = ["headrace.loadtest.chaos_mesh", "headrace.prefill.main", "headrace.decode.main"]


def serve(name: str, environment: dict[str, str], log: str, apart: bool) -> None:
    """A worker process's life; `name` begins with its tier. `apart`: it takes itself for alone on its machine."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt from the terminal is the parent's to handle
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    with open(log, "a") as file:
        os.dup2(file.fileno(), sys.stderr.fileno())
    if apart:
        alone = Host(machine=name, pid=os.getpid(), process=name)
        setattr(transports, "this_host", lambda: alone)  # noqa: B010 - a name that module imports from another
    settings = Settings.load({}, environment)
    logging.basicConfig(level=settings.log_level.upper(), format="%(asctime)s %(message)s", stream=sys.stderr)
    torch.manual_seed(0)  # every worker has the same random weights
    uvloop.run(importlib.import_module(f"headrace.{name.partition('-')[0]}.main").run(settings))


Serve = Callable[[str, dict[str, str], str, bool], None]


def _end_with(sentinel: int) -> None:
    multiprocessing.connection.wait([sentinel])
    os._exit(1)


@dataclass
class ChaosMesh:
    """The processes; `workers` by id."""

    folder: Path
    redis: RedisServer
    local: LocalMesh
    model: str
    workers: dict[str, ForkServerProcess] = field(default_factory=dict)
    proxies: dict[str, list[FaultProxy]] = field(default_factory=dict)
    """In front of each process, by its id, where there are any."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Of the workers."""
    proxied: bool = False
    serve: Serve = serve
    starts: int = 0

    def start(self, name: str) -> None:
        """Start a worker, or start it again."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        own: dict[str, Any] = {**self.settings, "worker_id": name}
        if self.proxied:
            self.starts += 1
            own["advertise"] = _own_address(self.starts)
        environment = {f"HEADRACE_{key.upper()}": str(value) for key, value in own.items()}
        log = str(self.folder / f"{name}.log")
        process = context.Process(
            target=self.serve, args=(name, environment, log, self.proxied), name=name, daemon=True
        )
        process.start()
        self.workers[name] = process

    async def kill(self, name: str) -> None:
        """SIGKILL a worker."""
        self.workers[name].kill()
        await asyncio.to_thread(self.workers[name].join, STOP_SECONDS)

    def signal(self, name: str, number: signal.Signals) -> None:
        """Stop or continue a worker."""
        pid = self.workers[name].pid
        assert pid is not None
        os.kill(pid, number)

    async def until_ready(self) -> None:
        """Wait for the gateway's warm-up through both tiers and for all workers. Raises `TimeoutError`."""
        async with asyncio.timeout(START_SECONDS), aiohttp.ClientSession() as session:
            while True:
                try:
                    async with session.get(f"{self.local.url}/ready") as response:
                        ready = response.status == 200
                    if ready and len(await self.local.metrics("headrace_kv_pages_total")) == len(self.workers):
                        return
                except aiohttp.ClientError:
                    pass
                await asyncio.sleep(0.1)

    async def stop(self) -> None:
        """SIGTERM all workers, and SIGKILL what does not go."""
        for name, process in self.workers.items():
            if process.is_alive():
                self.signal(name, signal.SIGCONT)
                process.terminate()
        for process in self.workers.values():
            await asyncio.to_thread(process.join, STOP_SECONDS)
            process.kill()
            await asyncio.to_thread(process.join)


def _own_address(number: int) -> str:
    """An address of loopback's that no other process has: Linux takes all of 127.0.0.0/8 for this machine."""
    return f"127.1.{number // 250}.{number % 250 + 1}"


@asynccontextmanager
async def chaos_mesh(
    folder: Path,
    prefill: int,
    decode: int,
    *,
    proxied: bool = False,
    shape: dict[str, Any] = MODEL,
    serve: Serve = serve,
    of_workers: Mapping[str, Any] | None = None,
) -> AsyncIterator[ChaosMesh]:
    """A gateway, a Redis and workers inside the block. `proxied`: all that goes to a process passes a `FaultProxy`.

    `shape` is that of the model, `serve` a worker process's life, and `of_workers` are further settings of theirs.
    """
    async with AsyncExitStack() as stack:
        redis = await stack.enter_async_context(redis_server())
        model = servable_folder(shape, folder / "model")
        port = free_port()
        common = {
            "model": model,
            "redis": redis.url,
            "namespace": NAMESPACE,
            "log_level": "info",
            "max_model_len": 512,
        }
        worker = {**common, "load_format": "dummy", "dtype": "float32", "device": "cpu", "cpu_threads": 1}
        worker |= {"kv_cache_memory_bytes": 32 * 2**20, "drain_timeout": 2.0, **(of_workers or {})}
        local = LocalMesh(f"http://127.0.0.1:{port}")
        mesh = ChaosMesh(folder, redis, local, model.name, settings=worker, proxied=proxied, serve=serve)
        if proxied:
            listening = asyncio.create_task(_open_proxies(mesh, stack))
            stack.push_async_callback(end_task, listening)
        gateway = await _start_gateway(
            common | {"port": port, **({"advertise": _own_address(0)} if proxied else {})}, folder
        )
        stack.push_async_callback(end_process, gateway, signal.SIGTERM, STOP_SECONDS)
        stack.push_async_callback(mesh.stop)
        for tier, count in (("prefill", prefill), ("decode", decode)):
            for number in range(count):
                mesh.start(f"{tier}-{number}")
        await mesh.until_ready()
        yield mesh


async def _start_gateway(settings: dict[str, Any], folder: Path) -> asyncio.subprocess.Process:
    own = {f"HEADRACE_{key.upper()}": str(value) for key, value in settings.items() if key != "max_model_len"}
    with (folder / "gateway.log").open("ab") as log:
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "headrace", "gateway"),
            env={**os.environ, **own, "HEADRACE_SUPERVISED": "1"},
            stdin=asyncio.subprocess.PIPE,  # it ends when this process does, and the gateway stops then
            stdout=log,
            stderr=log,
        )


async def _open_proxies(mesh: ChaosMesh, stack: AsyncExitStack) -> None:
    """Open the proxies of each process as soon as it registers."""
    decode: Decoder[Member | Left] = Decoder(Member | Left)
    seen: set[tuple[str, int]] = set()
    client = connect(mesh.redis.url)
    pubsub: Any = client.pubsub()
    stack.push_async_callback(client.aclose)
    stack.push_async_callback(pubsub.aclose)
    await pubsub.subscribe(Keys(NAMESPACE).news)
    while True:
        message = await pubsub.get_message(timeout=1.0)
        if message is None or message["type"] != "message":
            continue
        member = decode(message["data"])
        if isinstance(member, Left) or (member.id, member.epoch) in seen:
            continue
        seen.add((member.id, member.epoch))
        known = {proxy.address for proxy in mesh.proxies.get(member.id, [])}
        for address in filter(None, (member.address.removeprefix("tcp://"), member.data_address)):
            host, _, port = address.rpartition(":")
            if (host, int(port)) not in known:
                proxy = await stack.enter_async_context(FaultProxy(host, int(port), "127.0.0.1"))
                mesh.proxies.setdefault(member.id, []).append(proxy)
