"""Ending tasks for certain."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from typing import Any, TypeVar

RETRY_SECONDS = 0.2
T = TypeVar("T")


async def end_task(task: asyncio.Task[Any]) -> None:
    """Cancel `task` and wait until it is over, whatever it ends with.

    Cancels again and again: `asyncio.wait_for` of Python 3.11, which redis-py sends through, loses a cancellation that
    comes just as it completes (python/cpython#86296).
    """
    while not task.done():
        task.cancel()
        await asyncio.wait([task], timeout=RETRY_SECONDS)


async def run_beside(work: Coroutine[Any, Any, T], loops: Iterable[Coroutine[Any, Any, None]]) -> T:
    """Run `work` while `loops` go on, and end them for certain, which a `TaskGroup` does not: it cancels once.

    The first exception of any of them ends all.
    """
    working = asyncio.create_task(work)
    beside = [asyncio.create_task(loop) for loop in loops]
    try:
        await asyncio.wait([working, *beside], return_when=asyncio.FIRST_COMPLETED)
        for loop in beside:
            if loop.done():
                loop.result()
        return await working
    finally:
        await _end_all([working, *beside])


async def _end_all(tasks: list[asyncio.Task[Any]]) -> None:
    """`end_task` for several, which is itself not cut short by being cancelled again: none may be left to run on."""
    was_cancelled = False
    while pending := [task for task in tasks if not task.done()]:
        for task in pending:
            task.cancel()
        try:
            await asyncio.wait(pending, timeout=RETRY_SECONDS)
        except asyncio.CancelledError:
            was_cancelled = True
    if was_cancelled:
        raise asyncio.CancelledError
