"""`headrace up`: a whole mesh on this machine, from one command to a curl line that works."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from headrace.control import taking_orders
from headrace.errors import StartError
from headrace.fleet import Fleet, orders
from headrace.models.locate import locate_model
from headrace.node import until_stopped
from headrace.redis_server import private_redis
from headrace.redis_url import without_password
from headrace.settings import Settings, SettingsError
from headrace.supervisor import Child, Supervisor

READY_TIMEOUT_SECONDS = 900.0
"""Loading a large model from a slow disk takes minutes; a mesh that is not up by then never will be."""
POLL_SECONDS = 0.1


async def run(settings: Settings) -> None:
    """Start everything, say where it is, and stop everything again. Raises `StartError`."""
    started = time.monotonic()
    if settings.colocate and (settings.prefill, settings.decode) != (1, 1):
        raise SettingsError(
            "--colocate starts one worker that is both tiers: leave --prefill and --decode away, and add others with "
            "`headrace prefill` and `headrace decode`"
        )
    if settings.gateways > 1 and settings.port == 0:
        raise SettingsError("--gateways: several share a port, so --port has to name one")
    console = Console(stderr=True, highlight=False)
    stopped = asyncio.create_task(until_stopped())
    with tempfile.TemporaryDirectory(prefix="headrace-") as folder:
        async with _redis(settings, Path(folder)) as url:
            shown = without_password(url)
            console.print(f"Redis at {shown} (watch the mesh: headrace top --redis {shown})", soft_wrap=True)
            console.print(f"model {settings.model}")
            await asyncio.to_thread(locate_model, settings.model)  # fetched or converted once, not by each worker
            if settings.draft_model is not None:
                await asyncio.to_thread(locate_model, settings.draft_model, "--draft-model")
            settings = settings.model_copy(update={"redis": url})
            fleet = Fleet(settings, Path(folder))
            screen = _Screen(console, fleet.children)
            supervisor = Supervisor(fleet.children, screen.show)
            running = asyncio.create_task(supervisor.run())
            serving = asyncio.create_task(_until_ready(settings))
            try:
                async with taking_orders(settings.port, orders(fleet, supervisor)):
                    with screen.live:
                        await asyncio.wait([running, stopped, serving], return_when=asyncio.FIRST_COMPLETED)
                    if serving.done() and not stopped.done() and not running.done():
                        console.print(_welcome(settings, serving.result(), time.monotonic() - started), soft_wrap=True)
                        await asyncio.wait([running, stopped], return_when=asyncio.FIRST_COMPLETED)
                if running.done():
                    running.result()
            finally:
                console.print("stopping")
                running.cancel()
                serving.cancel()
                stopped.cancel()
                await asyncio.wait([running, serving, stopped])
                await supervisor.stop()
                console.print("stopped")


@asynccontextmanager
async def _redis(settings: Settings, folder: Path) -> AsyncIterator[str]:
    if settings.redis is not None:
        yield settings.redis
    else:
        async with private_redis(folder) as url:
            yield url


async def _until_ready(settings: Settings) -> str:
    """Wait for the warm-up through the whole path; returns the served model's name. Raises `StartError`."""
    base = f"http://{settings.host}:{settings.port}"
    deadline = time.monotonic() + READY_TIMEOUT_SECONDS
    async with aiohttp.ClientSession() as session:
        while time.monotonic() < deadline:
            try:
                async with session.get(f"{base}/ready") as response:
                    if response.status == 200:
                        return str((await response.json())["model"])
            except (aiohttp.ClientError, OSError):
                pass
            await asyncio.sleep(POLL_SECONDS)
    raise StartError(f"the mesh was not ready within {READY_TIMEOUT_SECONDS:.0f} s; see the lines above")


def _welcome(settings: Settings, model: str, seconds: float) -> str:
    base = f"http://{settings.host}:{settings.port}"
    key = ' -H "Authorization: Bearer $HEADRACE_API_KEY"' if settings.api_key or settings.api_keys_file else ""
    body = f'{{"model": "{model}", "stream": true, "messages": [{{"role": "user", "content": "Tell me a story."}}]}}'
    return escape(
        f"\nready in {seconds:.1f} s: {base}/v1 serves {model}. Ctrl-C stops it. Try:\n\n"
        f"curl -N {base}/v1/chat/completions{key} -H 'Content-Type: application/json' -d '{body}'\n\n"
        f"{base}/ shows the mesh at work, and has a chat.\n"
    )


class _Screen:
    """Shows how far each process is: a live table on a terminal, and below it, or without one, the log lines."""

    def __init__(self, console: Console, children: list[Child]) -> None:
        self.children = children
        self._console = console
        self._started = time.monotonic()
        table = self._table if console.is_terminal else None
        self.live = Live(
            get_renderable=table, console=console, transient=True, auto_refresh=table is not None, refresh_per_second=8
        )

    def show(self, child: Child, line: str) -> None:
        """Print one line of a child's log."""
        self._console.print(f"[dim]{time.strftime('%H:%M:%S')} {child.name:>10}[/] {escape(line)}", soft_wrap=True)

    def _table(self) -> Table:
        table = Table.grid(padding=(0, 2))
        for child in self.children:
            table.add_row(f"[bold]{child.name}[/]", escape(child.last_line[:80]))
        table.add_row("", f"[dim]{time.monotonic() - self._started:.1f} s[/]")
        return table
