"""Small stand-ins with real bytes: a page store in memory, and offers of short prompts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from headrace.kvtransfer.departures import LineDepartures
from headrace.kvtransfer.handoff import Handoff, Outgoing
from headrace.kvtransfer.messages import Layout, Offer
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

    page_bytes = PAGE_BYTES

    def __init__(self, num_pages: int, staged: dict[int, bytes] | None = None) -> None:
        self.num_pages = num_pages
        self.staged = {} if staged is None else staged
        self.data = [[bytes(PAGE_BYTES)] * num_pages for _ in range(NUM_LAYERS)]

    def host_views(self, layer: int, page_ids: Sequence[int]) -> None:
        """As on a GPU: the bytes are copied."""

    def read_pages(self, layer: int, page_ids: Sequence[int]) -> memoryview:
        """See `PageStore`."""
        return memoryview(b"".join(self.data[layer][page] for page in page_ids))

    def write_pages(self, layer: int, page_ids: Sequence[int], data: memoryview) -> None:
        """See `PageStore`."""
        assert len(data) == len(page_ids) * PAGE_BYTES
        for index, page in enumerate(page_ids):
            self.data[layer][page] = bytes(data[index * PAGE_BYTES : (index + 1) * PAGE_BYTES])

    def write_blocks(self, layer: int, page_ids: Sequence[int], source: np.ndarray, blocks: np.ndarray) -> None:
        """See `PageStore`."""
        self.write_pages(layer, page_ids, source[blocks].reshape(-1).data)

    def stage(self, layer: int, page_ids: Sequence[int], blocks: Sequence[int]) -> None:
        """See `PageStore`."""
        self.staged.update((block, self.data[layer][page]) for block, page in zip(blocks, page_ids, strict=True))


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

    def submit(self, peer_id: str, make: object, failed: object) -> None:
        """Never called."""
        raise AssertionError


def frame_of(handoff: Handoff, store: MemoryStore, outgoing: Outgoing) -> tuple[bytes, bytes]:
    """What the data line would carry: header and payload."""
    departures = LineDepartures(store, LAYOUT.dtype, NoLines(), lambda callback: callback())
    header, payload = departures.make(handoff, outgoing)
    return header, b"".join(payload)


def kv_bytes(layer: int, tokens: Sequence[int], page: int) -> bytes:
    """What a model would put into a page: it depends on the layer and on every token up to the page's end."""
    seen = tokens[: (page + 1) * PAGE_SIZE]
    return repr((layer, sum(seen), list(seen)[-3:])).encode().ljust(PAGE_BYTES, b".")[:PAGE_BYTES]


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
