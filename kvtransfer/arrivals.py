"""What a data line does with each message that carries or names pages: check, write, tell the landing.

Runs on the lines' own threads, several at a time; the hot path of a handoff's receiving side.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

import xxhash

from headrace.kvtransfer import fp8
from headrace.kvtransfer.base import Destination, Source
from headrace.kvtransfer.landing import Landing, Problem
from headrace.kvtransfer.messages import OnDataLine, Pages, PagesInPlace, TransportName, WireDtype
from headrace.wire import Decoder, WireError

log = logging.getLogger(__name__)

FAILED: Problem = ("receiver_failed", "the pages could not be written")

Key = tuple[str, str, int]
"""(sender, request id, attempt)."""


class Payload(Protocol):
    """The bytes that follow a header. Unread ones are passed over by whoever made this."""

    size: int

    def read_into(self, views: Sequence[memoryview]) -> None:
        """Fill these views, whose lengths add up to `size`. Raises `ConnectionError` where the line breaks."""


class Arriving:
    """One granted handoff, as the lines need to know it."""

    def __init__(
        self,
        landing: Landing,
        destinations: Sequence[Destination],
        transport: TransportName,
        source: Source | None,
        wire_dtype: WireDtype,
    ) -> None:
        """`destinations`: one for each part of the Grant, one where pages come whole."""
        self.landing = landing
        self.destinations = destinations
        self.transport = transport
        self.source = source
        self.wire_dtype = wire_dtype


class Arrivals:
    """All granted handoffs of one worker."""

    def __init__(self, dtype: str, refuse: Callable[[str, str], None]) -> None:
        """`refuse(sender, reason)` counts a message that breaks the protocol; it is called on any thread."""
        self._dtype = dtype
        self._refuse = refuse
        self._decode: Decoder[OnDataLine] = Decoder(OnDataLine)
        self._arriving: dict[Key, Arriving] = {}
        self._lock = threading.Lock()
        self.dropped = 0
        """Messages that came late, or twice, or name no pages that were granted, or did not come to their end."""

    def expect(self, key: Key, arriving: Arriving) -> None:
        """Pages of this handoff may come."""
        self._arriving[key] = arriving

    def forget(self, key: Key) -> None:
        """Pages of this handoff are dropped from now on."""
        del self._arriving[key]

    def on_frame(self, sender: str, header: bytes | memoryview, payload: Payload) -> None:
        """One message off a data line."""
        try:
            message = self._decode(header)
        except WireError as error:
            self._refuse(sender, str(error))
            return
        self.apply(sender, message, payload)

    def apply(self, sender: str, message: OnDataLine, payload: Payload) -> None:
        """Write one message's pages. One that fits no granted handoff is late, and is dropped."""
        arriving = self._arriving.get((sender, message.request_id, message.attempt))
        if arriving is None or not arriving.landing.claim(message):
            self._drop()
            return
        if isinstance(message, PagesInPlace):
            self._copy(sender, arriving, message)
            return
        try:
            problem = self._read(arriving, message, payload)
        except ConnectionError:
            self._drop()
            arriving.landing.interrupted(message)
            raise
        except BaseException:
            self._end(sender, arriving, message, FAILED)
            raise
        self._end(sender, arriving, message, problem)

    def _drop(self) -> None:
        with self._lock:
            self.dropped += 1

    def _end(self, sender: str, arriving: Arriving, message: OnDataLine, problem: Problem | None) -> None:
        if problem is not None:
            self._refuse(sender, problem[1])
        arriving.landing.written(message, problem)

    def _read(self, arriving: Arriving, message: Pages, payload: Payload) -> Problem | None:
        destination = arriving.destinations[message.part]
        first_page, num_pages = message.first_page, message.num_pages
        layers = range(message.layer, message.layer + message.num_layers)
        each = num_pages * destination.page_bytes
        stored = size = each * len(layers)
        if arriving.wire_dtype == "fp8":
            size = fp8.packed_bytes(stored, self._dtype)
        if payload.size != size or arriving.transport != "tcp":
            return "checksum", "the payload has not the announced size"
        views: list[memoryview] = []
        if arriving.wire_dtype == "auto":
            for layer in layers:
                views += destination.host_views(layer, first_page, num_pages) or ()
        received = views or [memoryview(bytearray(size))]
        payload.read_into(received)
        if checksum(received) != message.checksum:
            return "checksum", f"layer {message.layer}, page {first_page}: the payload was damaged on the way"
        if not views:
            data = received[0] if arriving.wire_dtype == "auto" else fp8.unpack(received[0], stored, self._dtype)
            for index, layer in enumerate(layers):
                destination.write(layer, first_page, num_pages, data[index * each : (index + 1) * each])
        return None

    def _damage(self, arriving: Arriving, message: PagesInPlace) -> Problem | None:
        """Whether what was copied is not what was sent, where that can be known."""
        if not message.checksum:
            return None
        views: list[memoryview] = []
        for layer in range(message.layer, message.layer + message.num_layers):
            destination = arriving.destinations[message.part]
            views += destination.host_views(layer, message.first_page, message.num_pages) or ()
        if views and checksum(views) != message.checksum:
            return "checksum", f"layer {message.layer}, page {message.first_page}: the pages were damaged on the way"
        return None

    def _copy(self, sender: str, arriving: Arriving, message: PagesInPlace) -> None:
        """Now, or soon on another thread, which the message is then left to."""
        taken = False

        def done(error: Exception | None) -> None:
            nonlocal taken
            taken = True
            problem = self._damage(arriving, message) if error is None else FAILED
            self._end(sender, arriving, message, problem)

        problem: Problem = FAILED
        try:
            if arriving.source is not None:
                destination = arriving.destinations[message.part]
                layers = range(message.layer, message.layer + message.num_layers)
                destination.copy(arriving.source, layers, message.first_page, message.blocks, done)
                taken = True
            else:
                problem = "sequence", f"pages are to be sent by {arriving.transport}"
        except ValueError as error:
            problem = "sequence", str(error)
        finally:
            if not taken:
                self._end(sender, arriving, message, problem)


def checksum(views: Sequence[memoryview]) -> bytes:
    """XXH3-64 of the views' bytes, one after the other."""
    if len(views) == 1:
        return xxhash.xxh3_64_digest(views[0])
    state = xxhash.xxh3_64()
    for view in views:
        state.update(view)
    return state.digest()
