"""Pages leave a cache as bytes and arrive in another one unchanged."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from headrace.engine.kv_cache import CacheLayout, KVCache


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pages_survive_the_trip_to_other_places_of_another_cache(dtype: str) -> None:
    """Three pages of one layer; the other layer and the other pages stay as they are."""
    layout = CacheLayout(dtype, num_layers=2, num_kv_heads=3, head_dim=8, page_size=4)
    source, target = (KVCache(layout, 6, torch.device("cpu")) for _ in range(2))
    source.pages.normal_()
    data = source.read_pages(1, [5, 0, 3])
    assert data.nbytes == 3 * layout.page_bytes
    target.write_pages(1, [2, 4, 1], data)
    assert torch.equal(target.pages[1, [2, 4, 1]], source.pages[1, [5, 0, 3]])
    assert not target.pages[0].any()
    assert not target.pages[1, [0, 3, 5]].any()


def test_a_read_is_a_copy() -> None:
    """What happens to the page later does not change bytes that are on their way."""
    layout = CacheLayout("float32", num_layers=1, num_kv_heads=1, head_dim=2, page_size=2)
    cache = KVCache(layout, 2, torch.device("cpu"))
    data = cache.read_pages(0, [1])
    cache.pages.fill_(1)
    assert not any(data)


@pytest.mark.parametrize("size", [0, 31, 33])
def test_a_buffer_of_another_size_is_refused(size: int) -> None:
    """One page is 32 bytes here."""
    layout = CacheLayout("float32", num_layers=1, num_kv_heads=1, head_dim=2, page_size=2)
    with pytest.raises(ValueError, match="bytes"):
        KVCache(layout, 2, torch.device("cpu")).write_pages(0, [1], memoryview(bytes(size)))


def test_rows_are_parts_of_pages() -> None:
    """Of pages of [2, 3 heads, 4 tokens, 8]: page 1's third head of V, and two tokens of its first of K."""
    layout = CacheLayout("float32", num_layers=2, num_kv_heads=3, head_dim=8, page_size=4)
    source, target = (KVCache(layout, 3, torch.device("cpu")) for _ in range(2))
    source.pages.normal_()
    row_bytes = 2 * 8 * 4
    rows = np.array([12 + 10, 12 + 11, 12 + 1])
    data = source.read_rows(1, row_bytes, rows)
    assert data.nbytes == 3 * row_bytes
    target.write_rows(1, row_bytes, rows, data)
    assert torch.equal(target.pages[1, 1, 1, 2], source.pages[1, 1, 1, 2])
    assert torch.equal(target.pages[1, 1, 0, 0, 2:], source.pages[1, 1, 0, 0, 2:])
    assert int(target.pages.count_nonzero()) == 3 * row_bytes // 4


@pytest.mark.parametrize("evenly", [True, False], ids=["as in a cache", "anywhere"])
@pytest.mark.parametrize("pages", [[4, 5, 6, 1], [2], [8, 3, 4, 5]])
def test_blocks_of_another_memory_are_copied_layer_by_layer(pages: list[int], evenly: bool) -> None:
    """Neighbours in both at once, whether or not the layers' blocks lie evenly."""
    layout = CacheLayout("float32", num_layers=3, num_kv_heads=1, head_dim=4, page_size=2)
    source = np.random.default_rng(1).integers(0, 255, (3 * 10, layout.page_bytes), np.uint8)
    places = [layer * 10 + page for layer in range(3) for page in ([0, 1, 2, 7][: len(pages)])]
    blocks = np.array(places) if evenly else np.random.default_rng(2).permutation(30)[: len(places)]
    cache = KVCache(layout, 9, torch.device("cpu"))
    cache.write_blocks(range(3), pages, source, blocks)
    for layer in range(3):
        expected = source[blocks.reshape(3, -1)[layer]].tobytes()
        assert bytes(cache.read_pages(layer, pages)) == expected
    untouched = [page for page in range(9) if page not in pages]
    assert not any(bytes(cache.read_pages(layer, untouched)).strip(b"\0") for layer in range(3))
