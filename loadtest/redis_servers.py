"""A Redis-compatible server that may be hurt."""

from __future__ import annotations

import asyncio
import signal
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

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
        """On the same port, empty."""
        self.process = await _spawn(self.port, self.folder, self.options)
        await until_answering(self.url)


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
