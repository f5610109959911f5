"""Data lines: bulk bytes from one member of the mesh to another, beside the mesh's own sockets.

A line is a few connections, each with a thread of its own at both ends, so that neither event loop touches the bytes.
What is submitted to a line goes out on whichever connection is free, so it may arrive in another order. A frame is a
header (an encoded message) and a payload that is sent from, and received into, the memory where it belongs.

Without a mesh key these are TCP sockets on loopback (`tcp_line.py`), with a mesh key ZeroMQ sockets under CURVE
(`curve_line.py`).
"""

from __future__ import annotations

import itertools
import logging
import os
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

log = logging.getLogger(__name__)

STRIPES = min(4, max(2, len(os.sched_getaffinity(0)) // 2)) if hasattr(os, "sched_getaffinity") else 2
"""Connections of one line."""
MAX_HEADER_BYTES = 4 * 2**20
TIMEOUT_SECONDS = 5.0
"""How long a peer may take nothing, or say nothing at first, before the connection is given up."""

Make = Callable[[], tuple[bytes, Sequence[memoryview]]]
"""Gives a frame's header and payload; called on the line's thread just before it is sent."""
_Job = tuple[Make, Callable[[str], None]]
_RECONNECT: _Job = (lambda: (b"", ()), lambda reason: None)
"""Not to be sent: an end of the connection."""
OnFrame = Callable[[str, memoryview, "Payload"], None]
"""Takes (member id, header, payload) on a connection's thread."""


class Payload(Protocol):
    """The bytes after a header. What is not read is passed over."""

    size: int

    def read_into(self, views: Sequence[memoryview]) -> None:
        """Fill these views, whose lengths add up to `size`. Raises `ConnectionError` where the connection breaks."""


class Connection(Protocol):
    """One connection's sending end, used by one thread at a time."""

    def send(self, header: bytes, payload: Sequence[memoryview]) -> None:
        """Send a frame, or enough of it that it will arrive. Raises `OSError`."""

    def send_now(self, make: Make) -> bool:
        """From any thread: whether this frame without a payload could be sent without waiting. Raises `OSError`."""

    def interrupt(self) -> None:
        """From another thread: a `send` that waits is to raise soon."""

    def close(self) -> None:
        """Close, on the thread that made it."""


class Listener(Protocol):
    """The receiving end of the lines of all other members."""

    address: str
    """`host:port`."""

    def start(
        self, on_frame: OnFrame, identify: Callable[[str], str | None], refuse: Callable[[str, str], None]
    ) -> None:
        """Serve. `identify` gives the member id of an `id@epoch`, None for a stranger; it may wait for the registry."""

    def drop(self, member_id: str) -> None:
        """The member has left: close its connections."""

    def close(self) -> None:
        """Close all and end all threads, waiting for them."""


class DataLine:
    """The way to one member. Connects when it is first used, and again after a failure."""

    def __init__(self, connect: Callable[[], Connection], name: str, stripes: int = STRIPES) -> None:
        self._connect = connect
        self._jobs: list[queue.SimpleQueue[_Job | None]] = [queue.SimpleQueue() for _ in range(stripes)]
        """By stripe, filled in turns: what is small may give the receiver's threads, one a stripe, much to do."""
        self._next = itertools.cycle(range(stripes))
        self._connections: dict[int, Connection] = {}
        self._sending = [threading.Lock() for _ in range(stripes)]
        """By stripe, held while its connection is used."""
        self._ended = False
        self._threads = [
            threading.Thread(target=self._run, args=(stripe,), name=f"to {name} {stripe}", daemon=True)
            for stripe in range(stripes)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, make: Make, failed: Callable[[str], None], now: bool = False) -> None:
        """Send a frame soon, or call `failed` with the reason, on a thread of this line. Callers bound the queue.

        `now`: `make` need not wait for anything, and gives no payload. So it is sent on this thread where that is
        possible, instead of another one's having to wake up for it.
        """
        stripe = next(self._next)
        if not (now and self._jobs[stripe].empty() and self._send_now(stripe, make)):
            self._jobs[stripe].put((make, failed))

    def _send_now(self, stripe: int, make: Make) -> bool:
        if not self._sending[stripe].acquire(blocking=False):
            return False
        try:
            connection = self._connections.get(stripe)
            return connection is not None and connection.send_now(make)
        except OSError:  # the stripe's thread will meet it, too
            return False
        finally:
            self._sending[stripe].release()

    def reconnect(self) -> None:
        """What is submitted from now on goes over new connections. What is on the old ones may still arrive."""
        for jobs in self._jobs:
            jobs.put(_RECONNECT)

    def _run(self, stripe: int) -> None:
        while (job := self._jobs[stripe].get()) is not None and not self._ended:
            if job is _RECONNECT:
                with self._sending[stripe]:
                    self._close(stripe)
                continue
            make, failed = job
            try:
                header, payload = make()
                with self._sending[stripe]:
                    self._send(stripe, header, payload)
            except Exception as error:  # whatever it is, it must reach who waits for the frame
                if not isinstance(error, OSError):
                    log.exception("a frame could not be sent")
                self._close(stripe)
                failed(f"the data line broke: {error!r}")
        self._close(stripe)

    def _send(self, stripe: int, header: bytes, payload: Sequence[memoryview]) -> None:
        """Over a new connection where there is none, or where the old one has broken since the last frame."""
        if (connection := self._connections.get(stripe)) is not None:
            try:
                connection.send(header, payload)
                return
            except OSError as error:
                log.info("a data line broke, and is opened again: %r", error)
                self._close(stripe)
                if self._ended:
                    raise
        self._connections[stripe] = self._connect()
        self._connections[stripe].send(header, payload)

    def _close(self, stripe: int) -> None:
        connection = self._connections.pop(stripe, None)
        if connection is not None:
            connection.close()

    def end(self) -> None:
        """End all threads soon; what was not sent is dropped."""
        self._ended = True
        for jobs in self._jobs:
            jobs.put(None)
        for connection in list(self._connections.values()):
            connection.interrupt()

    @property
    def is_alive(self) -> bool:
        """Whether a thread of it still runs."""
        return any(thread.is_alive() for thread in self._threads)

    def join(self) -> None:
        """Wait until all threads have ended."""
        for thread in self._threads:
            thread.join()
