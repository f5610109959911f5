"""`headrace restart`: replace all workers of a running local mesh, one at a time."""

from __future__ import annotations

from headrace.control import give_order
from headrace.settings import Settings


async def run(settings: Settings) -> None:
    """Returns when each worker has a successor and is gone. Raises `StartError`."""
    await give_order(settings.port, "restart", {}, print)
