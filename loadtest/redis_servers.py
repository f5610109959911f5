"""Redis-compatible servers that may be hurt: one that restarts empty, two with sentinels, a cluster."""

from __future__ import annotations

import asyncio
import signal
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrace.loadtest.loopback import free_port
from headrace.processes import end_process
from headrace.redis_client import RedisError, connect
from headrace.redis_server import find_server


@dataclass
class RedisServer:
    """A server on loopback that keeps nothing on disk."""

    port: int
    folder: Path
    options: Sequence[str]
    process: asyncio.subprocess.Process

    @property
    def url(self) -> str:
        """Without TLS."""
        return f"redis://127.0.0.1:{self.port}"

    async def kill(self) -> None:
        """SIGKILL."""
        await end_process(self.process, signal.SIGKILL, 5.0)

    async def start(self) -> None:
        """On the same port."""
        self.process = await _spawn(self.port, self.folder, self.options)
        await until_answering(self.url)

    async def restart_empty(self) -> None:
        """SIGKILL, and start on the same port."""
        await self.kill()
        await self.start()


async def _spawn(port: int, folder: Path, options: Sequence[str]) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        find_server(),
        *options,
        *("--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder), "--save", ""),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )


async def until_answering(url: str) -> None:
    """Wait until a server answers. Raises `TimeoutError`."""
    client = connect(url, patient=False)
    try:
        async with asyncio.timeout(10):
            while True:
                try:
                    await client.ping()
                    return
                except RedisError:
                    await asyncio.sleep(0.01)
    finally:
        await client.aclose()


@asynccontextmanager
async def redis_server(*options: str) -> AsyncIterator[RedisServer]:
    """A server inside the block."""
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        server = RedisServer(port, Path(folder), options, await _spawn(port, Path(folder), options))
        try:
            await until_answering(server.url)
            yield server
        finally:
            if server.process.returncode is None:
                server.process.send_signal(signal.SIGCONT)
            await server.kill()


@asynccontextmanager
async def watched_by_sentinels() -> AsyncIterator[tuple[str, list[RedisServer]]]:
    """A primary, a replica and three sentinels: the URL, and the two servers."""
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        primary = await stack.enter_async_context(redis_server())
        replica = await stack.enter_async_context(redis_server("--replicaof", f"127.0.0.1 {primary.port}"))
        ports = []
        for number in range(3):
            path = folder / f"sentinel-{number}.conf"
            path.write_text(
                f"sentinel monitor main 127.0.0.1 {primary.port} 2\n"
                "sentinel down-after-milliseconds main 500\n"
                "sentinel failover-timeout main 3000\n"
            )
            sentinel = await stack.enter_async_context(redis_server(str(path), "--sentinel"))
            ports.append(sentinel.port)
        async with asyncio.timeout(20):
            for port in ports:
                await _until_sentinel_knows(port)
        hosts = ",".join(f"127.0.0.1:{port}" for port in ports)
        yield f"redis+sentinel://{hosts}/main", [primary, replica]


async def _until_sentinel_knows(port: int) -> None:
    client: Any = connect(f"redis://127.0.0.1:{port}")
    try:
        while True:
            reply = await client.execute_command("SENTINEL", "MASTER", "main")
            state = {_text(name): _text(value) for name, value in dict(reply).items()}
            if int(state["num-slaves"]) >= 1 and int(state["num-other-sentinels"]) >= 2:
                return
            await asyncio.sleep(0.05)
    finally:
        await client.aclose()


def _text(value: object) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


@asynccontextmanager
async def cluster_of_three() -> AsyncIterator[str]:
    """A Redis Cluster's URL."""
    async with AsyncExitStack() as stack:
        options = ("--cluster-enabled", "yes", "--cluster-node-timeout", "2000", "--cluster-port")
        buses = [free_port() for _ in range(3)]
        nodes = [await stack.enter_async_context(redis_server(*options, str(bus))) for bus in buses]
        client: Any
        for number, node in enumerate(nodes):
            client = connect(node.url)
            first, last = 16384 * number // 3, 16384 * (number + 1) // 3 - 1
            await client.execute_command("CLUSTER", "ADDSLOTSRANGE", first, last)
            await client.execute_command("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
            if number:
                await client.execute_command("CLUSTER", "MEET", "127.0.0.1", nodes[0].port, buses[0])
            await client.aclose()
        async with asyncio.timeout(20):
            for node in nodes:
                client = connect(node.url)
                while "cluster_state:ok" not in str(await client.execute_command("CLUSTER", "INFO")):  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
                await client.aclose()
        yield "redis+cluster://" + ",".join(f"127.0.0.1:{node.port}" for node in nodes[:2])
