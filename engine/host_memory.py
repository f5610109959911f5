"""Spares a worker on a CPU the page faults that would otherwise fall into its requests.

A page of memory that is touched for the first time costs the kernel a microsecond, on a virtual machine up to ten. A
prompt of 512 tokens touches ten thousand of them, in the KV cache and in buffers that come and go.
"""

from __future__ import annotations

import ctypes
import logging
import os
import sys
import threading
import time

import torch

log = logging.getLogger(__name__)

MADV_POPULATE_WRITE = 23
"""Linux 5.14; madvise(2): fault pages in as if written to, without changing what they hold."""
STRIDE_BYTES = 2**18
"""Faulted in at a time. Meanwhile nothing else of the process can map memory or give it back."""
PAUSE_SECONDS = 0.005
"""Between two strides: so it takes a tenth of a core at most, a few seconds for each gigabyte where it is quick."""
DELAY_SECONDS = 4.0
"""Leaves the rush of a mesh's start, when every process wants the cores, alone."""
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEPT_BYTES = 2**30
LARGEST_KEPT_BLOCK = 32 * 2**20
"""The most that glibc accepts."""


def keep_freed_memory() -> None:
    """Have glibc keep what is freed for the next buffer of that size, instead of giving it back to the kernel."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # not glibc
        return
    mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT_BLOCK)
    mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)


class Populating:
    """Faults a tensor's memory in, after `delay` seconds, bit by bit on a thread of its own, until done or stopped.

    That thread has no low priority: on a busy machine it would get no core for seconds while it holds the lock on the
    process's memory map, and all others would wait for it.
    """

    def __init__(self, tensor: torch.Tensor, delay: float = DELAY_SECONDS) -> None:
        self._tensor = tensor
        self._delay = delay
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="populate", daemon=True)
        if sys.platform == "linux" and tensor.device.type == "cpu":
            self._thread.start()

    def stop(self) -> None:
        """End early, and wait until the thread is gone."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        if self._stopped.wait(self._delay):
            return
        libc = ctypes.CDLL(None, use_errno=True)
        libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        page = os.sysconf("SC_PAGE_SIZE")
        first = -(-self._tensor.data_ptr() // page) * page
        end = (self._tensor.data_ptr() + self._tensor.nbytes) // page * page
        started = time.monotonic()
        for address in range(first, end, STRIDE_BYTES):
            if self._stopped.wait(PAUSE_SECONDS):
                return
            if libc.madvise(address, min(STRIDE_BYTES, end - address), MADV_POPULATE_WRITE) != 0:
                log.debug("memory is not populated: %s", os.strerror(ctypes.get_errno()))
                return
        log.debug("%d MiB populated in %.1f s", self._tensor.nbytes >> 20, time.monotonic() - started)
