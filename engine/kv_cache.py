"""The paged KV cache of one device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class CacheLayout:
    """The shape of the cache, but for its length."""

    dtype: str
    """`float32`, `bfloat16`, `float16` or `float8_e4m3fn`."""
    num_layers: int
    num_kv_heads: int
    head_dim: int
    page_size: int

    @property
    def page_bytes(self) -> int:
        """Bytes of one page of one layer, K and V together."""
        element = getattr(torch, self.dtype).itemsize
        return int(2 * self.page_size * self.num_kv_heads * self.head_dim * element)


class KVCache:
    """One page of one layer is one block of memory.

    `pages` is [layers, pages, 2 (K, V), KV heads, page size, head size].
    """

    def __init__(self, layout: CacheLayout, num_pages: int, device: torch.device) -> None:
        self.layout = layout
        self.num_pages = num_pages
        self.page_bytes = layout.page_bytes
        shape = (layout.num_layers, num_pages, 2, layout.num_kv_heads, layout.page_size, layout.head_dim)
        self.pages = _zeros(shape, getattr(torch, layout.dtype), device)
        bytes_view = self.pages.view(layout.num_layers, num_pages, -1).view(torch.uint8)
        self._bytes = bytes_view
        # On the CPU, copies go through numpy: they run on the event loop's thread, where torch would start a second
        # pool of threads that fights with the one that computes.
        self._array: np.ndarray | None = bytes_view.numpy() if device.type == "cpu" else None

    def layer(self, index: int) -> torch.Tensor:
        """[pages, 2, KV heads, page size, head size] of one layer."""
        return self.pages[index]

    def read_pages(self, layer: int, page_ids: Sequence[int]) -> memoryview:
        """A contiguous copy of these pages' bytes, in order."""
        if self._array is not None:
            copy: memoryview = self._array[layer].take(page_ids, axis=0).reshape(-1).data
            return copy
        index = torch.tensor(page_ids, device=self.pages.device)
        return self._bytes[layer].index_select(0, index).cpu().numpy().reshape(-1).data

    def write_pages(self, layer: int, page_ids: Sequence[int], data: memoryview) -> None:
        """Overwrite these pages. Raises `ValueError` where `data` is not `len(page_ids) * page_bytes` long."""
        if len(data) != len(page_ids) * self.page_bytes:
            raise ValueError(f"{len(data)} bytes for {len(page_ids)} pages of {self.page_bytes}")
        source = np.frombuffer(data, dtype=np.uint8).reshape(len(page_ids), self.page_bytes)
        if self._array is not None:
            self._array[layer][page_ids] = source
        else:
            index = torch.tensor(page_ids, device=self.pages.device)
            self._bytes[layer].index_copy_(0, index, torch.from_numpy(source.copy()).to(self.pages.device))


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros: what a page holds past its tokens is multiplied by 0, which must not be 0 times NaN."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # numpy leaves the zeroing to the kernel, page by page at first use; torch would take seconds for it now
    size = int(np.prod(shape)) * dtype.itemsize
    return torch.from_numpy(np.zeros(size, dtype=np.uint8)).view(dtype).view(shape)
