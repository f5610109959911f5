"""`nixl`: the receiver reads pages out of the sender's memory with NVIDIA's NIXL (docs: github.com/ai-dynamo/nixl).

It is for hosts that share an RDMA network, and optional: `pip install headrace[nixl]`. Each worker has an agent, with
which its cache is registered as long as the worker lives. What others must know of it comes with each Offer, through
the mesh and so under its keys. Pages are named on the data line, as for `shm`, and pulled: a sender that pushed could
still write into pages that have a new owner. Those of host memory are checked against the checksum that the line
brought.

One thread talks to the agent. Each message's read is there

| state   | on                              | does                                                    | next    |
| ------- | ------------------------------- | ------------------------------------------------------- | ------- |
| (none)  | its turn                        | connect to the sender where that was not yet done, post | READING |
| (none)  | its turn, the sender is cut off | tell of the failure                                     | (none)  |
| (none)  | it can't be posted              | cut the sender off, tell of the failure                 | (none)  |
| READING | DONE                            | tell                                                    | (none)  |
| READING | an error                        | cut the sender off, tell of the failure                 | (none)  |
| READING | `READ_SECONDS` have passed, or the sender has left | cut the sender off                   | READING |

A sender that was cut off is read no more, its pages come another way (`transports.py`) until it starts again. What is
being read from it goes on, and its pages are not free before NIXL says that it has ended: to let go of the sender's
agent does not end it. When a stopped process woke up after that, its bytes still came (NIXL 1.5.1, UCX's TCP).

NIXL encrypts nothing, and whoever reaches an agent's ports can read and write what is registered. Between hosts it is
therefore taken by itself over RDMA alone; UCX's TCP must be asked for, and is kept to loopback where the worker is.
Memory of a GPU is registered the same way; it has no checksum here, and has not been tried.

An agent has a thread that never rests: it takes a core of each worker's machine.
"""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import os
import queue
import secrets
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from headrace.keys import is_loopback
from headrace.kvtransfer.base import Done, PageId
from headrace.kvtransfer.messages import NixlMemory
from headrace.settings import Settings, SettingsError

log = logging.getLogger(__name__)

RDMA_DEVICES = Path("/sys/class/infiniband")
POLL_SECONDS = 0.0001
"""NIXL has no way to wait: so often reads are looked at."""
READ_SECONDS = 5.0
"""How long a message's pages may take before their sender is cut off; and what is left at the end is waited for."""


class Agent(Protocol):
    """What is used of `nixl._api.nixl_agent`."""

    def register_memory(self, regions: list[tuple[int, int, int, str]], kind: str) -> Any:
        """Regions are (address, bytes, device, name)."""

    def deregister_memory(self, registered: Any) -> None: ...

    def get_agent_metadata(self) -> bytes: ...

    def add_remote_agent(self, metadata: bytes) -> str: ...

    def remove_remote_agent(self, name: str) -> None: ...

    def get_xfer_descs(self, places: list[tuple[int, int, int]], kind: str) -> Any:
        """Places are (address, bytes, device)."""

    def initialize_xfer(self, operation: str, mine: Any, theirs: Any, name: str) -> Any: ...

    def transfer(self, handle: Any) -> str: ...

    def check_xfer_state(self, handle: Any) -> str: ...

    def release_xfer_handle(self, handle: Any) -> None: ...


class Registrable(Protocol):
    """A KV cache that lies in one piece of memory, [layers, pages]."""

    page_bytes: int
    num_pages: int

    def region(self) -> tuple[int, int, int | None]:
        """Its address, its bytes, and the GPU that it lies on; None: host memory."""


@dataclass(eq=False)
class NixlSource:
    """A sender's memory. See `Source`."""

    endpoint: NixlEndpoint
    memory: NixlMemory
    name: str | None = None
    """Of its agent, once that is known here."""
    is_cut_off: bool = False
    num_reading: int = 0

    def copy(self, blocks: Sequence[int], layers: range, page_ids: Sequence[PageId], done: Done) -> None:
        """See `Source`; on the endpoint's thread."""
        if max(blocks) >= self.memory.num_blocks:
            raise ValueError(f"page {max(blocks)} of {self.memory.num_blocks} is not in the sender's memory")
        self.endpoint.submit(_Read(self, blocks, layers, page_ids, done))

    def close(self) -> None:
        """The sender has left."""
        self.endpoint.submit(self)


@dataclass(eq=False)
class _Read:
    source: NixlSource
    blocks: Sequence[int]
    layers: range
    page_ids: Sequence[PageId]
    done: Done
    handle: Any = None
    ends: float = field(default=0.0)


class NixlEndpoint:
    """This worker's agent, with its cache registered, and the thread that talks to it."""

    def __init__(self, agent: Agent, cache: Registrable, clock: Callable[[], float] = time.monotonic) -> None:
        address, size, gpu = cache.region()
        self._agent = agent
        self._clock = clock
        self._cache = cache
        self._address = address
        self._kind: Literal["DRAM", "VRAM"] = "DRAM" if gpu is None else "VRAM"
        self._gpu = gpu or 0
        self._registered = agent.register_memory([(address, size, self._gpu, "")], self._kind)
        self.exports = NixlMemory(
            metadata=agent.get_agent_metadata(),
            address=address,
            num_blocks=size // cache.page_bytes,
            kind=self._kind,
            gpu=self._gpu,
        )
        """For Offers."""
        self._inbox: queue.SimpleQueue[_Read | NixlSource | None] = queue.SimpleQueue()
        self._reading: list[_Read] = []
        self._sources: dict[bytes, NixlSource] = {}
        """By the description of their agent; those that are in use."""
        self.is_closing = False
        self._thread = threading.Thread(target=self._run, name="nixl", daemon=True)
        self._thread.start()

    def open(self, memory: NixlMemory) -> NixlSource:
        """A sender's memory, of pages as large as this worker's. Raises `ValueError`.

        There is one source for an agent, since NIXL would take the second for a new agent of that name: two workers of
        one process have the same, and one that comes back has it while something may still be read from it.
        """
        known = self._sources.items()
        self._sources = {name: source for name, source in known if not source.is_cut_off or source.num_reading}
        source = self._sources.setdefault(memory.metadata, NixlSource(self, memory))
        if source.memory != memory:
            raise ValueError("it offers other memory of the same NIXL agent")
        return source

    def submit(self, what: _Read | NixlSource) -> None:
        """Read soon, or let go of a source."""
        self._inbox.put(what)

    def close(self) -> None:
        """Wait for what is being read, for a while, then end the registration. The pages must not be used any more.

        What is submitted later is dropped.
        """
        self._inbox.put(None)
        self._thread.join()

    def _run(self) -> None:
        ends = 0.0
        while not self.is_closing or (self._reading and self._clock() < ends):
            try:
                item = self._inbox.get(timeout=POLL_SECONDS if self._reading else None)
            except queue.Empty:
                pass
            else:
                if isinstance(item, _Read):
                    self._begin(item)
                elif item is not None:
                    self._cut_off(item)
                else:
                    ends = self._clock() + READ_SECONDS
                    self.is_closing = True
            self._reading = [read for read in self._reading if not self._has_ended(read)]
        self._agent.deregister_memory(self._registered)

    def _begin(self, read: _Read) -> None:
        source = read.source
        try:
            if source.is_cut_off:
                raise ConnectionError("the sender was cut off")
            if source.name is None:
                source.name = self._agent.add_remote_agent(source.memory.metadata)
            read.handle = self._agent.initialize_xfer("READ", *self._places(read), source.name)
            read.ends = self._clock() + READ_SECONDS
            state = self._agent.transfer(read.handle)
        except Exception as error:  # NIXL has errors of its own, one for each of its codes
            self._cut_off(source)
            self._tell(read, error)
            return
        if state == "DONE":
            self._tell(read, None)
        else:
            source.num_reading += 1
            self._reading.append(read)

    def _places(self, read: _Read) -> tuple[Any, Any]:
        """Descriptors of this worker's pages and of the sender's, in pairs; neighbours on both sides are one."""
        size, memory = self._cache.page_bytes, read.source.memory
        here = [layer * self._cache.num_pages + page for layer in read.layers for page in read.page_ids]
        runs = [(here[first], read.blocks[first], (end - first) * size) for first, end in _runs(here, read.blocks)]
        mine = [(self._address + place * size, length, self._gpu) for place, _, length in runs]
        theirs = [(memory.address + block * size, length, memory.gpu) for _, block, length in runs]
        return self._agent.get_xfer_descs(mine, self._kind), self._agent.get_xfer_descs(theirs, memory.kind)

    def _has_ended(self, read: _Read) -> bool:
        try:
            state = self._agent.check_xfer_state(read.handle)
        except Exception as error:
            state = repr(error)
        if state == "PROC":
            if self._clock() > read.ends:
                self._cut_off(read.source)
            return False
        read.source.num_reading -= 1
        if state != "DONE" or read.source.is_cut_off:
            self._cut_off(read.source)
        self._tell(read, None if state == "DONE" else ConnectionError(f"nixl: {state}"))
        return True

    def _tell(self, read: _Read, error: Exception | None) -> None:
        if read.handle is not None:
            try:
                self._agent.release_xfer_handle(read.handle)
            except Exception as problem:
                log.warning("nixl did not release a read that has ended: %r", problem)
        try:
            read.done(error)
        except Exception:
            log.exception("nobody hears that pages are there")

    def _cut_off(self, source: NixlSource) -> None:
        """Begin no more reads from it, and let go of its agent once what is being read has ended."""
        source.is_cut_off = True
        if source.name is None or source.num_reading:
            return
        try:
            self._agent.remove_remote_agent(source.name)
        except Exception as problem:
            log.warning("nixl did not let go of %s: %r", source.name, problem)
        source.name = None


@asynccontextmanager
async def nixl_endpoint(settings: Settings, cache: Registrable) -> AsyncIterator[NixlEndpoint | None]:
    """This worker's inside the block, where there is to be one. Raises `SettingsError`."""
    agent = await asyncio.to_thread(_agent, settings.kv_transport, settings.bind)
    endpoint = await asyncio.to_thread(NixlEndpoint, agent, cache) if agent is not None else None
    try:
        yield endpoint
    finally:
        if endpoint is not None:
            await asyncio.to_thread(endpoint.close)


def _agent(wanted: str, bind: str) -> Agent | None:
    """One where it is asked for, or of use between hosts. Loads NIXL, which takes a second."""
    is_installed = importlib.util.find_spec("nixl") is not None
    if wanted == "nixl":
        if not is_installed:
            raise SettingsError("--kv-transport nixl needs NIXL: `pip install headrace[nixl]`")
        if is_loopback(bind):
            os.environ.setdefault("UCX_NET_DEVICES", "lo")
    elif wanted == "tcp" or not is_installed or is_loopback(bind) or not _has_rdma():
        return None
    else:
        os.environ.setdefault("UCX_TLS", "^tcp")
    from nixl._api import nixl_agent, nixl_agent_config

    agent: Agent = nixl_agent(secrets.token_hex(8), nixl_agent_config(backends=["UCX"]))
    return agent


def _has_rdma() -> bool:
    return RDMA_DEVICES.is_dir() and any(RDMA_DEVICES.iterdir())


def _runs(first: Sequence[int], second: Sequence[int]) -> list[tuple[int, int]]:
    """Index ranges [start, end) in which both sequences count up by one."""
    cuts = [
        index
        for index in range(1, len(first))
        if first[index] != first[index - 1] + 1 or second[index] != second[index - 1] + 1
    ]
    return list(zip([0, *cuts], [*cuts, len(first)], strict=True))
