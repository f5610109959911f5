"""`headrace up`: a whole mesh on this machine, from one command to a curl line that works."""

from __future__ import annotations

import asyncio
import os
import shlex
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
from rich.console import Console
from rich.live import Live
from rich.table import Table

from headrace.errors import StartError
from headrace.node import until_stopped
from headrace.redis_server import private_redis
from headrace.settings import Settings
from headrace.supervisor import Child, Supervisor

READY_TIMEOUT_SECONDS = 900.0
"""Loading a large model from a slow disk takes minutes; a mesh that is not up by then never will be."""
POLL_SECONDS = 0.1


async def run(settings: Settings) -> None:
    """Start everything, say where it is, and stop everything again. Raises `StartError`."""
    console = Console(stderr=True, highlight=False)
    started = time.monotonic()
    stopped = asyncio.create_task(until_stopped())
    with tempfile.TemporaryDirectory(prefix="headrace-") as folder:
        async with _redis(settings, Path(folder)) as url:
            settings = settings.model_copy(update={"redis": url})
            console.print(f"Redis at {url}")
            supervisor = Supervisor(_children(settings), lambda child, line: console.print(f"[dim]{child.name:>10}[/] {line}", markup=True))
            running = asyncio.create_task(supervisor.run())
            serving = asyncio.create_task(_until_ready(settings, supervisor, console, started))
            try:
                await asyncio.wait([running, stopped], return_when=asyncio.FIRST_COMPLETED)
                if running.done():
                    running.result()
            finally:
                for task in (serving, running, stopped):
                    task.cancel()
                console.print("stopping")
                await supervisor.stop()
                await asyncio.wait([serving, running, stopped])
                console.print("stopped")
