"""Ending tasks for certain."""

from __future__ import annotations

import asyncio
from typing import Any

RETRY_SECONDS = 0.2


async def end_task(task: asyncio.Task[Any]) -> None:
    """Cancel `task` and wait until it is over, whatever it ends with.

    Cancels again and again: `asyncio.wait_for` of Python 3.11, which redis-py sends through, loses a cancellation that
    comes just as it completes (python/cpython#86296).
    """
    while not task.done():
        task.cancel()
        await asyncio.wait([task], timeout=RETRY_SECONDS)
