"""What one answer's writer waits for, thousands of times a second over all answers: an event that costs little."""

from __future__ import annotations

import asyncio
import time


class News:
    """An event with one waiter, who waits for a limited time.

    A timer that a wait has set stays when the wait is over, for the next one: as long as news come, none is set.
    """

    def __init__(self) -> None:
        self._is_set = False
        self._waiter: asyncio.Future[None] | None = None
        self._alarm: asyncio.TimerHandle | None = None
        self._rings_at = 0.0
        """Monotonic seconds."""

    def set(self) -> None:
        """There are news."""
        self._is_set = True
        self._wake()

    async def wait(self, seconds: float) -> bool:
        """Take the news, waiting for some; False where none came in time."""
        due = time.monotonic() + seconds
        while not self._is_set:
            left = due - time.monotonic()
            if left <= 0:
                return False
            loop = asyncio.get_running_loop()
            if self._alarm is None or self._rings_at > due:
                self.close()
                self._alarm, self._rings_at = loop.call_later(left, self._ring), due
            self._waiter = loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        self._is_set = False
        return True

    def close(self) -> None:
        """Let go of the timer."""
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None

    def _ring(self) -> None:
        self._alarm = None
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
