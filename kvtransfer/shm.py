"""`shm`: the receiver copies pages straight out of the sender's memory, a sealed memory file.

That is the sender's cache itself, where it lies in host memory: one pass of `memcpy` moves a page from cache to cache.
A sender on a GPU copies its pages to staging memory as soon as they are computed (`staging.py`). The receiver can't
tell the two apart. The file can't be shrunk (so a mapping of it can't fault) nor written to by anyone but the process
that made it; it has no name and ends with the last process that maps it. What is read is the sender's own memory, so
there is no checksum: the protocol keeps pages untouched until the receiver is done with them.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import stat
from collections.abc import Sequence
from typing import Any

import numpy as np

from headrace.kvtransfer.base import Done, PageId, PageStore
from headrace.kvtransfer.messages import Host, SharedMemory

FILE_NAME = "headrace-kv"
F_GET_SEALS, F_SEAL_SHRINK, F_SEAL_FUTURE_WRITE = 1034, 0x2, 0x10
"""fcntl(2); Python does not name the last."""
NEEDED_SEALS = F_SEAL_SHRINK | F_SEAL_FUTURE_WRITE


class SharedSource:
    """A sender's memory, mapped to read. Unmapped when nobody uses it any more."""

    def __init__(self, host: Host, memory: SharedMemory, page_bytes: int, store: PageStore) -> None:
        """`page_bytes` are the sender's. Whole pages are copied to `store`.

        Raises `OSError` where the memory can't be had and `ValueError` where it isn't what it is said to be.
        """
        self._store = store
        self._num_blocks = memory.num_blocks
        size = memory.num_blocks * page_bytes
        descriptor = _open(f"/proc/{host.pid}/fd/{memory.descriptor}", size)
        try:
            mapping = mmap.mmap(descriptor, size, mmap.MAP_SHARED, mmap.PROT_READ)
        finally:
            os.close(descriptor)
        self._pages = np.frombuffer(mapping, dtype=np.uint8).reshape(memory.num_blocks, page_bytes)

    def copy(self, blocks: Sequence[int], layers: range, page_ids: Sequence[PageId], done: Done) -> None:
        """See `Source`; on the caller's thread."""
        if max(blocks) >= self._num_blocks:
            raise ValueError(f"page {max(blocks)} of {self._num_blocks} is not in the sender's memory")
        self._store.write_blocks(layers, page_ids, self._pages, np.asarray(blocks))
        done(None)

    def gather(self, row_bytes: int, rows: np.ndarray[Any, Any]) -> memoryview:
        """See `RowSource`."""
        memory = self._pages.reshape(-1, row_bytes)
        if rows.max(initial=0) >= len(memory):
            raise ValueError(f"pages past the {self._num_blocks} of the sender's memory were named")
        copy: memoryview = memory.take(rows, axis=0).reshape(-1).data
        return copy


def _open(path: str, size: int) -> int:
    name = os.readlink(path)
    if not name.startswith(f"/memfd:{FILE_NAME}"):
        raise ValueError(f"{path} is {name}, no KV cache")
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            raise ValueError(f"{path} is not a file of this user")
        if status.st_size < size:
            raise ValueError(f"{path} has {status.st_size} bytes, {size} were announced")
        if fcntl.fcntl(descriptor, F_GET_SEALS) & NEEDED_SEALS != NEEDED_SEALS:
            raise ValueError(f"{path} could be changed while it is read")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor
