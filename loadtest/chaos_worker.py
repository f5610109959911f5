"""One worker process of `make chaos-kv`, and what goes wrong in it short of its death."""

from __future__ import annotations

import asyncio
import functools
import logging
import random
import sys
from collections.abc import Callable, Sequence

from headrace.data_line import Make
from headrace.data_lines import DataLines, data_listener
from headrace.decode.worker import DecodeWorker
from headrace.engine.device_thread import DeviceThread
from headrace.engine.engine import Engine
from headrace.kvtransfer.departures import Lines
from headrace.kvtransfer.messages import Grant
from headrace.kvtransfer.transports import Wanted
from headrace.loadtest.forked_workers import end_with_parent
from headrace.loadtest.keyed_model import (
    CHUNK_TOKENS,
    LAYOUT,
    MAX_NUM_SEQS,
    PREFILLS_AT_ONCE,
    KeyedModel,
    keyed_engine,
)
from headrace.messages.stream import TokenBatch, TokenColumns
from headrace.node import ModelIdentity, Node, join_mesh, until_stopped
from headrace.prefill.turns import OwnDevice
from headrace.prefill.worker import PrefillWorker
from headrace.registry import Tier
from headrace.settings import Settings
from headrace.wire import Message

MODEL = ModelIdentity("keyed", "keyed", 4096)
NAMESPACE = "chaos"
LEASE_SECONDS = 0.5
PAGES = 96
"""Of each worker: fewer than the requests at once want."""
DRAIN_SECONDS = 1.0
MISTAKEN = 3
"""Exit status of a worker that still held pages when it stopped."""


class Accidents:
    """What goes wrong in one worker short of its death."""

    LOST = 0.0005
    REPEATED = 0.002
    DAMAGED = 0.002
    ABORTED = 0.01

    def __init__(self, lines: Lines, seed: int) -> None:
        self._lines = lines
        self._random = random.Random(seed)

    def befall_prefill(self, node: Node, engine: Engine) -> None:
        """Its messages of the handoff, and its computing; before there is a worker."""
        send = node.mesh.send

        async def send_or_not(peer: str, message: Message) -> None:
            for _ in range(self._times()):
                await send(peer, message)

        node.mesh.send = send_or_not  # type: ignore[method-assign, assignment]
        assert isinstance(engine.model, KeyedModel)
        engine.model.accident = self._fail

    def befall_decode(self, node: Node, worker: DecodeWorker) -> None:
        """Its answers, and its patience."""
        post = node.mesh.post

        def post_or_not(peer: str, message: Message) -> None:
            if not self._happens(self.LOST) or isinstance(message, TokenBatch | TokenColumns):
                post(peer, message)
            if isinstance(message, Grant) and self._happens(self.ABORTED):
                asyncio.get_running_loop().call_soon(worker.receiver.cancel, message.request_id, message.attempt)

        node.mesh.post = post_or_not  # type: ignore[method-assign, assignment]

    def _happens(self, chance: float) -> bool:
        return self._random.random() < chance

    def _times(self) -> int:
        """How often a message arrives."""
        return 0 if self._happens(self.LOST) else 2 if self._happens(self.REPEATED) else 1

    def submit(self, peer_id: str, make: Make, failed: Callable[[str], None], now: bool) -> None:
        """See `Lines`."""
        for _ in range(self._times()):
            damaged = functools.partial(self._damage, make) if self._happens(self.DAMAGED) else make
            self._lines.submit(peer_id, damaged, failed, now)

    def reconnect(self, peer_id: str) -> None:
        """See `Lines`."""
        self._lines.reconnect(peer_id)

    def _damage(self, make: Make) -> tuple[bytes, Sequence[memoryview]]:
        """Flip a bit anywhere in header or payload."""
        header, payload = make()
        frame = bytearray(header + b"".join(payload))
        frame[self._random.randrange(len(frame))] ^= 1 << self._random.randrange(8)
        return bytes(frame[: len(header)]), [memoryview(frame)[len(header) :]]

    def _fail(self) -> None:
        if self._happens(self.ABORTED / 10):
            raise RuntimeError("accident")


def settings(url: str, name: str) -> Settings:
    """Of one process of this mesh."""
    return Settings(redis=url, namespace=NAMESPACE, worker_id=name, lease_seconds=LEASE_SECONDS)


def serve(name: str, url: str, seed: int) -> None:
    """A worker process's life. `name` begins with its tier."""
    end_with_parent()
    sys.exit(asyncio.run(_serve(name, url, seed)))


async def _serve(name: str, url: str, seed: int) -> int:
    logging.disable()  # there is an accident in every other line
    tier: Tier = "prefill" if name.startswith("prefill") else "decode"
    engine = keyed_engine(PAGES)
    with DeviceThread() as device_thread:
        await _work(name, tier, url, seed, engine, device_thread)
    engine.pool.check_integrity()
    return MISTAKEN if engine.pool.num_in_use else 0


async def _work(name: str, tier: Tier, url: str, seed: int, engine: Engine, device_thread: DeviceThread) -> None:
    async with (
        data_listener("127.0.0.1", None) as listener,
        join_mesh(settings(url, name), tier, MODEL, listener.address if tier == "decode" else "") as node,
        DataLines(node.registry, None) as lines,
    ):
        accidents = Accidents(lines, seed)
        if tier == "prefill":
            accidents.befall_prefill(node, engine)
            turns = OwnDevice(engine, device_thread, CHUNK_TOKENS)
            prefill = PrefillWorker(
                node, engine, LAYOUT, turns, PREFILLS_AT_ONCE, LEASE_SECONDS, accidents, wire_dtype="auto"
            )
            await prefill.run(until_stopped(), DRAIN_SECONDS)
        else:
            transport: Wanted = "tcp" if name.endswith("0") else "auto"
            decode = DecodeWorker(
                node,
                engine,
                device_thread,
                LAYOUT,
                MAX_NUM_SEQS,
                listener,
                lines,
                transport=transport,
                most_prompt_tokens=CHUNK_TOKENS,
            )
            accidents.befall_decode(node, decode)
            await decode.run(until_stopped(), DRAIN_SECONDS)
