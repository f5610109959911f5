"""The mesh that `make fuzz-kv` attacks, and the honest requests that it serves meanwhile."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence

from headrace.data_line import Listener, Make
from headrace.data_lines import DataLines
from headrace.decode.worker import DecodeWorker
from headrace.engine.device_thread import DeviceThread
from headrace.kvtransfer.messages import Commit, Offer, OnDataLine
from headrace.loadtest.bare_gateway import BareGateway
from headrace.loadtest.keyed_model import (
    CHUNK_TOKENS,
    LAYOUT,
    MAX_NUM_SEQS,
    PAGE_SIZE,
    PREFILLS_AT_ONCE,
    keyed_engine,
    undisturbed,
)
from headrace.loadtest.kv_mutations import Mutations
from headrace.messages.stream import TokenBatch, TokenColumns
from headrace.node import Node
from headrace.prefill import worker as prefill_worker
from headrace.prefill.turns import OwnDevice
from headrace.registry import Tier
from headrace.wire import Decoder, Message, encode

LEASE_SECONDS = 10.0
PREFILL_PAGES = 128
DECODE_PAGES = 256
HONEST_AT_ONCE = 4


class Rig:
    """Real workers around a model that tells by its tokens whether a byte of the keys and values was wrong."""

    def __init__(
        self,
        nodes: dict[Tier, Node],
        listener: Listener,
        lines: DataLines,
        device_threads: tuple[DeviceThread, DeviceThread],
        seed: int,
    ) -> None:
        self._prefill_node, self._decode_node = nodes["prefill"], nodes["decode"]
        self._lines = lines
        self.gateway = BareGateway(nodes["gateway"])
        self._send, self._post = self._prefill_node.mesh.send, self._decode_node.mesh.post
        self._prefill_node.mesh.send = self._send_and_remember  # type: ignore[method-assign, assignment]
        self._decode_node.mesh.post = self._post_and_count  # type: ignore[method-assign, assignment]
        self.engines = keyed_engine(PREFILL_PAGES), keyed_engine(DECODE_PAGES)
        self.prefill = prefill_worker.PrefillWorker(
            self._prefill_node,
            self.engines[0],
            LAYOUT,
            OwnDevice(self.engines[0], device_threads[0], CHUNK_TOKENS),
            PREFILLS_AT_ONCE,
            LEASE_SECONDS,
            self,
            wire_dtype="auto",
        )
        self.decode = DecodeWorker(
            self._decode_node,
            self.engines[1],
            device_threads[1],
            LAYOUT,
            MAX_NUM_SEQS,
            listener,
            lines,
            transport="tcp",
        )
        self.decoded = 0
        """Requests that the decode worker has run to their ends, whoever handed them over."""
        self.mutations = Mutations(seed)
        self.answered = 0
        self.stopping = False
        self.data_address = listener.address
        self._random = random.Random(seed)
        self._offers: dict[str, Offer] = {}
        self._decode: Decoder[Commit | Offer | OnDataLine] = Decoder(Commit | Offer | OnDataLine)

    @property
    def address(self) -> str:
        """Of the mailbox under fuzz."""
        return self._decode_node.mesh.address

    @property
    def refused(self) -> int:
        """Messages that the receiving side has counted as refused. Two causes are counted in two places."""
        receiver, mesh = self.decode.receiver, self._decode_node.mesh
        by_offer = receiver.refusals.total() - receiver.refusals["invalid"] - receiver.refusals["duplicate"]
        return mesh.refused + receiver.late + receiver.arrivals.dropped + by_offer

    async def run(self) -> None:
        """Serve until cancelled."""
        never: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        async with asyncio.TaskGroup() as group:
            group.create_task(self.gateway.run())
            group.create_task(self.prefill.run(never, 0.0))
            group.create_task(self.decode.run(never, 0.0))

    def check_integrity(self) -> None:
        """Assert that every page is accounted for."""
        for engine in self.engines:
            engine.pool.check_integrity()
        self.decode.receiver.check_integrity()

    def _post_and_count(self, peer: str, message: Message) -> None:
        if isinstance(message, TokenBatch | TokenColumns):
            self.decoded += sum(event.finish_reason is not None for event in message.events)
        self._post(peer, message)

    async def _send_and_remember(self, peer: str, message: Message) -> None:
        await self._send(peer, message)
        if isinstance(message, Offer):
            self._offers[message.request_id] = message
            self.mutations.offered(message)
        elif isinstance(message, Commit):
            self.mutations.saw(encode(message))

    def submit(self, peer_id: str, make: Make, failed: Callable[[str], None], now: bool) -> None:
        """See `Lines`: what the honest worker sends is remembered."""

        def remember() -> tuple[bytes, Sequence[memoryview]]:
            header, payload = make()
            self.mutations.saw(header, b"".join(payload))
            return header, payload

        self._lines.submit(peer_id, remember, failed, now)

    def reconnect(self, peer_id: str) -> None:
        """See `Lines`."""
        self._lines.reconnect(peer_id)

    async def keep_asking(self, number: int) -> None:
        """One honest request after another. Some share a prefix, so that held pages are used."""
        while not self.stopping:
            shared = [self._random.randrange(3)] * PAGE_SIZE * self._random.randrange(4)
            prompt = [*shared, *(self._random.randrange(1000) for _ in range(self._random.randrange(1, 24)))]
            request_id = f"honest-{number}"
            tokens = await self.gateway.ask(request_id, prompt)
            self.answered += tokens == undisturbed(prompt)
            self.mutations.is_over(self._offers.pop(request_id))
            number += HONEST_AT_ONCE

    async def repeat(self) -> bool:
        """The honest prefill worker's lines deliver something twice. Returns whether there was anything."""
        frame = self.mutations.replay()
        if frame is None:
            return False
        header, payload = frame
        message = self._decode(header)
        if isinstance(message, Commit | Offer):
            await self._send(self._decode_node.id, message)
        else:
            self._lines.submit(self._decode_node.id, lambda: (header, [memoryview(payload)]), lambda reason: None)
        return True
