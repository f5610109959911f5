"""One more member of the mesh, made of plain sockets: it can send what a `Mesh` and a `DataLine` would not."""

from __future__ import annotations

import asyncio
import socket
import time
from collections import Counter, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import zmq

from headrace import __version__
from headrace.kvtransfer.messages import Grant, ToSender
from headrace.node import ModelIdentity
from headrace.redis_client import Keys, connect
from headrace.registry import Member, Registry, Tier
from headrace.tasks import end_task
from headrace.tcp_line import MAGIC, PREAMBLE, Hello
from headrace.wire import Decoder, WireError, encode

Socket = zmq.Socket[bytes]
Frame = tuple[bytes, bytes]
"""Header and payload."""


class Intruder:
    """What it has been told, and ways to send."""

    def __init__(self, me: Member, mailbox: Socket, context: zmq.Context[Socket]) -> None:
        self.name = f"{me.id}@{me.epoch}"
        self.answers: Counter[str] = Counter()
        """By type of message."""
        self.granted: deque[tuple[str, int, int]] = deque()
        """(request, attempt, pages) of own handoffs that can be spoiled."""
        self.waiting: dict[str, int] = {}
        """Pages of own handoffs that are offered, by request."""
        self._mailbox = mailbox
        self._context = context
        self._decode: Decoder[ToSender] = Decoder(ToSender)

    def mailbox_line(self, address: str, routing_id: str) -> Socket:
        """A connection to a mailbox under any name."""
        line = self._context.socket(zmq.DEALER)
        line.setsockopt(zmq.LINGER, 0)
        line.setsockopt(zmq.ROUTING_ID, routing_id.encode())
        line.connect(address)
        return line

    def read(self) -> None:
        """Take what came back."""
        while self._mailbox.poll(0):
            frames = self._mailbox.recv_multipart()
            try:
                message = self._decode(frames[1])
            except WireError:
                continue  # a greeting
            self.answers[type(message).__name__] += 1
            if isinstance(message, Grant) and message.request_id in self.waiting:
                self.granted.append((message.request_id, message.attempt, self.waiting.pop(message.request_id)))


class RawDataLine:
    """One connection to a listener of data lines, under any name."""

    def __init__(self, address: str, name: str) -> None:
        self._address = address
        self._socket = socket.socket()
        self._socket.setblocking(False)
        self._unsent = self._frame((encode(Hello(name=name)), b""))

    @staticmethod
    def _frame(frame: Frame) -> bytes:
        header, payload = frame
        return PREAMBLE.pack(MAGIC, len(header), len(payload)) + header + payload

    async def send(self, frame: Frame, leave_out: int = 0) -> None:
        """Send a frame, but for its last bytes."""
        data = self._frame(frame)
        await self.send_raw(data[: len(data) - leave_out])

    async def send_raw(self, data: bytes) -> None:
        """Send bytes that may be no frame."""
        loop = asyncio.get_running_loop()
        if self._unsent:
            host, _, port = self._address.rpartition(":")
            await loop.sock_connect(self._socket, (host, int(port)))
            data, self._unsent = self._unsent + data, b""
        await loop.sock_sendall(self._socket, data)

    def close(self) -> None:
        """Close it, whatever is still on the way."""
        self._socket.close()


@asynccontextmanager
async def intruder(
    url: str, keys: Keys, name: str, tier: Tier, model: ModelIdentity, lease_seconds: float
) -> AsyncIterator[Intruder]:
    """A registered member inside the block."""
    client = connect(url)
    try:
        with zmq.Context() as context, context.socket(zmq.ROUTER) as mailbox:
            mailbox.setsockopt(zmq.LINGER, 0)
            port = mailbox.bind_to_random_port("tcp://127.0.0.1")
            me = Member(
                id=name,
                epoch=time.time_ns(),
                tier=tier,
                address=f"tcp://127.0.0.1:{port}",
                version=__version__,
                model=model.name,
                model_fingerprint=model.fingerprint,
                max_model_len=model.max_model_len,
            )
            registry = Registry(client, keys, me, lease_seconds)
            await registry.join()
            heartbeat = asyncio.create_task(registry.run())
            try:
                yield Intruder(me, mailbox, context)
            finally:
                await end_task(heartbeat)
                context.destroy(linger=0)
    finally:
        await client.aclose()
