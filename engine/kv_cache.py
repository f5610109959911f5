"""The paged KV cache of one device."""

from __future__ import annotations

import fcntl
import logging
import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from headrace.engine.cuda_memory import device_uuid, open_shared, share
from headrace.kernels.copy_pages import copy_blocks
from headrace.kernels.upload import upload

log = logging.getLogger(__name__)

F_SEAL_FUTURE_WRITE = 0x10
"""fcntl(2), Linux 5.1: nobody else can map the file to write to it."""


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
        self.descriptor: int | None = None
        """On the CPU, of the memory file that holds the pages, [layers, pages], from its start; other processes of this
        user may map it to read. None where there is no such file."""
        shape = (layout.num_layers, num_pages, 2, layout.num_kv_heads, layout.page_size, layout.head_dim)
        # On the CPU, copies go through numpy: they run on other threads than the one that computes, where torch would
        # start a second pool of threads that fights with the first.
        self._array: np.ndarray | None = None
        if device.type == "cpu":
            size = layout.num_layers * num_pages * self.page_bytes
            memory, self.descriptor = _shareable_zeros(size)
            self.pages = torch.from_numpy(memory).view(getattr(torch, layout.dtype)).view(shape)
            self._array = memory.reshape(layout.num_layers, num_pages, self.page_bytes)
            self._memory = memory.data
        else:
            self.pages = torch.zeros(shape, dtype=getattr(torch, layout.dtype), device=device)
            self._copying = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._bytes = self.pages.view(layout.num_layers, num_pages, -1).view(torch.uint8)

    def layer(self, index: int) -> torch.Tensor:
        """[pages, 2, KV heads, page size, head size] of one layer."""
        return self.pages[index]

    def host_views(self, layer: int, page_ids: Sequence[int]) -> list[memoryview] | None:
        """The memory of these pages, in order, neighbours in one view; None on a GPU."""
        if self._array is None:
            return None
        views = []
        start = 0
        for index in range(1, len(page_ids) + 1):
            if index == len(page_ids) or page_ids[index] != page_ids[index - 1] + 1:
                first = (layer * self.num_pages + page_ids[start]) * self.page_bytes
                views.append(self._memory[first : first + (index - start) * self.page_bytes])
                start = index
        return views

    def close(self) -> None:
        """Let other processes no longer find the memory. The pages stay valid."""
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None

    def read_pages(self, layer: int, page_ids: Sequence[int]) -> memoryview:
        """A contiguous copy of these pages' bytes, in order."""
        return self.read_rows(layer, self.page_bytes, page_ids)

    def write_pages(self, layer: int, page_ids: Sequence[int], data: memoryview) -> None:
        """Overwrite these pages. Raises `ValueError` where `data` is not `len(page_ids) * page_bytes` long."""
        self.write_rows(layer, self.page_bytes, page_ids, data)

    def read_rows(self, layer: int, row_bytes: int, rows: Sequence[int] | np.ndarray) -> memoryview:
        """A contiguous copy of parts of pages: of rows, each `row_bytes` long, of one layer's memory."""
        if self._array is not None:
            copy: memoryview = self._array[layer].reshape(-1, row_bytes).take(rows, axis=0).reshape(-1).data
            return copy
        with torch.cuda.stream(self._copying):
            gathered = self._bytes[layer].view(-1, row_bytes).index_select(0, self._index(rows))
            host = torch.empty(gathered.shape, dtype=torch.uint8, pin_memory=True)
            host.copy_(gathered, non_blocking=True)
            self._copying.synchronize()
        return host.numpy().reshape(-1).data

    def write_rows(self, layer: int, row_bytes: int, rows: Sequence[int] | np.ndarray, data: memoryview) -> None:
        """Overwrite rows. Raises `ValueError` where `data` is not `len(rows) * row_bytes` long."""
        if len(data) != len(rows) * row_bytes:
            raise ValueError(f"{len(data)} bytes for {len(rows)} rows of {row_bytes}")
        source = np.frombuffer(data, dtype=np.uint8).reshape(len(rows), row_bytes)
        if self._array is not None:
            self._array[layer].reshape(-1, row_bytes)[rows] = source
            return
        with torch.cuda.stream(self._copying):
            arrived = torch.from_numpy(source.copy()).to(self.pages.device)
            self._bytes[layer].view(-1, row_bytes).index_copy_(0, self._index(rows), arrived)
            self._copying.synchronize()

    def _index(self, numbers: Sequence[int] | np.ndarray) -> torch.Tensor:
        return upload([np.array(numbers, np.int64)], self.pages.device)[0]

    def share(self) -> tuple[str, bytes, int] | None:
        """For other processes: the UUID of the GPU that the pages lie on, a handle, and where in its memory they begin.

        None on a CPU, and where the driver gives none.
        """
        if not self.pages.is_cuda:
            return None
        try:
            return device_uuid(self.pages.device), *share(self.pages)
        except OSError as error:
            log.info("the KV cache can't be shared with other processes: %s", error)
            return None

    def open(self, device: str, handle: bytes, offset: int, num_blocks: int) -> OpenedCache | None:
        """Another process's cache of the same page size; None where it is not on this one's GPU.

        Raises `OSError` where it can't be opened and `ValueError` where it is smaller than that.
        """
        if not self.pages.is_cuda or device != device_uuid(self.pages.device):
            return None
        shared = open_shared(handle, offset, num_blocks * self.page_bytes, self.pages.device)
        return OpenedCache(shared.view(num_blocks, self.page_bytes), self)

    @torch.no_grad()
    def copy_from(self, source: torch.Tensor, blocks: Sequence[int], layer: int, page_ids: Sequence[int]) -> None:
        """Copy rows `blocks` of source [blocks, page_bytes] into these pages and wait until they are there."""
        with torch.cuda.stream(self._copying):
            copy_blocks(source, self._index(blocks), self._bytes[layer], self._index(page_ids))
            self._copying.synchronize()


class OpenedCache:
    """Another process's cache on this one's GPU."""

    def __init__(self, memory: torch.Tensor, cache: KVCache) -> None:
        self._memory = memory
        self._cache = cache

    def copy(self, blocks: Sequence[int], layer: int, page_ids: Sequence[int]) -> None:
        """Copy its blocks into this worker's pages. Raises `ValueError` where there is no such block."""
        if max(blocks) >= len(self._memory):
            raise ValueError(f"page {max(blocks)} of {len(self._memory)} is not in the sender's memory")
        self._cache.copy_from(self._memory, blocks, layer, page_ids)


def _shareable_zeros(size: int) -> tuple[np.ndarray, int | None]:
    """Zeros (what a page holds past its tokens is multiplied by 0, which must not be 0 times NaN) and the descriptor of
    their memory file, sealed so that it can't shrink and nobody else can write to it. The kernel makes the zeros at
    first use; torch would take seconds for them now.
    """
    try:
        descriptor = os.memfd_create("headrace-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except (AttributeError, OSError) as error:
        log.info("the KV cache can't be shared with other processes: %s", error)
        return np.zeros(size, dtype=np.uint8), None
    os.ftruncate(descriptor, size)
    memory = np.frombuffer(mmap.mmap(descriptor, size), dtype=np.uint8)
    try:
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | F_SEAL_FUTURE_WRITE)
    except OSError as error:  # before Linux 5.1
        log.info("the KV cache can't be shared with other processes: %s", error)
        os.close(descriptor)
        return memory, None
    return memory, descriptor
