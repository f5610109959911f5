"""How pages leave a worker: over a data line to the receiver, as bytes or as the places where it finds them.

`make` runs on the line's threads, where it may wait for the device and for the memory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Protocol

from headrace.kvtransfer import fp8
from headrace.kvtransfer.arrivals import checksum
from headrace.kvtransfer.base import PageStore
from headrace.kvtransfer.handoff import Handoff
from headrace.kvtransfer.messages import Pages, PagesInPlace
from headrace.kvtransfer.on_the_way import Outgoing
from headrace.kvtransfer.reshard import head_rows, heads_a_rank
from headrace.wire import encode


class Lines(Protocol):
    """Data lines to all receivers."""

    def submit(
        self,
        peer_id: str,
        make: Callable[[], tuple[bytes, Sequence[memoryview]]],
        failed: Callable[[str], None],
        now: bool,
    ) -> None:
        """Send what `make` gives soon, or call `failed`. `now`: it waits for nothing, and is a header alone."""

    def reconnect(self, peer_id: str) -> None:
        """Use new connections from now on."""


class LineDepartures:
    """See `Departures`."""

    def __init__(
        self,
        stores: Sequence[PageStore],
        dtype: str,
        lines: Lines,
        call_soon: Callable[[Callable[[], None]], object],
    ) -> None:
        """`stores`: the cache of each tensor-parallel rank. `call_soon` brings a line's failure to the handoff's own
        thread.
        """
        self._stores = stores
        self._dtype = dtype
        self._lines = lines
        self._call_soon = call_soon

    def send(self, handoff: Handoff, outgoing: Outgoing) -> None:
        """See `Departures`."""
        assert handoff.receiver is not None

        def failed(reason: str) -> None:
            self._call_soon(functools.partial(handoff.fail, reason))

        names_alone = handoff.transport in ("shm", "cuda_ipc") and outgoing.staged is None and not outgoing.ready
        self._lines.submit(handoff.receiver, functools.partial(self.make, handoff, outgoing), failed, names_alone)

    def reconnect(self, receiver: str) -> None:
        """See `Departures`."""
        self._lines.reconnect(receiver)

    def make(self, handoff: Handoff, outgoing: Outgoing) -> tuple[bytes, Sequence[memoryview]]:
        """The frame for some pages."""
        for ready in outgoing.ready:
            ready.synchronize()
        request_id, attempt = handoff.key
        if handoff.transport == "tcp":
            views = self._views(handoff, outgoing)
            pages = Pages(
                request_id=request_id,
                attempt=attempt,
                sequence=outgoing.sequence,
                layer=outgoing.layers[0],
                first_page=outgoing.first_page,
                num_pages=len(outgoing.page_ids),
                checksum=checksum(views),
                credit_wanted=outgoing.credit_wanted,
                part=outgoing.part,
                num_layers=len(outgoing.layers),
            )
            return encode(pages), views
        in_place = PagesInPlace(
            request_id=request_id,
            attempt=attempt,
            sequence=outgoing.sequence,
            layer=outgoing.layers[0],
            first_page=outgoing.first_page,
            blocks=self._blocks(outgoing),
            credit_wanted=outgoing.credit_wanted,
            part=outgoing.part,
            num_layers=len(outgoing.layers),
            checksum=self._checksum_in_place(outgoing) if handoff.transport == "nixl" else b"",
        )
        return encode(in_place), ()

    def _checksum_in_place(self, outgoing: Outgoing) -> bytes:
        store = self._stores[outgoing.rank]
        views: list[memoryview] = []
        for layer in outgoing.layers:
            views += store.host_views(layer, outgoing.page_ids) or ()
        return checksum(views) if views else b""

    def _blocks(self, outgoing: Outgoing) -> list[int]:
        """Where the receiver finds the pages. Those of a handoff that is over aren't there; it drops the message."""
        staged, store = outgoing.staged, self._stores[outgoing.rank]
        if staged is None:
            return [layer * store.num_pages + page for layer in outgoing.layers for page in outgoing.page_ids]
        if staged.begin():
            try:
                store.stage(outgoing.layers, outgoing.page_ids, staged.blocks)
            finally:
                staged.end()
        return staged.blocks

    def _views(self, handoff: Handoff, outgoing: Outgoing) -> Sequence[memoryview]:
        """The bytes: the cache's own memory where that is possible."""
        store = self._stores[outgoing.rank]
        parts: list[memoryview] = []
        for layer in outgoing.layers:
            if outgoing.heads is not None:
                layout = handoff.offer.layout
                rows = head_rows(layout, outgoing.page_ids, outgoing.heads)
                parts.append(store.read_rows(layer, store.page_bytes // (2 * heads_a_rank(layout)), rows))
            elif handoff.wire_dtype == "auto" and (views := store.host_views(layer, outgoing.page_ids)) is not None:
                parts += views
            else:
                parts.append(store.read_pages(layer, outgoing.page_ids))
        if handoff.wire_dtype == "auto":
            return parts
        return [fp8.pack(parts[0] if len(parts) == 1 else memoryview(b"".join(parts)), self._dtype)]
