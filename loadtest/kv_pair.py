"""Two processes that hand pages over to each other by the real sender and receiver, without a model, a mesh or Redis.

The control messages take a Unix socket instead of the mesh; the pages go as they do between workers.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import multiprocessing
import socket
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import torch
import xxhash

from headrace.curve_line import CurveConnection, CurveListener
from headrace.data_line import DataLine
from headrace.engine.kv_cache import CacheLayout, KVCache
from headrace.engine.page_pool import PagePool
from headrace.keys import MeshKey
from headrace.kvtransfer.base import Source
from headrace.kvtransfer.departures import LineDepartures
from headrace.kvtransfer.handoff import Handoff
from headrace.kvtransfer.incoming import ReceivedRequest
from headrace.kvtransfer.layout import layout_of
from headrace.kvtransfer.messages import Offer, ToReceiver, ToSender, TransportName, WireDtype
from headrace.kvtransfer.nixl import NixlEndpoint, nixl_endpoint
from headrace.kvtransfer.receiver import Receiver
from headrace.kvtransfer.segments import Segment
from headrace.kvtransfer.sender import Sender
from headrace.kvtransfer.transports import Transports, Wanted, exports_of
from headrace.messages.request import SamplingParams
from headrace.settings import Settings
from headrace.tcp_line import TcpConnection, TcpListener
from headrace.wire import Decoder, Message, encode

SOURCE, TARGET = "source", "target"
MAX_MESSAGE_BYTES = 2**20
DIGEST = b"digest"
VOCABULARY = 2**20
"""Asks the target for the digest of the prompt that came last."""


@dataclass(frozen=True)
class PairConfig:
    """What both processes hold, and how pages travel."""

    layout: CacheLayout
    num_pages: int
    transport: TransportName
    device: str = "cpu"
    wire_dtype: WireDtype = "auto"
    key: tuple[bytes, bytes] | None = None
    """Of CURVE; None: in the clear."""


class Only:
    """Chooses one transport, whatever else would do."""

    def __init__(self, config: PairConfig, store: KVCache, nixl: NixlEndpoint | None) -> None:
        self._transport = config.transport
        layout = layout_of("bench", config.layout, VOCABULARY)
        wanted: Wanted = "nixl" if nixl is not None else "auto"
        self._transports = Transports(layout, store, _refuse, nixl=nixl, wanted=wanted)

    def pages_here(self, sender: str, offer: Offer) -> None:
        """See `Choice`."""

    def choose(self, sender: str, offer: Offer) -> tuple[TransportName, Source | None]:
        """See `Choice`."""
        if self._transport == "tcp":
            return "tcp", None
        transport, source = self._transports.choose(sender, offer)
        assert transport == self._transport, f"{transport} was chosen where {self._transport} was to be measured"
        return transport, source

    def forget(self, sender: str) -> None:
        """See `Choice`."""


def _refuse(sender: str, reason: str) -> None:
    raise AssertionError(f"{sender}: {reason}")


def touched_cache(config: PairConfig) -> KVCache:
    """A cache whose memory is there: page faults are not what is measured."""
    cache = KVCache(config.layout, config.num_pages, torch.device(config.device))
    cache.pages.view(torch.uint8).fill_(1)
    return cache


class Pipe:
    """Control messages, on the event loop: each a packet, about as fast as the mesh's."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MAX_MESSAGE_BYTES)
        self._loop = asyncio.get_running_loop()
        self._inbox: asyncio.Queue[bytes] = asyncio.Queue()
        self._message = memoryview(bytearray(MAX_MESSAGE_BYTES))
        self._loop.add_reader(connection.fileno(), self._read)

    def _read(self) -> None:
        size = 0
        with contextlib.suppress(OSError):
            size = self._connection.recv_into(self._message)
        if not size:
            self._loop.remove_reader(self._connection.fileno())
        self._inbox.put_nowait(bytes(self._message[:size]))

    def write(self, data: bytes) -> None:
        """Send."""
        self._connection.send(data)

    async def read(self) -> bytes:
        """The next message; empty at the end."""
        return await self._inbox.get()

    def close(self) -> None:
        """Close."""
        self._loop.remove_reader(self._connection.fileno())
        self._connection.close()


def target_process(connection: socket.socket, config: PairConfig) -> None:
    """The receiving process."""
    logging.basicConfig(level=logging.INFO)
    asyncio.run(_target(connection, config))


async def _target(connection: socket.socket, config: PairConfig) -> None:
    cache = touched_cache(config)
    async with nixl_endpoint(_settings(config), cache) as nixl:
        await _serve(connection, config, cache, nixl)


def _settings(config: PairConfig) -> Settings:
    return Settings(kv_transport="nixl" if config.transport == "nixl" else "tcp")


async def _serve(connection: socket.socket, config: PairConfig, cache: KVCache, nixl: NixlEndpoint | None) -> None:
    pool = PagePool(config.num_pages, config.layout.page_size)
    pipe = Pipe(connection)
    digest = b""

    def on_received(request: ReceivedRequest) -> None:
        nonlocal digest
        last.append(request.pages)
        pool.release(request.pages)

    last: list[list[int]] = []
    receiver = Receiver(
        layout_of("bench", config.layout, VOCABULARY),
        [cache],
        pool,
        config.num_pages,
        lambda _, message: pipe.write(encode(message)),
        on_received,
        choice=Only(config, cache, nixl),
        call_soon=asyncio.get_running_loop().call_soon_threadsafe,
        refuse=_refuse,
    )
    listener = CurveListener("127.0.0.1", MeshKey(*config.key)) if config.key else TcpListener("127.0.0.1")
    listener.start(receiver.arrivals.on_frame, lambda name: name.partition("@")[0], _refuse)
    pipe.write(listener.address.encode())
    decode: Decoder[ToReceiver] = Decoder(ToReceiver)
    while data := await pipe.read():
        if data == DIGEST:
            pipe.write(digest_of(cache, last[-1]))
            last.clear()
        else:
            receiver.handle(SOURCE, decode(data))
    await asyncio.to_thread(listener.close)
    pipe.close()


def digest_of(cache: KVCache, pages: Sequence[int]) -> bytes:
    """Of all layers of these pages."""
    state = xxhash.xxh3_64()
    for layer in range(cache.layout.num_layers):
        state.update(cache.read_pages(layer, pages))
    return state.digest()


class OneLine:
    """See `Lines`: to the only receiver there is."""

    def __init__(self, line: DataLine) -> None:
        self._line = line

    def submit(self, peer_id: str, make: object, failed: object, now: bool) -> None:
        """See `Lines`."""
        self._line.submit(make, failed, now)  # type: ignore[arg-type]

    def reconnect(self, peer_id: str) -> None:
        """See `Lines`."""
        self._line.reconnect()


class Pair:
    """The sending process's end."""

    def __init__(
        self, config: PairConfig, cache: KVCache, pipe: Pipe, line: DataLine, nixl: NixlEndpoint | None
    ) -> None:
        self.config = config
        self.cache = cache
        self._pipe = pipe
        self._decode: Decoder[ToSender] = Decoder(ToSender)
        self._digests: asyncio.Queue[bytes] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        departures = LineDepartures([cache], config.layout.dtype, OneLine(line), loop.call_soon_threadsafe)
        self.sender = Sender(self._send, departures, cache.staging_blocks)
        self._exports = exports_of(cache, nixl)
        self._count = 0

    async def _send(self, peer: str, message: Message) -> None:
        self._pipe.write(encode(message))

    async def listen(self) -> None:
        """Hear the target, for ever."""
        while data := await self._pipe.read():
            if len(data) == 8:
                self._digests.put_nowait(data)
            else:
                self.sender.handle(TARGET, self._decode(data))

    def handoff(self, pages: list[int]) -> Handoff:
        """A new prompt that fills these pages."""
        self._count += 1
        offer = Offer(
            request_id=f"r{self._count}",
            attempt=0,
            gateway="gateway",
            layout=layout_of("bench", self.config.layout, VOCABULARY),
            token_ids=[self._count] * (len(pages) * self.config.layout.page_size),  # no prefix that the target holds
            generated=0,
            sampling=SamplingParams(max_tokens=1),
            deadline=time.time() + 600,
            host=self._exports.host,
            cuda_ipc=self._exports.cuda_ipc if self.config.transport == "cuda_ipc" else None,
            shm=self._exports.shm,
            nixl=self._exports.nixl,
            wire_dtype=self.config.wire_dtype,
        )
        return Handoff(offer, pages, self.cache)

    async def deliver(self, handoff: Handoff) -> None:
        """Until it is acknowledged."""
        await self.sender.deliver(handoff, _choose)

    async def transfer(self, num_pages: int) -> float:
        """Seconds from the Offer to the Ack of a prompt all of whose pages are ready at once."""
        handoff = self.handoff(list(range(num_pages)))
        for layer in range(self.config.layout.num_layers):
            handoff.layer_ready(Segment(layer, 0, num_pages))
        handoff.finish(0, None)
        started = time.perf_counter()
        await self.deliver(handoff)
        return time.perf_counter() - started

    async def arrived_right(self, pages: Sequence[int]) -> bool:
        """Whether the last prompt's pages, these here, are there what they are here."""
        self._pipe.write(DIGEST)
        return await self._digests.get() == digest_of(self.cache, pages)


async def _choose(handoff: Handoff) -> str:
    return TARGET


@asynccontextmanager
async def pair(config: PairConfig, cache: KVCache | None = None) -> AsyncIterator[Pair]:
    """Both processes inside the block. `cache` may be shared by pairs of the same layout."""
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    process = multiprocessing.get_context("spawn").Process(target=target_process, args=(there, config), daemon=True)
    process.start()
    there.close()
    pipe = Pipe(here)
    address = (await pipe.read()).decode()
    context = None
    if config.key:
        import zmq

        context = zmq.Context(io_threads=4)
        connect = functools.partial(CurveConnection, context, address, f"{SOURCE}@1", MeshKey(*config.key))
        line = DataLine(connect, TARGET)
    else:
        line = DataLine(functools.partial(TcpConnection, address, f"{SOURCE}@1"), TARGET)
    cache = cache or touched_cache(config)
    async with nixl_endpoint(_settings(config), cache) as nixl:
        both = Pair(config, cache, pipe, line, nixl)
        listening = asyncio.create_task(both.listen())
        try:
            yield both
        finally:
            line.end()
            await asyncio.to_thread(line.join)
            if context is not None:
                context.term()
            listening.cancel()
            pipe.close()
            await asyncio.to_thread(process.join)
