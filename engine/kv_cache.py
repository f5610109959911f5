"""The paged KV cache of one device."""

from __future__ import annotations

import fcntl
import logging
import mmap
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from headrace.engine.cuda_memory import device_uuid, find_device, open_shared, pin, share, unpin
from headrace.engine.page_copier import PageCopier, Part
from headrace.kernels.upload import upload

log = logging.getLogger(__name__)

F_SEAL_FUTURE_WRITE = 0x10
"""fcntl(2), Linux 5.1: nobody else can map the file to write to it."""
STAGING_BYTES = 512 * 2**20
"""Of host memory for pages of a GPU that other processes read from there: as much as two receivers may have on the way.
It is taken at its first use."""


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


class PagedLayers(Protocol):
    """What a model needs of a cache."""

    layout: CacheLayout
    num_pages: int

    def layer(self, index: int) -> torch.Tensor:
        """[pages, 2, KV heads, page size, head size] of one layer; pages may lie apart."""


class KVCache:
    """One page of one layer is one block of memory.

    `pages` is [layers, pages, 2 (K, V), KV heads, page size, head size].
    """

    def __init__(self, layout: CacheLayout, num_pages: int, device: torch.device) -> None:
        self.layout = layout
        self.num_pages = num_pages
        self.page_bytes = layout.page_bytes
        self.descriptor: int | None = None
        """Of a memory file that other processes of this user may map to read. On the CPU it holds the pages, [layers,
        pages], from its start; on a GPU what was put there by `stage`. None where there is no such file."""
        self.staging_blocks = 0
        """Pages of one layer that a GPU's memory file has room for."""
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
            self._copying = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
            num_blocks = min(STAGING_BYTES // self.page_bytes, layout.num_layers * num_pages)
            memory, self.descriptor = _shareable_zeros(num_blocks * self.page_bytes)
            if self.descriptor is not None:
                self.staging_blocks = num_blocks
                self._staging = torch.from_numpy(memory.reshape(num_blocks, self.page_bytes))
            self._staging_is_ready = False
            self._preparing = threading.Lock()
            self._copier: PageCopier | None = None
        self._bytes = self.pages.view(layout.num_layers, num_pages, -1).view(torch.uint8)

    def layer(self, index: int) -> torch.Tensor:
        """[pages, 2, KV heads, page size, head size] of one layer."""
        return self.pages[index]

    def host_views(self, layer: int, page_ids: Sequence[int]) -> list[memoryview] | None:
        """The memory of these pages, in order, neighbours in one view; None on a GPU."""
        if self._array is None:
            return None
        views = []
        for start, end in _runs(page_ids):
            first = (layer * self.num_pages + page_ids[start]) * self.page_bytes
            views.append(self._memory[first : first + (end - start) * self.page_bytes])
        return views

    def close(self) -> None:
        """Let other processes no longer find the memory. The pages stay valid."""
        if self.pages.is_cuda:
            if self._copier is not None:
                self._copier.close()
            if self._staging_is_ready:
                unpin(self._staging)
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
        pinned = torch.empty(source.shape, dtype=torch.uint8, pin_memory=True)
        np.copyto(pinned.numpy(), source)
        self._write_pinned(self._bytes[layer], rows, pinned)

    def write_blocks(self, layers: range, page_ids: Sequence[int], source: np.ndarray, blocks: np.ndarray) -> None:
        """Overwrite these pages of these layers by rows `blocks` of source, uint8 [rows, page_bytes]."""
        if self._array is not None:
            _copy_blocks(self._array, layers, np.asarray(page_ids), source, blocks.reshape(len(layers), -1))
            return
        pinned = torch.empty(len(blocks), self.page_bytes, dtype=torch.uint8, pin_memory=True)
        np.take(source, blocks, axis=0, out=pinned.numpy(), mode="clip")
        self._write_pinned(self._bytes, _places(layers, self.num_pages, page_ids), pinned)

    def _write_pinned(self, memory: torch.Tensor, rows: Sequence[int] | np.ndarray, pinned: torch.Tensor) -> None:
        with torch.cuda.stream(self._copying):
            arrived = pinned.to(self.pages.device, non_blocking=True)
            memory.view(-1, pinned.shape[1]).index_copy_(0, self._index(rows), arrived)
        self._until_copied()

    @torch.no_grad()
    def stage(self, layers: range, page_ids: Sequence[int], blocks: Sequence[int]) -> None:
        """On a GPU: copy these pages of these layers to `blocks` of the memory file and wait until they are there."""
        self._prepare_staging()
        with torch.cuda.stream(self._copying):
            everywhere = self._bytes.view(-1, self.page_bytes)
            gathered = everywhere.index_select(0, self._index(_places(layers, self.num_pages, page_ids)))
            for start, end in _runs(blocks):
                self._staging[blocks[start] : blocks[start] + end - start].copy_(gathered[start:end], non_blocking=True)
        self._until_copied()

    def _until_copied(self) -> None:
        """Wait for all copies so far, asleep: a thread that spins takes a core from the one that launches kernels."""
        copied = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        copied.record(self._copying)
        copied.synchronize()

    def _prepare_staging(self) -> None:
        with self._preparing:
            if self._staging_is_ready:
                return
            self._staging_is_ready = True
            try:
                pin(self._staging)
            except OSError as error:
                log.warning("memory can't be pinned, handing pages over by shm will be slow: %s", error)

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

    def region(self) -> tuple[int, int, int | None]:
        """The address of the pages, their bytes, and the number of the GPU that they lie on (None: host memory)."""
        return self.pages.data_ptr(), self.pages.nbytes, self.pages.device.index if self.pages.is_cuda else None

    def open(self, device: str, handle: bytes, offset: int, num_blocks: int) -> OpenedCache | None:
        """Another process's cache of the same page size; None where this one's GPU can't read it.

        Raises `OSError` where it can't be opened and `ValueError` where it is smaller than that.
        """
        owner = find_device(device, self.pages.device) if self.pages.is_cuda else None
        if owner is None:
            return None
        shared = open_shared(handle, offset, num_blocks * self.page_bytes, owner, self.pages.device)
        if self._copier is None:
            self._copier = PageCopier(self._bytes.view(-1, self.page_bytes))
        return OpenedCache(shared.view(num_blocks, self.page_bytes), self._copier, self.num_pages)


class OpenedCache:
    """Another process's cache, on this one's GPU or on one that it can read."""

    def __init__(self, memory: torch.Tensor, copier: PageCopier, num_pages: int) -> None:
        """`memory` is uint8 [blocks, page_bytes]; the copier's target has `num_pages` in each layer."""
        self.copier = copier
        self._memory = memory
        self._num_pages = num_pages

    def copy(
        self, blocks: Sequence[int], layers: range, page_ids: Sequence[int], done: Callable[[Exception | None], None]
    ) -> None:
        """Copy its blocks, layer by layer, into this worker's pages, on another thread, then call `done`.

        Raises `ValueError` where there is no such block.
        """
        self.copier.submit(self.part(blocks, layers, page_ids, done))

    def part(
        self, blocks: Sequence[int], layers: range, page_ids: Sequence[int], done: Callable[[Exception | None], None]
    ) -> Part:
        """What the copier is to do. Raises `ValueError`."""
        moves = np.empty((len(blocks), 2), np.int32)
        moves[:, 0] = blocks
        moves[:, 1] = _places(layers, self._num_pages, page_ids)
        if max(blocks) >= len(self._memory):
            raise ValueError(f"page {max(blocks)} of {len(self._memory)} is not in the sender's memory")
        return Part(self._memory, moves, done)


def _places(layers: range, num_pages: int, page_ids: Sequence[int]) -> np.ndarray:
    """Of these pages of these layers among the `num_pages` of each layer, layer by layer."""
    places: np.ndarray = (np.array(layers)[:, None] * num_pages + np.array(page_ids)).reshape(-1)
    return places


def _copy_blocks(
    pages: np.ndarray, layers: range, page_ids: np.ndarray, source: np.ndarray, blocks: np.ndarray
) -> None:
    """Rows `blocks`, [layers, page ids], of source to these pages of `pages`, [all layers, all pages, page_bytes].

    All layers of a run in one call where they lie evenly there, as in a cache. After each call a thread waits for the
    interpreter's lock, for longer than it takes to copy a page.
    """
    steps = np.diff(blocks, axis=0)
    if (steps != steps[:1, :1]).any():
        for layer, of_layer in zip(layers, blocks, strict=True):
            _copy_blocks(pages, range(layer, layer + 1), page_ids, source, of_layer[None])
        return
    row_bytes, row_step = source.shape[1], source.strides[0]
    layer_step = row_step * int(steps[0, 0]) if len(layers) > 1 else 0
    cuts = np.flatnonzero((np.diff(blocks[0]) != 1) | (np.diff(page_ids) != 1)) + 1
    for start, end in zip([0, *cuts], [*cuts, len(page_ids)], strict=True):
        shape = len(layers), end - start, row_bytes
        run = np.lib.stride_tricks.as_strided(source[blocks[0, start] :], shape, (layer_step, row_step, 1))
        first_page = page_ids[start]
        np.copyto(pages[layers.start : layers.stop, first_page : first_page + end - start], run)


def _runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Index ranges [start, end) in which the numbers count up by one."""
    cuts = [index for index in range(1, len(numbers)) if numbers[index] != numbers[index - 1] + 1]
    return list(zip([0, *cuts], [*cuts, len(numbers)], strict=True))


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
