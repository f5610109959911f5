"""A cache that behaves as one on a GPU does for a sender."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from headrace.engine.kv_cache import CacheLayout, KVCache, _shareable_zeros


class FarCache(KVCache):
    """No memory of pages to look at, and a memory file of `staging_blocks` beside them."""

    def __init__(self, layout: CacheLayout, num_pages: int, staging_blocks: int) -> None:
        super().__init__(layout, num_pages, torch.device("cpu"))
        super().close()
        memory, self.descriptor = _shareable_zeros(staging_blocks * self.page_bytes)
        self.staging_blocks = staging_blocks
        self._blocks = memory.reshape(staging_blocks, self.page_bytes)

    def host_views(self, layer: int, page_ids: Sequence[int]) -> None:
        """See `PageStore`."""

    def stage(self, layers: range, page_ids: Sequence[int], blocks: Sequence[int]) -> None:
        """See `PageStore`."""
        places = [(layer, page) for layer in layers for page in page_ids]
        for place, block in zip(places, blocks, strict=True):
            self._blocks[block] = self._bytes[place].numpy()
