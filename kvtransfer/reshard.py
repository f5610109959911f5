"""Re-sharding: pages are cut anew for a receiver of another page size or another tensor-parallel degree.

A layer's KV is [2 (K, V), KV heads, tokens, head size]. A worker cuts the heads over its ranks, evenly (with more ranks
than heads, each head lies on several), and the tokens into pages. Its ranks have one block table, so a page is one of
each rank's cache: [2, heads of the rank, page size, head size].

The receiver cuts anew, when pages land. Messages speak of the sender's pages, in the order of the prompt, as they do
between workers that cut alike. So a page may leave as soon as it is computed, though it ends inside one of the
receiver's; the sender learns nothing of the receiver's cache; and checksum, credit and fp8 are what they are elsewhere.
Only heads are picked on departure, since no rank is to be sent what it doesn't keep: the Grant lists the `Part`s of a
page, each from one of the sender's ranks to one of the receiver's, and each travels by messages of its own.

There is one Offer, one Grant and one Commit for all ranks: an attempt is reserved, held and given up as a whole. Ranks
that granted for themselves could each give their last pages to another request, and both would wait for ever.

A *piece* is what lies side by side in both caches: of one head, as many tokens as the page sizes' greatest common
divisor. A cache is copied from and to in rows of a piece each, named by index arrays.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from headrace.kvtransfer.base import Done, PageId, PageStore, RowSource, Source, WholePages
from headrace.kvtransfer.messages import Layout, Part

Rows = np.ndarray[Any, Any]
"""int64 indices."""

KEYS_AND_VALUES = np.arange(2)[:, None, None]
COPY_BYTES = 256 * 2**10
"""Read and written at once where pages are read in place: what stays in a processor's cache in between."""


def can_recut(sender: Layout, receiver: Layout) -> bool:
    """Whether the pages differ in nothing but how they are cut, and the sender's heads are cut evenly."""
    same = msgspec.structs.replace(
        sender, page_size=receiver.page_size, tensor_parallel_size=receiver.tensor_parallel_size
    )
    few, many = sorted((sender.kv_heads, sender.tensor_parallel_size))
    return same == receiver and many % few == 0


def heads_of(layout: Layout, rank: int) -> range:
    """The model's KV heads that one rank holds."""
    heads, degree = layout.kv_heads, layout.tensor_parallel_size
    first = rank * heads // degree
    return range(first, first + max(heads // degree, 1))


def heads_a_rank(layout: Layout) -> int:
    """How many KV heads each rank holds."""
    return len(heads_of(layout, 0))


def page_bytes_of(layout: Layout, own: Layout, own_page_bytes: int) -> int:
    """Bytes of one page of one rank, given those of another layout of the same model."""
    return own_page_bytes // (heads_a_rank(own) * own.page_size) * heads_a_rank(layout) * layout.page_size


def head_rows(layout: Layout, page_ids: Sequence[PageId], heads: range) -> Rows:
    """Where these heads of these pages lie in a rank's layer seen as rows, each all tokens of one head of one page.

    In order: page by page, K before V, head by head. `heads` are numbers within the rank.
    """
    return _Grid(heads_a_rank(layout), 1).rows(_column(page_ids), heads, np.zeros(1, np.int64)).reshape(-1)


@dataclass(frozen=True)
class Route:
    """A part on its way: where the receiver puts it."""

    part: Part
    rank: int
    """The receiver's."""
    first_head: int
    """Among the heads of that rank."""


def routes(sender: Layout, receiver: Layout) -> list[Route]:
    """What each rank of the receiver takes from which of the sender's: each of its heads once."""
    found = []
    for rank in range(receiver.tensor_parallel_size):
        wanted = heads_of(receiver, rank)
        head = wanted.start
        while head < wanted.stop:
            holder = _rank_with(sender, head, rank)
            held = heads_of(sender, holder)
            stop = min(wanted.stop, held.stop)
            part = Part(rank=holder, first_head=head - held.start, num_heads=stop - head)
            found.append(Route(part, rank, head - wanted.start))
            head = stop
    return found


def _rank_with(layout: Layout, head: int, reader: int) -> int:
    """A rank that holds `head`; where several do, readers take turns."""
    copies = max(layout.tensor_parallel_size // layout.kv_heads, 1)
    return head // heads_a_rank(layout) * copies + reader % copies


@dataclass(frozen=True)
class _Grid:
    """One rank's layer (or a message's payload), seen as rows: [pages, 2, heads, pieces of a page]."""

    heads: int
    pieces: int

    def rows(self, pages: Rows, heads: range, pieces: Rows) -> Rows:
        """Indices [n, 2, len(heads), pieces] of these places; pages [n, 1, 1, ...], pieces broadcast to its end."""
        numbers = np.arange(heads.start, heads.stop)[:, None]
        found: Rows = ((pages * 2 + KEYS_AND_VALUES) * self.heads + numbers) * self.pieces + pieces
        return found


def _column(pages: Sequence[PageId]) -> Rows:
    return np.array(pages, np.int64).reshape(-1, 1, 1, 1)


@dataclass(frozen=True)
class Recut:
    """Which rows of one part's pages go to which rows of a receiving rank's cache, for one prompt."""

    sender: Layout
    receiver: Layout
    route: Route
    page_ids: Rows
    """The receiver's pages of the prompt."""
    held: int
    """The first pages of these are others', too, and must not be written to."""

    @property
    def piece_tokens(self) -> int:
        """Tokens of a row."""
        return math.gcd(self.sender.page_size, self.receiver.page_size)

    @property
    def pieces_a_page(self) -> int:
        """Of the sender."""
        return self.sender.page_size // self.piece_tokens

    def _pieces(self, first_page: int, num_pages: int) -> Rows:
        """Of the prompt, in these pages of the sender: [n, 1, 1, pieces a page]."""
        each = self.pieces_a_page
        return np.arange(first_page * each, (first_page + num_pages) * each).reshape(num_pages, 1, 1, each)

    def to_rows(self, first_page: int, num_pages: int) -> tuple[Rows, Rows]:
        """Where the rows of a message go, and which of them: indices and booleans [n, 2, heads, pieces a page].

        Those of held pages, and those past the prompt's end, go nowhere.
        """
        each = self.receiver.page_size // self.piece_tokens
        pieces = self._pieces(first_page, num_pages)
        page, piece = np.divmod(pieces, each)
        wanted = (page >= self.held) & (page < len(self.page_ids))
        ids = self.page_ids[np.minimum(page, len(self.page_ids) - 1)]
        first_head = self.route.first_head
        heads = range(first_head, first_head + self.route.part.num_heads)
        rows = _Grid(heads_a_rank(self.receiver), each).rows(ids, heads, piece)
        return rows, np.broadcast_to(wanted, rows.shape)

    def from_rows(self, blocks: Sequence[int]) -> Rows:
        """Where the rows of these pages lie in the sending rank's memory: [n, 2, heads, pieces a page]."""
        part = self.route.part
        heads = range(part.first_head, part.first_head + part.num_heads)
        pieces = np.arange(self.pieces_a_page)
        return _Grid(heads_a_rank(self.sender), self.pieces_a_page).rows(_column(blocks), heads, pieces)


class RecutPages:
    """See `Destination`: one part of a prompt, into pages that are cut another way."""

    def __init__(self, recut: Recut, store: PageStore) -> None:
        receiver = recut.receiver
        self._recut = recut
        self._store = store
        self._row_bytes = store.page_bytes // (2 * heads_a_rank(receiver) * receiver.page_size) * recut.piece_tokens
        self.page_bytes = 2 * recut.route.part.num_heads * recut.pieces_a_page * self._row_bytes

    def host_views(self, layer: int, first_page: int, num_pages: int) -> list[memoryview] | None:
        """See `Destination`: the bytes are copied from a buffer."""
        return None

    def write(self, layer: int, first_page: int, num_pages: int, data: memoryview) -> None:
        """See `Destination`."""
        rows, wanted = self._recut.to_rows(first_page, num_pages)
        if wanted.all():
            self._store.write_rows(layer, self._row_bytes, rows.reshape(-1), data)
        else:
            arrived = np.frombuffer(data, np.uint8).reshape(*rows.shape, self._row_bytes)
            self._store.write_rows(layer, self._row_bytes, rows[wanted], arrived[wanted].reshape(-1).data)

    def copy(self, source: Source, layers: range, first_page: int, blocks: Sequence[int], done: Done) -> None:
        """See `Destination`."""
        if not isinstance(source, RowSource):
            raise ValueError("pages that are to be cut anew can't be read in this sender's memory")
        count = len(blocks) // len(layers)
        for index, layer in enumerate(layers):
            self._copy_layer(source, layer, first_page, blocks[index * count : (index + 1) * count])
        done(None)

    def _copy_layer(self, source: RowSource, layer: int, first_page: int, blocks: Sequence[int]) -> None:
        rows, wanted = self._recut.to_rows(first_page, len(blocks))
        places = self._recut.from_rows(blocks)[wanted]
        rows = rows[wanted]
        # On a GPU, all of a layer's rows in one go: each write there waits for its turn.
        on_host = self._store.host_views(layer, [0]) is not None
        step = max(COPY_BYTES // self._row_bytes if on_host else len(rows), 1)
        for start in range(0, len(rows), step):
            data = source.gather(self._row_bytes, places[start : start + step])
            self._store.write_rows(layer, self._row_bytes, rows[start : start + step], data)


@dataclass(frozen=True)
class Landings:
    """How a prompt's pages come from one sender."""

    num_pages: int
    """Of the sender's."""
    held_pages: int
    """The first ones of these need not travel."""
    parts: list[Part]
    """For the Grant. Empty: pages travel whole."""
    destinations: list[WholePages | RecutPages]
    """One a part."""


def plan_landings(
    sender: Layout,
    receiver: Layout,
    stores: Sequence[PageStore],
    num_tokens: int,
    pages: list[PageId],
    held: int,
) -> Landings:
    """Plan a prompt's way into `pages` of the receiver's ranks (their caches are `stores`), the first `held` of which
    are filled already.
    """
    num_pages = -(-num_tokens // sender.page_size)
    held_tokens = held * receiver.page_size
    held_pages = num_pages if held_tokens >= num_tokens else held_tokens // sender.page_size
    found = routes(sender, receiver)
    whole = sender.tensor_parallel_size == receiver.tensor_parallel_size == 1
    return Landings(
        num_pages=num_pages,
        held_pages=held_pages,
        parts=[] if whole else [route.part for route in found],
        destinations=[_destination(sender, receiver, route, stores[route.rank], pages, held) for route in found],
    )


def _destination(
    sender: Layout, receiver: Layout, route: Route, store: PageStore, pages: list[PageId], held: int
) -> WholePages | RecutPages:
    if sender == receiver:
        return WholePages(store, pages)
    return RecutPages(Recut(sender, receiver, route, np.array(pages, np.int64), held), store)
