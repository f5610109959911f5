"""`headrace status`: the mesh at one look. Exit code 0 where all tiers have a worker, 1 otherwise."""

from __future__ import annotations

import asyncio
import json

from rich.console import Console

from headrace.mesh_tables import WIDE, mesh_tables
from headrace.mesh_view import TIERS, MeshView
from headrace.mesh_watch import watching
from headrace.settings import Settings

BETWEEN_LOOKS_SECONDS = 1.0
"""Rates are of this time."""


async def run(settings: Settings) -> int:
    """Look, print, and tell by the exit code. Raises `SettingsError` where Redis can't be reached."""
    async with watching(settings) as watch:
        await watch.look()
        await asyncio.sleep(BETWEEN_LOOKS_SECONDS)
        view = await watch.look()
        unreadable = watch.unreadable
    missing = missing_tiers(view)
    if settings.json_output:
        print(json.dumps(view.as_json() | {"missing_tiers": missing, "unreadable": unreadable}))
        return int(bool(missing))
    console = Console(highlight=False)
    if not console.is_terminal:  # what is piped somewhere is not cut
        console = Console(highlight=False, width=WIDE)
    console.print(mesh_tables(view, console.width))
    for name in unreadable:
        console.print(f"[yellow]{name} runs another version of Headrace[/]")
    if missing:
        console.print(f"[red]can't answer: no {' and no '.join(missing)} in namespace {settings.namespace}[/]")
    return int(bool(missing))


def missing_tiers(view: MeshView) -> list[str]:
    """Those without a process that takes requests."""
    return [tier for tier in TIERS if not any(member.state == "serving" for member in view.tier(tier))]
