"""Ending child processes for certain."""

from __future__ import annotations

import asyncio
import signal


async def end_process(process: asyncio.subprocess.Process, first: signal.Signals, patience_seconds: float) -> bool:
    """Send `first` and wait until the process is gone; True where it had to be killed after all."""
    if process.returncode is None:
        process.send_signal(first)
    try:
        await asyncio.wait_for(process.wait(), patience_seconds)
    except TimeoutError:
        process.kill()
        await process.wait()
        return True
    return False
