"""Handoffs that are over, but for threads that may still write to their pages."""

from __future__ import annotations

from collections.abc import Callable

from headrace.kvtransfer.base import PageAllocator
from headrace.kvtransfer.incoming import Incoming, Key


class Draining:
    """Frees the pages of each when its last thread is done."""

    def __init__(self, pool: PageAllocator, ended: Callable[[Incoming, bool], None]) -> None:
        """`ended(incoming, tell_released)`: its pages are free, and whether its sender waits to hear of that."""
        self._pool = pool
        self._ended = ended
        self._tell_released: dict[Incoming, bool] = {}

    def begin(self, incoming: Incoming, tell_released: bool) -> None:
        """It is over."""
        if incoming.landing is not None:
            incoming.landing.close()
        self._tell_released[incoming] = tell_released
        self.look_at(incoming)

    def look_at(self, incoming: Incoming) -> None:
        """A thread may have ended. Handoffs that don't drain are passed over."""
        if incoming in self._tell_released and (incoming.landing is None or incoming.landing.idle):
            self._pool.release(incoming.pages)
            self._ended(incoming, self._tell_released.pop(incoming))

    def tell_at_the_end(self, sender: str, key: Key) -> bool:
        """The sender waits to hear of the end; False where it has come."""
        found = [incoming for incoming in self._tell_released if (incoming.sender, incoming.key) == (sender, key)]
        self._tell_released.update(dict.fromkeys(found, True))
        return bool(found)

    def check_integrity(self) -> None:
        """Assert that only what was granted drains."""
        for incoming in self._tell_released:
            assert incoming.landing is not None, f"{incoming.key} drains and was never granted"
