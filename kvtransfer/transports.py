"""Which transport a handoff takes: the receiver chooses, when it grants, the best one that the Offer and itself can do.

`local` needs nothing of what an Offer says: both ends hold references of their own on the prompt's pages, in the one
pool that counts them, so each may end, in whatever order, as with pages of two pools. What was computed is complete
when the Commit comes, since the first token, which follows from all of it, has been read by then; where the Commit has
no token, it is when the next decode step runs.

| transport  | when                                          | what a page goes through                       |
| ---------- | --------------------------------------------- | ---------------------------------------------- |
| `local`    | same process, same page pool                  | nothing: it changes owner                      |
| `cuda_ipc` | same machine and user, both caches on one GPU | one copy from device memory to device memory   |
|            | or on two of which one can read the other's   |                                                |
| `shm`      | same machine and user otherwise               | one copy from the sender's memory (from a GPU: |
|            |                                               | pinned memory, to which it was copied before)  |
| `nixl`     | between hosts that both have RDMA and NIXL,   | RDMA, with a checksum from host memory         |
|            | or where the receiver is told to              | (`nixl.py`)                                    |
| `tcp`      | otherwise, and where the receiver is told to  | a data line, with a checksum                   |

Pages that are cut anew (`reshard.py`) never come by `cuda_ipc` or `nixl`, which copy whole pages. A sender of several
ranks has several caches, of which an Offer names none: its pages come by `tcp`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from headrace.kvtransfer.base import PageId, PageStore, Source
from headrace.kvtransfer.host import this_host
from headrace.kvtransfer.layout import CacheShape
from headrace.kvtransfer.messages import CudaMemory, Host, Layout, NixlMemory, Offer, SharedMemory, TransportName
from headrace.kvtransfer.nixl import NixlEndpoint, NixlSource
from headrace.kvtransfer.reshard import page_bytes_of
from headrace.kvtransfer.shm import SharedSource

log = logging.getLogger(__name__)

Memory = SharedMemory | CudaMemory | NixlMemory
Wanted = Literal["auto", "nixl", "tcp"]
"""Of `--kv-transport`."""


class Exporting(Protocol):
    """A KV cache that may lie in a memory file, or copy its pages to one."""

    num_pages: int
    descriptor: int | None
    staging_blocks: int
    """What the memory file has room for, where it is not the cache itself; else 0."""

    @property
    def layout(self) -> CacheShape: ...

    def share(self) -> tuple[str, bytes, int] | None:
        """On a GPU: its UUID, a handle for other processes, and where the pages begin in what it names."""


@dataclass(frozen=True)
class Exports:
    """What a sender's Offers say about its memory."""

    host: Host
    cuda_ipc: CudaMemory | None
    shm: SharedMemory | None
    nixl: NixlMemory | None = None


def exports_of(cache: Exporting, nixl: NixlEndpoint | None = None) -> Exports:
    """How others can read this cache, which is registered with `nixl`."""
    num_blocks = cache.layout.num_layers * cache.num_pages
    shm, cuda_ipc = None, None
    if cache.descriptor is not None:
        shm = SharedMemory(descriptor=cache.descriptor, num_blocks=cache.staging_blocks or num_blocks)
    if (shared := cache.share()) is not None:
        device, handle, offset = shared
        cuda_ipc = CudaMemory(device=device, handle=handle, offset=offset, num_blocks=num_blocks)
    return Exports(this_host(), cuda_ipc, shm, nixl.exports if nixl is not None else None)


class Choice(Protocol):
    """How pages can come from a sender."""

    def pages_here(self, sender: str, offer: Offer) -> list[PageId] | None:
        """The prompt's pages where the sender shares this worker's page pool: they need not come at all."""

    def choose(self, sender: str, offer: Offer) -> tuple[TransportName, Source | None]:
        """The best transport that both ends can use, and the sender's memory where it is read in place."""

    def forget(self, sender: str) -> None:
        """The sender is gone: let go of its memory."""


class TcpOnly:
    """Without shared memory."""

    def pages_here(self, sender: str, offer: Offer) -> None:
        """See `Choice`."""

    def choose(self, sender: str, offer: Offer) -> tuple[TransportName, Source | None]:
        """See `Choice`."""
        return "tcp", None

    def forget(self, sender: str) -> None:
        """See `Choice`."""


@dataclass(frozen=True)
class Beside:
    """The prefill worker of the same process, whose pages are of the same pool."""

    id: str
    pages_of: Callable[[str, int], list[PageId] | None]
    """Of its handoff (request id, attempt), as long as that is open."""


class Transports:
    """A receiver's choice, and the senders' memory that it has opened."""

    def __init__(
        self,
        layout: Layout,
        store: PageStore,
        refuse: Callable[[str, str], None],
        beside: Beside | None = None,
        nixl: NixlEndpoint | None = None,
        wanted: Wanted = "auto",
    ) -> None:
        """`store` is the cache of the first rank. `refuse(sender, reason)` counts an offer of memory that can't be used
        as it says. `nixl` has the same cache registered.
        """
        self._nixl = nixl
        self._wanted = wanted
        self._layout = layout
        self._beside = beside
        self._store = store
        self._refuse = refuse
        self._host = this_host()
        self._opened: dict[str, dict[tuple[Memory, Layout], Source | None]] = {}
        """By sender; None where it could not be opened."""

    def pages_here(self, sender: str, offer: Offer) -> list[PageId] | None:
        """See `Choice`."""
        if self._beside is None or sender != self._beside.id:
            return None
        return self._beside.pages_of(offer.request_id, offer.attempt)

    def choose(self, sender: str, offer: Offer) -> tuple[TransportName, Source | None]:
        """See `Choice`."""
        if self._wanted == "tcp" or offer.layout.tensor_parallel_size > 1:
            return "tcp", None
        whole = offer.layout == self._layout
        is_near = offer.host is not None and offer.host.machine == self._host.machine
        if whole and (self._wanted == "nixl" or not is_near) and (far := self._far(sender, offer)) is not None:
            return "nixl", far
        if not is_near:
            return "tcp", None
        if whole and offer.cuda_ipc is not None and (source := self._open(sender, offer, offer.cuda_ipc)) is not None:
            return "cuda_ipc", source
        if offer.shm is not None and (source := self._open(sender, offer, offer.shm)) is not None:
            return "shm", source
        return "tcp", None

    def _far(self, sender: str, offer: Offer) -> Source | None:
        """The sender's memory by NIXL, unless it could not be read before."""
        if self._nixl is None or offer.nixl is None:
            return None
        source = self._open(sender, offer, offer.nixl)
        return None if isinstance(source, NixlSource) and source.is_cut_off else source

    def _open(self, sender: str, offer: Offer, memory: Memory) -> Source | None:
        opened = self._opened.setdefault(sender, {})
        key = memory, offer.layout
        if key not in opened:
            if len(opened) >= 4:
                self._refuse(sender, "it offers ever new memory")
                return None
            opened[key] = self._try_to_open(sender, offer, memory)
        return opened[key]

    def _try_to_open(self, sender: str, offer: Offer, memory: Memory) -> Source | None:
        try:
            if isinstance(memory, NixlMemory):
                assert self._nixl is not None
                return self._nixl.open(memory)
            assert offer.host is not None
            if isinstance(memory, SharedMemory):
                page_bytes = page_bytes_of(offer.layout, self._layout, self._store.page_bytes)
                return SharedSource(offer.host, memory, page_bytes, self._store)
            return self._store.open(memory.device, memory.handle, memory.offset, memory.num_blocks)
        except ValueError as error:
            self._refuse(sender, str(error))
        except OSError as error:
            log.warning("the memory of %s can't be read, its pages come over tcp: %s", sender, error)
        return None

    def forget(self, sender: str) -> None:
        """See `Choice`."""
        for source in self._opened.pop(sender, {}).values():
            if isinstance(source, NixlSource):
                source.close()
