"""Redis in other forms than one server: two with sentinels, a cluster."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from headrace.loadtest.loopback import free_port
from headrace.loadtest.redis_servers import RedisServer, redis_server
from headrace.redis_client import connect


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
