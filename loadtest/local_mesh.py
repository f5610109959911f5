"""A real mesh for tests and benchmarks: `headrace up` in a process of its own, on a free port."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import aiohttp

from headrace.loadtest.loopback import free_port
from headrace.processes import end_process

START_TIMEOUT_SECONDS = 120.0
STOP_TIMEOUT_SECONDS = 60.0
POLL_SECONDS = 0.05
METRIC = re.compile(r'^(headrace_\w+)\{tier="(\w+)",worker="([\w.-]+)"\} (\S+)$', re.MULTILINE)
STARTED = re.compile(r"([\w-]+) started, pid (\d+)")


@dataclass
class LocalMesh:
    """A running mesh. `log` is what `headrace up` wrote so far."""

    url: str
    api_key: str | None = None
    """For its /metrics, where it wants one."""
    log: list[str] = field(default_factory=list)
    pids: dict[str, int] = field(default_factory=dict)
    """Process ids of the children by name, the newest start of each."""

    async def metrics(self, name: str) -> dict[str, float]:
        """One metric of every worker, by worker id."""
        headers = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        async with aiohttp.ClientSession(headers=headers) as session, session.get(f"{self.url}/metrics") as response:
            text = await response.text()
        return {worker: float(value) for metric, _, worker, value in METRIC.findall(text) if metric == name}

    async def until_no_page_is_used(self, seconds: float = 10.0) -> None:
        """Wait until both tiers report no page in use. Raises `TimeoutError` with what is still used."""
        async for used in self._pages_in_use(seconds):
            if used and not any(used.values()):
                return

    async def until_pages_are_used(self, worker: str) -> None:
        """Wait until a worker holds pages. Raises `TimeoutError`."""
        async for used in self._pages_in_use(30.0):
            if used.get(worker):
                return

    async def _pages_in_use(self, seconds: float) -> AsyncIterator[dict[str, float]]:
        """The metric, looked at again and again."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            used = await self.metrics("headrace_kv_pages_in_use")
            yield used
            await asyncio.sleep(POLL_SECONDS)
        raise TimeoutError(f"after {seconds} s these pages are in use: {used}")

    def kill(self, name: str) -> None:
        """SIGKILL a child."""
        os.kill(self.pids[name], signal.SIGKILL)


@asynccontextmanager
async def local_mesh(
    *flags: str, api_key: str | None = None, environment: Mapping[str, str] = os.environ
) -> AsyncIterator[LocalMesh]:
    """Run `headrace up FLAGS` inside the block; yields once it says that it is ready."""
    port = free_port()
    command = [sys.executable, "-m", "headrace", "up", "--port", str(port), *flags]
    process = await asyncio.create_subprocess_exec(
        *command,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
        env={**environment},
    )
    mesh = LocalMesh(f"http://127.0.0.1:{port}", api_key)
    ready = asyncio.Event()
    reading = asyncio.create_task(_read_log(process, mesh, ready))
    try:
        waiting = asyncio.create_task(ready.wait())
        await asyncio.wait([waiting, reading], timeout=START_TIMEOUT_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if not ready.is_set():
            raise RuntimeError("the mesh did not start:\n" + "\n".join(mesh.log[-40:]))
        yield mesh
    finally:
        await end_process(process, signal.SIGINT, STOP_TIMEOUT_SECONDS)
        await reading


async def _read_log(process: asyncio.subprocess.Process, mesh: LocalMesh, ready: asyncio.Event) -> None:
    assert process.stderr is not None
    while line := await process.stderr.readline():
        text = line.decode(errors="replace").rstrip()
        mesh.log.append(text)
        if match := STARTED.search(text):
            mesh.pids[match[1]] = int(match[2])
        if text.startswith("ready in "):
            ready.set()
