"""Two processes, real data lines, and a sender whose cache is not in host memory: pages go through staging memory."""

from __future__ import annotations

from headrace.engine.kv_cache import CacheLayout
from headrace.loadtest.kv_pair import PairConfig, pair
from tests.kvtransfer.far_cache import FarCache

LAYOUT = CacheLayout("float32", num_layers=5, num_kv_heads=2, head_dim=8, page_size=4)
NUM_PAGES = 12
STAGING_BLOCKS = 7


async def test_prompts_larger_than_the_staging_memory_arrive_unchanged() -> None:
    """Its blocks are used again and again; each prompt has other bytes than the last one."""
    cache = FarCache(LAYOUT, NUM_PAGES, STAGING_BLOCKS)
    async with pair(PairConfig(LAYOUT, NUM_PAGES, "shm"), cache) as both:
        for num_pages in (NUM_PAGES, 1, STAGING_BLOCKS, NUM_PAGES):
            cache.pages.normal_()
            await both.transfer(num_pages)
            assert await both.arrived_right(range(num_pages))
    cache.close()
