"""A mesh of real processes around a tiny model, whose parts can be killed, stopped and cut off from each other."""

from __future__ import annotations

import asyncio
import importlib
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import torch
import uvloop

from headrace.kvtransfer import transports
from headrace.kvtransfer.messages import Host
from headrace.loadtest.fault_proxy import FaultProxy
from headrace.loadtest.forked_workers import STOP_SECONDS, ForkedWorkers, end_with_parent
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
PRELOADED = ["headrace.loadtest.chaos_mesh", "headrace.prefill.main", "headrace.decode.main"]


def serve(name: str, environment: dict[str, str], log: str, apart: bool) -> None:
    """A worker process's life; `name` begins with its tier. `apart`: it takes itself for alone on its machine."""
    end_with_parent()
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


@dataclass
class ChaosMesh:
    """The processes."""

    folder: Path
    redis: RedisServer
    local: LocalMesh
    model: str
    workers: ForkedWorkers = field(default_factory=lambda: ForkedWorkers(PRELOADED))
    """By id."""
    proxies: dict[str, list[FaultProxy]] = field(default_factory=dict)
    """In front of each process, by its id, where there are any."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Of the workers."""
    proxied: bool = False
    serve: Serve = serve
    starts: int = 0

    def start(self, name: str) -> None:
        """Start a worker, or start it again."""
        own: dict[str, Any] = {**self.settings, "worker_id": name}
        if self.proxied:
            self.starts += 1
            own["advertise"] = _own_address(self.starts)
        environment = {f"HEADRACE_{key.upper()}": str(value) for key, value in own.items()}
        log = str(self.folder / f"{name}.log")
        self.workers.start(name, self.serve, environment, log, self.proxied)

    async def until_ready(self) -> None:
        """Wait for the gateway's warm-up through both tiers and for all workers. Raises `TimeoutError`."""
        async with asyncio.timeout(START_SECONDS), aiohttp.ClientSession() as session:
            while True:
                try:
                    async with session.get(f"{self.local.url}/ready") as response:
                        ready = response.status == 200
                    workers = await self.local.metrics("headrace_kv_pages_total")
                    if ready and len(workers) == len(self.workers.processes):
                        return
                except aiohttp.ClientError:
                    pass
                await asyncio.sleep(0.1)


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
        stack.push_async_callback(mesh.workers.stop)
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
