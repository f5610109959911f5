"""Small stand-ins with real bytes: a page store in memory, and offers of short prompts."""

from __future__ import annotations

from collections.abc import Sequence

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
    """A KV cache of bytes: `data[layer][page]`."""

    page_bytes = PAGE_BYTES

    def __init__(self, num_pages: int) -> None:
        self.data = [[bytes(PAGE_BYTES)] * num_pages for _ in range(NUM_LAYERS)]

    def read_pages(self, layer: int, page_ids: Sequence[int]) -> memoryview:
        """See `PageStore`."""
        return memoryview(b"".join(self.data[layer][page] for page in page_ids))

    def write_pages(self, layer: int, page_ids: Sequence[int], data: memoryview) -> None:
        """See `PageStore`."""
        assert len(data) == len(page_ids) * PAGE_BYTES
        for index, page in enumerate(page_ids):
            self.data[layer][page] = bytes(data[index * PAGE_BYTES : (index + 1) * PAGE_BYTES])


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
