"""Pages of GPU caches, within a process and between two."""

from __future__ import annotations

import pytest
import torch

from headrace.engine.kv_cache import CacheLayout, KVCache
from headrace.kernels.copy_pages import copy_blocks
from headrace.kvtransfer.messages import TransportName
from headrace.loadtest.kv_pair import PairConfig, pair

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
LAYOUT = CacheLayout("bfloat16", num_layers=6, num_kv_heads=3, head_dim=64, page_size=16)
NUM_PAGES = 300


def full_cache(device: str) -> KVCache:
    """Random numbers in every page."""
    cache = KVCache(LAYOUT, NUM_PAGES, torch.device(device))
    cache.pages.normal_()
    return cache


@pytest.mark.parametrize("size", [8, 24, 12288, 16384, 65536, 65544])
def test_blocks_arrive_at_their_places(size: int) -> None:
    """Less and more than a program's share, and nothing else changes."""
    source = torch.randint(256, (7, size), dtype=torch.uint8, device="cuda")
    target = torch.zeros(9, size, dtype=torch.uint8, device="cuda")
    copy_blocks(source, target, torch.tensor([[6, 8], [0, 1], [3, 2]], device="cuda"))
    assert torch.equal(target[[8, 1, 2]], source[[6, 0, 3]])
    assert not target[[0, 3, 4, 5, 6, 7]].any()


def test_bytes_are_written_to_their_pages() -> None:
    """Neighbours and others; nothing else changes."""
    cache = full_cache("cuda")
    before = cache.pages.clone()
    cache.write_pages(2, [4, 5, 6, 299, 0], cache.read_pages(1, [10, 12, 11, 0, 299]))
    assert torch.equal(cache.pages[2, [4, 5, 6, 299, 0]], before[1, [10, 12, 11, 0, 299]])
    before[2, [4, 5, 6, 299, 0]] = cache.pages[2, [4, 5, 6, 299, 0]]
    assert torch.equal(cache.pages, before)


def test_staged_pages_lie_in_pinned_memory() -> None:
    """So that a copy engine writes them; until `close`, or the next cache's memory could not be pinned."""
    for _ in range(2):
        cache = full_cache("cuda")
        cache.stage(range(3, 5), [7, 1, 2, 9], [5, 6, 0, 1, 12, 13, 8, 9])
        assert torch.equal(cache._staging[[5, 6, 0, 1]], cache._bytes[3, [7, 1, 2, 9]].cpu())
        assert torch.equal(cache._staging[[12, 13, 8, 9]], cache._bytes[4, [7, 1, 2, 9]].cpu())
        assert cache._staging.is_pinned()
        cache.close()
        assert not cache._staging.is_pinned()


@pytest.mark.parametrize(
    ("transport", "sender", "receiver"),
    [
        ("cuda_ipc", "cuda", "cuda"),
        ("shm", "cuda", "cuda"),
        ("shm", "cuda", "cpu"),
        ("shm", "cpu", "cuda"),
        pytest.param("cuda_ipc", "cuda", "cuda:1", marks=two_gpus),
        pytest.param("shm", "cuda", "cuda:1", marks=two_gpus),
    ],
)
async def test_pages_travel_between_two_processes(transport: TransportName, sender: str, receiver: str) -> None:
    """Each prompt has other bytes than the last one."""
    cache = full_cache(sender)
    async with pair(PairConfig(LAYOUT, NUM_PAGES, transport, receiver), cache) as both:
        for num_pages in (NUM_PAGES, 1, 50):
            cache.pages.normal_()
            torch.cuda.synchronize()
            await both.transfer(num_pages)
            assert await both.arrived_right(range(num_pages))
    cache.close()
