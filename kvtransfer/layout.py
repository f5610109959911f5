"""What two workers compare before a page travels between them."""

from __future__ import annotations

from typing import Protocol

from headrace.kvtransfer.messages import Layout


class CacheShape(Protocol):
    """The shape of a worker's KV cache, as its engine describes it."""

    @property
    def dtype(self) -> str: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def page_size(self) -> int: ...


def layout_of(model_fingerprint: str, shape: CacheShape, vocab_size: int) -> Layout:
    """The layout fingerprint of a worker of one rank."""
    return Layout(
        model_fingerprint=model_fingerprint,
        dtype=shape.dtype,
        num_layers=shape.num_layers,
        kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        page_size=shape.page_size,
        tensor_parallel_size=1,
        vocab_size=vocab_size,
    )
