"""Two processes, real data lines, and a sender whose cache is not in host memory: pages go through staging memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from headrace.engine.kv_cache import CacheLayout, KVCache, _shareable_zeros
from headrace.loadtest.kv_pair import PairConfig, pair

LAYOUT = CacheLayout("float32", num_layers=5, num_kv_heads=2, head_dim=8, page_size=4)
NUM_PAGES = 12
STAGING_BLOCKS = 7


class FarCache(KVCache):
    """As on a GPU: no memory of pages to look at, and a memory file beside them."""

    def __init__(self) -> None:
        super().__init__(LAYOUT, NUM_PAGES, torch.device("cpu"))
        super().close()
        memory, self.descriptor = _shareable_zeros(STAGING_BLOCKS * self.page_bytes)
        self.staging_blocks = STAGING_BLOCKS
        self._blocks = memory.reshape(STAGING_BLOCKS, self.page_bytes)

    def host_views(self, layer: int, page_ids: Sequence[int]) -> None:
        """See `PageStore`."""

    def stage(self, layer: int, page_ids: Sequence[int], blocks: Sequence[int]) -> None:
        """See `PageStore`."""
        for page, block in zip(page_ids, blocks, strict=True):
            self._blocks[block] = self._bytes[layer, page].numpy()


async def test_prompts_larger_than_the_staging_memory_arrive_unchanged() -> None:
    """Its blocks are used again and again; each prompt has other bytes than the last one."""
    cache = FarCache()
    async with pair(PairConfig(LAYOUT, NUM_PAGES, "shm"), cache) as both:
        for num_pages in (NUM_PAGES, 1, STAGING_BLOCKS, NUM_PAGES):
            cache.pages.normal_()
            await both.transfer(num_pages)
            assert await both.arrived_right(range(num_pages))
    cache.close()
