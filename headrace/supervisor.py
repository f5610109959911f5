"""Keeps the processes of a local mesh running: starts them, restarts what dies, and leaves none behind."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from headrace.cli import EXIT_USAGE
from headrace.errors import StartError
from headrace.processes import end_process

log = logging.getLogger(__name__)

MAX_QUICK_DEATHS = 3
QUICK_DEATH_SECONDS = 30.0
RESTART_DELAY_SECONDS = 0.5
STOP_TIMEOUT_SECONDS = 15.0
MAX_LOG_LINE = 16 * 1024


@dataclass
class Child:
    """One process to be kept running. `last_line` is the newest line of its log."""

    name: str
    command: str
    environment: dict[str, str]
    last_line: str = "starting"
    process: asyncio.subprocess.Process | None = field(default=None, repr=False)


class Supervisor:
    """Runs children until cancelled; `on_line` gets each line that a child writes."""

    def __init__(self, children: list[Child], on_line: Callable[[Child, str], None]) -> None:
        self.children = children
        self._on_line = on_line
        self._stopping = False

    async def run(self) -> None:
        """Keep all children running. Raises `StartError` where one can't be started, with what it said."""
        try:
            async with asyncio.TaskGroup() as group:
                for child in self.children:
                    group.create_task(self._keep_running(child), name=child.name)
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None

    async def _keep_running(self, child: Child) -> None:
        quick_deaths = 0
        while True:
            started = time.monotonic()
            code = await self._run_once(child)
            if code == EXIT_USAGE:
                raise StartError(f"{child.name}: {child.last_line}")
            quick_deaths = quick_deaths + 1 if time.monotonic() - started < QUICK_DEATH_SECONDS else 1
            if quick_deaths >= MAX_QUICK_DEATHS:
                raise StartError(f"{child.name} died {quick_deaths} times in a row, the last words: {child.last_line}")
            self._on_line(child, f"{_how_it_ended(code)}, starting it again")
            await asyncio.sleep(RESTART_DELAY_SECONDS * quick_deaths)

    async def _run_once(self, child: Child) -> int:
        child.process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "headrace",
            child.command,
            env={**os.environ, **child.environment, "HEADRACE_SUPERVISED": "1"},
            stdin=asyncio.subprocess.PIPE,  # it ends when this process does, and the child stops then
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for the supervisor, which stops its children in order
            limit=MAX_LOG_LINE,
        )
        self._on_line(child, f"started, pid {child.process.pid}")
        assert child.process.stdout is not None
        while True:
            try:
                line = await child.process.stdout.readline()
            except ValueError:  # a line over the limit
                continue
            if not line:
                break
            child.last_line = line.decode(errors="replace").rstrip()
            self._on_line(child, child.last_line)
        return await child.process.wait()

    async def stop(self) -> None:
        """Stop the children in their order, each with time to finish, and kill what does not go."""
        for child in self.children:
            if child.process is not None and await end_process(child.process, signal.SIGTERM, STOP_TIMEOUT_SECONDS):
                log.warning("%s did not stop and was killed", child.name)


def _how_it_ended(code: int) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
