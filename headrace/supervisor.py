"""Keeps the processes of a local mesh running: starts them, restarts what dies, and leaves none behind."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from headrace.cli import EXIT_USAGE
from headrace.errors import StartError
from headrace.node import READY_FD
from headrace.processes import end_process

log = logging.getLogger(__name__)

MAX_QUICK_DEATHS = 3
QUICK_DEATH_SECONDS = 30.0
RESTART_DELAY_SECONDS = 0.5
STOP_TIMEOUT_SECONDS = 15.0
MAX_LOG_LINE = 16 * 1024


@dataclass(eq=False)
class Child:
    """One process to be kept running. `last_line` is the newest line of its log."""

    name: str
    command: str
    environment: dict[str, str]
    last_line: str = "starting"
    process: asyncio.subprocess.Process | None = field(default=None, repr=False)
    is_ready: asyncio.Event = field(default_factory=asyncio.Event, repr=False)
    """It has its place in the mesh; set once, by its first process."""
    keeping: asyncio.Task[None] | None = field(default=None, repr=False)
    is_leaving: bool = False


class Supervisor:
    """Runs children until cancelled; `on_line` gets each line that a child writes."""

    def __init__(self, children: list[Child], on_line: Callable[[Child, str], None]) -> None:
        self.children = children
        self._on_line = on_line
        self._failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done, with the reason, once a child can't be kept running."""

    async def run(self) -> None:
        """Keep all children running. Raises `StartError` where one can't be started, with what it said."""
        for child in self.children:
            self._keep(child).add_done_callback(self._kept)
        try:
            await self._failed
        finally:
            for child in self.children:
                if child.keeping is not None:
                    child.keeping.cancel()
            await asyncio.wait([child.keeping for child in self.children if child.keeping is not None])

    def _keep(self, child: Child) -> asyncio.Task[None]:
        child.keeping = asyncio.create_task(self._keep_running(child), name=child.name)
        return child.keeping

    def _kept(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None and not self._failed.done():
            self._failed.set_exception(error)

    async def add(self, child: Child) -> None:
        """Keep one more child running; returns when it has its place in the mesh.

        Raises `StartError`, and lets go of it, where it can't be started: the others go on.
        """
        self.children.append(child)
        keeping = self._keep(child)
        ready = asyncio.create_task(child.is_ready.wait())
        try:
            await asyncio.wait([keeping, ready], return_when=asyncio.FIRST_COMPLETED)
            if keeping.done():
                keeping.result()
        except BaseException:
            await self.remove(child)
            raise
        finally:
            ready.cancel()
        keeping.add_done_callback(self._kept)

    async def remove(self, child: Child, patience_seconds: float = STOP_TIMEOUT_SECONDS) -> None:
        """Stop a child for good, giving it time to finish; kill it where it does not."""
        child.is_leaving = True
        if child.keeping is not None:
            if child.process is None or child.process.returncode is not None:
                child.keeping.cancel()  # it is about to start another process
            await self._end(child, patience_seconds)
            await asyncio.wait([child.keeping])
        self.children.remove(child)

    async def _keep_running(self, child: Child) -> None:
        quick_deaths = 0
        while True:
            started = time.monotonic()
            code = await self._run_once(child)
            if child.is_leaving:
                self._on_line(child, f"{_how_it_ended(code)}, as it was told to")
                return
            if code == EXIT_USAGE:
                raise StartError(f"{child.name}: {child.last_line}")
            quick_deaths = quick_deaths + 1 if time.monotonic() - started < QUICK_DEATH_SECONDS else 1
            if quick_deaths >= MAX_QUICK_DEATHS:
                raise StartError(f"{child.name} died {quick_deaths} times in a row, the last words: {child.last_line}")
            self._on_line(child, f"{_how_it_ended(code)}, starting it again")
            await asyncio.sleep(RESTART_DELAY_SECONDS * quick_deaths)

    async def _run_once(self, child: Child) -> int:
        told_here, told_there = os.pipe()
        try:
            child.process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "headrace",
                child.command,
                env={**os.environ, **child.environment, "HEADRACE_SUPERVISED": "1", READY_FD: str(told_there)},
                stdin=asyncio.subprocess.PIPE,  # it ends when this process does, and the child stops then
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for the supervisor, which stops its children in order
                limit=MAX_LOG_LINE,
                pass_fds=(told_there,),
            )
        except BaseException:
            os.close(told_here)
            raise
        finally:
            os.close(told_there)
        self._on_line(child, f"started, pid {child.process.pid}")
        loop = asyncio.get_running_loop()

        def told() -> None:
            loop.remove_reader(told_here)
            if os.read(told_here, 1):
                child.is_ready.set()

        loop.add_reader(told_here, told)
        try:
            return await self._follow(child, child.process)
        finally:
            loop.remove_reader(told_here)
            os.close(told_here)

    async def _follow(self, child: Child, process: asyncio.subprocess.Process) -> int:
        """Pass on what a process writes until it ends; returns its exit code."""
        assert process.stdout is not None
        while True:
            try:
                line = await process.stdout.readline()
            except ValueError:  # a line over the limit
                continue
            if not line:
                break
            child.last_line = line.decode(errors="replace").rstrip()
            self._on_line(child, child.last_line)
        return await process.wait()

    async def _end(self, child: Child, patience_seconds: float) -> None:
        if child.process is not None and await end_process(child.process, signal.SIGTERM, patience_seconds):
            log.warning("%s did not stop and was killed", child.name)

    async def stop(self) -> None:
        """Stop the children in their order, those of one kind together, and kill what does not go in time."""
        for _, alike in itertools.groupby(self.children, lambda child: child.command):
            await asyncio.gather(*(self._end(child, STOP_TIMEOUT_SECONDS) for child in list(alike)))


def _how_it_ended(code: int) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
