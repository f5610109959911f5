"""Worker processes to be killed and stopped, forked from a server that has imported everything: one is back at once."""

from __future__ import annotations

import asyncio
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Sequence
from multiprocessing.context import ForkServerProcess
from typing import Any

STOP_SECONDS = 10.0


class ForkedWorkers:
    """`processes` by name, the dead ones too until they are started again."""

    def __init__(self, preloaded: Sequence[str]) -> None:
        """`preloaded` are the modules that the server imports."""
        self.processes: dict[str, ForkServerProcess] = {}
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(list(preloaded))

    def start(self, name: str, serve: Callable[..., None], *arguments: Any) -> None:
        """Run `serve(name, *arguments)`, which calls `end_with_parent`, in a process of its own."""
        process = self._context.Process(target=serve, args=(name, *arguments), name=name, daemon=True)
        process.start()
        self.processes[name] = process

    async def kill(self, name: str) -> int | None:
        """SIGKILL one; returns the exit code of one that had ended by itself."""
        process = self.processes[name]
        ended = process.exitcode
        process.kill()
        await asyncio.to_thread(process.join, STOP_SECONDS)
        return ended

    def signal(self, name: str, number: signal.Signals) -> None:
        """Stop or continue one."""
        pid = self.processes[name].pid
        assert pid is not None
        os.kill(pid, number)

    async def stop(self) -> dict[str, int | None]:
        """SIGTERM all, and SIGKILL what does not go, whose exit code is None."""
        for name, process in self.processes.items():
            if process.is_alive():
                self.signal(name, signal.SIGCONT)
                process.terminate()
        codes: dict[str, int | None] = {}
        for name, process in self.processes.items():
            await asyncio.to_thread(process.join, STOP_SECONDS)
            codes[name] = process.exitcode
            process.kill()
            await asyncio.to_thread(process.join)
        self.processes.clear()
        return codes


def end_with_parent() -> None:
    """Have this process end when the one that started it does, and leave an interrupt from the terminal to that one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    multiprocessing.connection.wait([sentinel])
    os._exit(1)
