"""Small stand-ins with real bytes: a page store in memory, and offers of short prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from headrace.kvtransfer.departures import LineDepartures
from headrace.kvtransfer.handoff import Handoff
from headrace.kvtransfer.messages import Layout, Offer
from headrace.kvtransfer.on_the_way import Outgoing
from headrace.messages.request import SamplingParams

PAGE_SIZE = 4
PAGE_BYTES = 32
NUM_LAYERS = 3
LAYOUT = Layout(
    model_fingerprint="f" * 16,
    dtype="float32",
    num_layers=NUM_LAYERS,
    kv_heads=1,
    head_dim=1,
    page_size=PAGE_SIZE,
    tensor_parallel_size=1,
    vocab_size=1000,
)


class MemoryStore:
    """A KV cache of bytes: `data[layer][page]`; `staged` is the staging memory."""

    def __init__(self, num_pages: int, page_bytes: int = PAGE_BYTES, staged: dict[int, bytes] | None = None) -> None:
        self.num_pages = num_pages
        self.page_bytes = page_bytes
        self.staged = {} if staged is None else staged
        self.data = [[bytes(page_bytes)] * num_pages for _ in range(NUM_LAYERS)]

    def host_views(self, layer: int, page_ids: Sequence[int]) -> None:
        """As on a GPU: the bytes are copied."""

    def read_pages(self, layer: int, page_ids: Sequence[int]) -> memoryview:
        """See `PageStore`."""
        return memoryview(b"".join(self.data[layer][page] for page in page_ids))

    def write_pages(self, layer: int, page_ids: Sequence[int], data: memoryview) -> None:
        """See `PageStore`."""
        assert len(data) == len(page_ids) * self.page_bytes
        for index, page in enumerate(page_ids):
            self.data[layer][page] = bytes(data[index * self.page_bytes : (index + 1) * self.page_bytes])

    def _rows(self, layer: int, row_bytes: int) -> np.ndarray[Any, Any]:
        return np.frombuffer(bytearray(b"".join(self.data[layer])), np.uint8).reshape(-1, row_bytes)

    def read_rows(self, layer: int, row_bytes: int, rows: np.ndarray[Any, Any]) -> memoryview:
        """See `PageStore`."""
        return memoryview(self._rows(layer, row_bytes)[rows].tobytes())

    def write_rows(self, layer: int, row_bytes: int, rows: np.ndarray[Any, Any], data: memoryview) -> None:
        """See `PageStore`."""
        written = self._rows(layer, row_bytes)
        written[rows] = np.frombuffer(data, np.uint8).reshape(len(rows), row_bytes)
        self.write_pages(layer, range(self.num_pages), memoryview(written.tobytes()))

    def write_blocks(self, layers: range, page_ids: Sequence[int], source: np.ndarray, blocks: np.ndarray) -> None:
        """See `PageStore`."""
        for layer, of_layer in zip(layers, blocks.reshape(len(layers), -1), strict=True):
            self.write_pages(layer, page_ids, source[of_layer].reshape(-1).data)

    def stage(self, layers: range, page_ids: Sequence[int], blocks: Sequence[int]) -> None:
        """See `PageStore`."""
        pages = [self.data[layer][page] for layer in layers for page in page_ids]
        self.staged.update(zip(blocks, pages, strict=True))


class BytesPayload:
    """What follows a header, in memory."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.size = len(data)

    def read_into(self, views: Sequence[memoryview]) -> None:
        """See `Payload`."""
        position = 0
        for view in views:
            view[:] = self.data[position : position + len(view)]
            position += len(view)


class NoLines:
    """Lines that nothing is sent on: for `LineDepartures.make` alone."""

    def submit(self, peer_id: str, make: object, failed: object, now: bool) -> None:
        """Never called."""
        raise AssertionError

    def reconnect(self, peer_id: str) -> None:
        """Never called."""
        raise AssertionError


def frame_of(handoff: Handoff, stores: Sequence[MemoryStore], outgoing: Outgoing) -> tuple[bytes, bytes]:
    """What the data line would carry: header and payload."""
    departures = LineDepartures(stores, LAYOUT.dtype, NoLines(), lambda callback: callback())
    header, payload = departures.make(handoff, outgoing)
    return header, b"".join(payload)


def dense_kv(kv_heads: int, layer: int, tokens: Sequence[int]) -> np.ndarray[Any, Any]:
    """What a model would compute, uint32 [2, KV heads, tokens]: each number depends on every token up to its own."""
    seen = np.cumsum((np.array(tokens, np.uint64) + 1) * (2 * np.arange(len(tokens), dtype=np.uint64) + 3))
    place = (layer * 2 + np.arange(2)[:, None, None]) * kv_heads + np.arange(kv_heads)[:, None] + 1
    return (seen * 2654435761 + place.astype(np.uint64) * 40503 % 2**31).astype(np.uint32)


def cut(layout: Layout, rank: int, layer: int, tokens: Sequence[int]) -> np.ndarray[Any, Any]:
    """The pages of a prompt in one rank's layer, uint32 [pages, 2, heads, page size], zeros past the prompt's end."""
    copies = max(layout.tensor_parallel_size // layout.kv_heads, 1)
    count = max(layout.kv_heads // layout.tensor_parallel_size, 1)
    heads = dense_kv(layout.kv_heads, layer, tokens)[:, rank // copies * count :][:, :count]
    num_pages = -(-len(tokens) // layout.page_size)
    filled = np.pad(heads, ((0, 0), (0, 0), (0, num_pages * layout.page_size - len(tokens))))
    return filled.reshape(2, count, num_pages, layout.page_size).transpose(2, 0, 1, 3)


def make_offer(tokens: Sequence[int], request_id: str = "r", attempt: int = 0, layout: Layout = LAYOUT) -> Offer:
    """An offer of a prompt, as the prefill worker makes it."""
    return Offer(
        request_id=request_id,
        attempt=attempt,
        gateway="gateway-1",
        layout=layout,
        token_ids=list(tokens),
        generated=0,
        sampling=SamplingParams(max_tokens=4),
        deadline=1e12,
    )
