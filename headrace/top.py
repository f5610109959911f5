"""`headrace top`: the mesh in a terminal, live, until Ctrl-C."""

from __future__ import annotations

import asyncio

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from headrace.mesh_tables import mesh_tables
from headrace.mesh_watch import watching
from headrace.node import until_stopped
from headrace.settings import Settings
from headrace.tasks import run_beside

REFRESH_SECONDS = 1.0
ROOM_FOR_OTHERS = 6
"""Lines of the screen that are no member's and no request's."""


async def run(settings: Settings) -> int:
    """Show until stopped. Raises `SettingsError` where Redis can't be reached."""
    console = Console(highlight=False)
    with Live(console=console, screen=console.is_terminal, auto_refresh=False) as live:
        await run_beside(until_stopped(), [_show(settings, live, console)])
    return 0


async def _show(settings: Settings, live: Live, console: Console) -> None:
    async with watching(settings) as watch:
        while True:
            view = await watch.look()
            room = max(console.height - len(view.members) - ROOM_FOR_OTHERS, 1)
            foot = Text(f"namespace {settings.namespace} · every {REFRESH_SECONDS:.0f} s · Ctrl-C ends", "dim")
            live.update(Group(mesh_tables(view, console.width, room), foot), refresh=True)
            await asyncio.sleep(REFRESH_SECONDS)
