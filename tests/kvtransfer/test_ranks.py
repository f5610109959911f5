"""Workers of several tensor-parallel ranks hand over to workers that cut KV another way, over real sockets and memory.

A rank is a KV cache with its share of the heads.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import msgspec
import numpy as np
import pytest
import torch

from headrace.data_line import DataLine, Make
from headrace.engine.kv_cache import CacheLayout, KVCache
from headrace.engine.page_pool import PagePool
from headrace.kvtransfer import admission as admission_module
from headrace.kvtransfer.departures import LineDepartures
from headrace.kvtransfer.handoff import Handoff, HandoffFailed
from headrace.kvtransfer.incoming import ReceivedRequest
from headrace.kvtransfer.layout import layout_of
from headrace.kvtransfer.messages import (
    Abort,
    Credit,
    Grant,
    Layout,
    Offer,
    ToReceiver,
    ToSender,
    TransportName,
    WireDtype,
)
from headrace.kvtransfer.receiver import Receiver
from headrace.kvtransfer.segments import Segment
from headrace.kvtransfer.sender import Sender
from headrace.kvtransfer.transports import Transports, exports_of
from headrace.messages.request import SamplingParams
from headrace.tcp_line import TcpConnection, TcpListener
from headrace.wire import Decoder, Message, encode
from tests.kvtransfer.far_cache import FarCache
from tests.kvtransfer.parts import cut

SOURCE, TARGET = "prefill-1", "decode-1"
KV_HEADS, HEAD_DIM, NUM_LAYERS = 4, 8, 3
NUM_TOKENS = 16 * 40
WINDOW_BYTES = 16 * 2**10

from_wire: Decoder[ToReceiver] = Decoder(ToReceiver)
back_from_wire: Decoder[ToSender] = Decoder(ToSender)


@dataclass
class Worker:
    """The caches of a worker's ranks and the pool that owns their pages."""

    ranks: int
    page_size: int
    staging_blocks: int = 0
    """Of a rank's cache that is not in host memory."""
    caches: list[KVCache] = field(init=False)

    def __post_init__(self) -> None:
        shape = CacheLayout("float32", NUM_LAYERS, max(KV_HEADS // self.ranks, 1), HEAD_DIM, self.page_size)
        num_pages = NUM_TOKENS // self.page_size
        self.caches = [self._cache(shape, num_pages) for _ in range(self.ranks)]
        self.pool = PagePool(num_pages, self.page_size)

    def _cache(self, shape: CacheLayout, num_pages: int) -> KVCache:
        if self.staging_blocks:
            return FarCache(shape, num_pages, self.staging_blocks)
        return KVCache(shape, num_pages, torch.device("cpu"))

    @property
    def layout(self) -> Layout:
        """Of the whole worker."""
        alone = layout_of("model", self.caches[0].layout, 1000)
        return msgspec.structs.replace(alone, kv_heads=KV_HEADS, tensor_parallel_size=self.ranks)


def kv_of(worker: Worker, rank: int, layer: int, tokens: list[int]) -> np.ndarray:
    """The pages of a prompt in one rank's layer, float32 [pages, 2, heads, page size, head size] between -1 and 1."""
    numbers = cut(worker.layout, rank, layer, tokens).astype(np.float64) / 2**31 - 1
    return (numbers[..., None] * np.linspace(0.5, 1, HEAD_DIM)).astype(np.float32)


class Both:
    """A prefill and a decode worker. Control messages go through their encoding, from loop turn to loop turn."""

    def __init__(self, source: Worker, target: Worker, listener: TcpListener, in_place: bool) -> None:
        self.source, self.target = source, target
        self.received: list[ReceivedRequest] = []
        self.sent_back: list[Message] = []
        self.refused: list[str] = []
        self.partitioned = self.damaging = False
        self.changed = asyncio.Event()
        self._in_place = in_place
        loop = asyncio.get_running_loop()
        self.receiver = Receiver(
            target.layout,
            target.caches,
            target.pool,
            target.pool.num_pages,
            self._back,
            self._on_received,
            choice=Transports(target.layout, target.caches[0], self._refuse),
            call_soon=lambda callback: loop.call_soon_threadsafe(self._after, callback),
            refuse=self._refuse,
        )
        listener.start(self.receiver.arrivals.on_frame, lambda name: SOURCE, self._refuse)
        self.address = listener.address
        self.line = DataLine(functools.partial(TcpConnection, listener.address, f"{SOURCE}@1"), TARGET)
        departures = LineDepartures(source.caches, "float32", self, loop.call_soon_threadsafe)
        self.sender = Sender(self._send, departures, source.staging_blocks)

    def submit(self, peer_id: str, make: Make, failed: Callable[[str], None], now: bool) -> None:
        """See `Lines`: the line to the only receiver, which may flip a bit on the way."""

        def damaged() -> tuple[bytes, list[memoryview]]:
            header, payload = make()
            data = bytearray(b"".join(payload))
            data[len(data) // 2] ^= 4
            return header, [memoryview(data)]

        self.line.submit(damaged if self.damaging else make, failed, now and not self.damaging)

    def reconnect(self, peer_id: str) -> None:
        """See `Lines`."""
        self.line.reconnect()

    def _refuse(self, sender: str, reason: str) -> None:
        self.refused.append(reason)

    def _after(self, callback: Callable[[], None]) -> None:
        callback()
        self.changed.set()

    async def _send(self, peer: str, message: Message) -> None:
        if not self.partitioned:
            again = from_wire(encode(message))
            asyncio.get_running_loop().call_soon(lambda: self._after(lambda: self.receiver.handle(SOURCE, again)))

    def _back(self, peer: str, message: Message) -> None:
        self.sent_back.append(message)
        if not self.partitioned:
            asyncio.get_running_loop().call_soon(self.sender.handle, TARGET, back_from_wire(encode(message)))

    def _on_received(self, request: ReceivedRequest) -> None:
        self.received.append(request)
        self.changed.set()

    async def until(self, condition: Callable[[], object]) -> None:
        """Wait for something that the receiver does."""
        async with asyncio.timeout(10):
            while not condition():
                self.changed.clear()
                await self.changed.wait()

    def handoff(self, name: str, tokens: list[int], wire_dtype: WireDtype = "auto") -> Handoff:
        """A new prompt, not yet computed."""
        exports = exports_of(self.source.caches[0])
        offer = Offer(
            request_id=name,
            attempt=0,
            gateway="gateway-1",
            layout=self.source.layout,
            token_ids=tokens,
            generated=0,
            sampling=SamplingParams(max_tokens=4),
            deadline=1e12,
            host=exports.host if self._in_place else None,
            shm=exports.shm if self._in_place else None,
            wire_dtype=wire_dtype,
        )
        pages = self.source.pool.allocate(self.source.pool.pages_for(len(tokens)))
        return Handoff(offer, pages, self.source.caches[0])

    def compute(self, handoff: Handoff, layers: range = range(NUM_LAYERS), chunk: int = 2) -> None:
        """Chunk by chunk, layer by layer, rank by rank."""
        for first in range(0, len(handoff.pages), chunk):
            ids = handoff.pages[first : first + chunk]
            for layer in layers:
                for rank, cache in enumerate(self.source.caches):
                    kv = kv_of(self.source, rank, layer, handoff.offer.token_ids)
                    cache.pages[layer, ids] = torch.from_numpy(kv[first : first + chunk].copy())
                    handoff.layer_ready(Segment(layer, first, len(ids), rank=rank))

    async def deliver(self, handoff: Handoff) -> None:
        """See `Sender.deliver`; the pages are free afterwards."""

        async def choose(handoff: Handoff) -> str:
            assert not handoff.refused
            return TARGET

        try:
            await self.sender.deliver(handoff, choose)
        finally:
            self.source.pool.release(handoff.pages)

    def error(self, request: ReceivedRequest) -> float:
        """The largest difference to what was computed, over all tokens on all ranks of the target."""
        tokens = request.offer.token_ids
        largest = 0.0
        for layer in range(NUM_LAYERS):
            for rank, cache in enumerate(self.target.caches):
                expected = kv_of(self.target, rank, layer, tokens)
                found = cache.pages[layer, request.pages].numpy()
                for axes in (expected, found):
                    axes[-1][..., (len(tokens) - 1) % self.target.page_size + 1 :, :] = 0
                largest = max(largest, float(np.abs(expected - found).max()))
        return largest

    async def until_nothing_is_held(self) -> None:
        """Decoding ends, and every page of every rank is free."""
        for request in self.received:
            self.target.pool.release(request.pages)
        self.received.clear()
        await self.until(lambda: self.target.pool.num_in_use == 0)
        assert (self.source.pool.num_in_use, self.receiver.num_open, self.sender.num_open) == (0, 0, 0)
        for worker in (self.source, self.target):
            worker.pool.check_integrity()
        self.receiver.check_integrity()


@asynccontextmanager
async def both(source: Worker, target: Worker, in_place: bool = False) -> AsyncIterator[Both]:
    """Both workers, connected, inside the block."""
    listener = TcpListener("127.0.0.1")
    workers = Both(source, target, listener, in_place)
    try:
        yield workers
    finally:
        workers.line.end()
        await asyncio.to_thread(workers.line.join)
        await asyncio.to_thread(listener.close)


@pytest.fixture(autouse=True)
def small_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a prompt takes many messages and needs credit."""
    monkeypatch.setattr(admission_module, "WINDOW_BYTES", WINDOW_BYTES)


CUTS = [
    (1, 16, 1, 32),
    (1, 32, 1, 16),
    (1, 16, 1, 8),
    (1, 16, 1, 20),
    (1, 16, 2, 16),
    (1, 16, 2, 32),
    (2, 16, 1, 16),
    (2, 32, 1, 16),
    (2, 16, 4, 16),
    (2, 16, 4, 8),
    (4, 16, 8, 32),
    (2, 16, 2, 16),
]
"""Ranks and page size of the sender, then of the receiver."""
PROMPTS = {"short": range(5), "long": range(150), "longer": [*range(100), *range(500, 601)], "full": range(300, 364)}
"""`longer` begins as `long` does."""


def expected_transport(ranks: int, in_place: bool) -> TransportName:
    """An Offer can name the memory of one cache."""
    return "shm" if in_place and ranks == 1 else "tcp"


@pytest.mark.parametrize(
    ("in_place", "staging_blocks"), [(False, 0), (True, 0), (True, 7)], ids=["travels", "in place", "staged"]
)
@pytest.mark.parametrize("case", CUTS, ids=lambda case: "{}x{} to {}x{}".format(*case))
async def test_every_prompt_arrives_as_it_was_computed(
    case: tuple[int, int, int, int], in_place: bool, staging_blocks: int
) -> None:
    """One prompt at a time, then all of them at once, of which the target now holds the beginnings."""
    async with both(Worker(*case[:2], staging_blocks), Worker(*case[2:]), in_place) as workers:
        for round_number, known in enumerate([{"longer": 100}, {name: len(PROMPTS[name]) for name in PROMPTS}]):
            handoffs = [workers.handoff(f"{name}{round_number}", list(tokens)) for name, tokens in PROMPTS.items()]
            delivering = []
            for handoff in handoffs:
                delivering.append(asyncio.create_task(workers.deliver(handoff)))
                workers.compute(handoff)
                handoff.finish(7, None)
                if round_number == 0:
                    await delivering[-1]
            await asyncio.gather(*delivering)
            assert [workers.error(request) for request in workers.received] == [0.0] * len(PROMPTS)
            assert {h.transport for h in handoffs} == {expected_transport(case[0], in_place)}
            for name, handoff in zip(PROMPTS, handoffs, strict=True):
                held_tokens = known.get(name, 0) // case[3] * case[3]
                all_of_it = held_tokens == len(PROMPTS[name])
                assert handoff.held_pages == (len(handoff.pages) if all_of_it else held_tokens // case[1])
            await workers.until_nothing_is_held()
        assert not workers.refused


@pytest.mark.parametrize("case", CUTS, ids=lambda case: "{}x{} to {}x{}".format(*case))
async def test_pages_are_packed_before_they_are_cut_anew(case: tuple[int, int, int, int]) -> None:
    """fp8 on the wire: four significant bits of each number arrive, beside numbers of the same prompt."""
    async with both(Worker(*case[:2]), Worker(*case[2:])) as workers:
        handoff = workers.handoff("r", list(range(150)), "fp8")
        delivering = asyncio.create_task(workers.deliver(handoff))
        workers.compute(handoff)
        handoff.finish(7, None)
        await delivering
        assert 0.001 < workers.error(workers.received[0]) < 1 / 15
        await workers.until_nothing_is_held()


ENDS = ["given up", "sender died", "receiver died", "cancelled", "damaged"]


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("case", [(1, 16, 2, 32), (2, 32, 1, 16), (2, 16, 4, 8)], ids=lambda case: str(case))
async def test_an_attempt_that_ends_in_the_middle_leaves_nothing_on_any_rank(
    case: tuple[int, int, int, int], end: str
) -> None:
    """All pages are free on both sides, and the next attempt arrives whole."""
    async with both(Worker(*case[:2]), Worker(*case[2:])) as workers:
        handoff = workers.handoff("r", list(range(300)))
        delivering = asyncio.create_task(workers.deliver(handoff))
        workers.compute(handoff, range(1))
        await workers.until(lambda: any(isinstance(message, Credit) for message in workers.sent_back))
        match end:
            case "given up":
                delivering.cancel()
            case "sender died":
                workers.partitioned = True
                workers.receiver.sender_left(SOURCE)
                workers.sender.receiver_left(TARGET)
            case "receiver died":
                workers.sender.receiver_left(TARGET)
                workers.receiver.sender_left(SOURCE)
            case "cancelled":
                workers.receiver.cancel("r", 0)
            case "damaged":
                workers.damaging = True
                workers.compute(handoff, range(1, 2))
                await workers.until(lambda: any(isinstance(message, Abort) for message in workers.sent_back))
                workers.damaging = False
        with pytest.raises((HandoffFailed, asyncio.CancelledError)):
            await delivering
        await workers.until_nothing_is_held()
        workers.partitioned = False
        again = workers.handoff("again", list(range(300)))
        delivering = asyncio.create_task(workers.deliver(again))
        workers.compute(again)
        again.finish(7, None)
        await delivering
        assert workers.error(workers.received[0]) == 0
        await workers.until_nothing_is_held()


async def test_no_rank_is_sent_heads_that_it_does_not_keep() -> None:
    """So no more bytes travel to four ranks than to one."""
    sent = []
    for ranks in (1, 2, 4):
        async with both(Worker(1, 16), Worker(ranks, 16)) as workers:
            handoff = workers.handoff("r", list(range(64)))
            delivering = asyncio.create_task(workers.deliver(handoff))
            workers.compute(handoff)
            handoff.finish(7, None)
            await delivering
            sent.append(handoff.sent_bytes)
            grants = [message for message in workers.sent_back if isinstance(message, Grant)]
            assert [len(grant.parts) for grant in grants] == [0 if ranks == 1 else ranks]
            await workers.until_nothing_is_held()
    assert sent == [64 * KV_HEADS * HEAD_DIM * 2 * 4 * NUM_LAYERS] * 3
