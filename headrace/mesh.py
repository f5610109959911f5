"""Messages between the processes of a mesh: ZeroMQ sockets that follow the registry. Bulk bytes take `data_line.py`.

Every process binds one ROUTER socket, its mailbox, and opens one DEALER socket to the mailbox of each peer as soon as
the registry names it, so that no request waits for a connection. A DEALER's routing id is `id@epoch`; a message from
anyone whom the registry does not know under just that id and epoch is dropped and counted.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import Counter, OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zmq
import zmq.asyncio
import zmq.auth.asyncio

from headrace.keys import MeshKey, is_loopback
from headrace.redis_client import RedisError
from headrace.registry import Member, Registry
from headrace.settings import SettingsError
from headrace.wire import Decoder, Message, T, WireError, encode

log = logging.getLogger(__name__)

MAX_FRAME_BYTES = 64 * 2**20
SEND_HIGH_WATER_MARK = 4096
"""Messages that wait for one peer before senders wait."""
SEND_TIMEOUT_SECONDS = 5.0
SILENCE_MS = 3000
STRANGER_SECONDS = 1.0
"""How often a sender that the registry does not know is looked up there again."""
LOOK_UP_SECONDS = 0.5
"""How long that may keep the mailbox waiting."""
MAX_STRANGERS = 1024
BURST_SECONDS = 0.1
"""For so long, messages that are here are taken before other tasks have their turn. A process that falls behind thus
takes several for the same stream, of which it makes one event and not one each.
"""
OTHERS = "others"
"""Under which those are counted that there is no room to name."""
GREETING = b""
"""The first message on every line: its receiver looks an unknown sender up at once, and they know each other."""


class PeerGone(ConnectionError):
    """The peer is not (or no longer) in the registry, or takes no messages."""


@dataclass(frozen=True)
class Inbound:
    """One message as it came: who sent it, and the undecoded header."""

    sender: Member
    header: memoryview


class Mesh:
    """This process's mailbox and its lines to all others."""

    def __init__(self, bind: str, key_file: Path | None, advertise: str | None = None) -> None:
        if key_file is None and not is_loopback(bind):
            raise SettingsError(
                f"--bind {bind} can be reached from other machines, and messages would travel in the clear: "
                "make a key with `headrace keys mesh.key` and give every process --mesh-key mesh.key"
            )
        self._key = MeshKey.read(key_file) if key_file else None
        self._context = zmq.asyncio.Context()
        self._authenticator: zmq.auth.asyncio.AsyncioAuthenticator | None = None
        self._mailbox = self._context.socket(zmq.ROUTER)
        self._lines: dict[str, zmq.asyncio.Socket] = {}
        self._registry: Registry | None = None
        self._refused: Counter[str] = Counter()
        self._counting = threading.Lock()
        self._burst_ends = 0.0
        """Monotonic seconds."""
        self._looking_up = asyncio.Lock()
        self._strangers: OrderedDict[bytes, float] = OrderedDict()
        """Routing ids that were looked up in vain within the last `STRANGER_SECONDS`, the oldest first, and when."""
        self._bind_mailbox(bind, advertise or bind)

    def _bind_mailbox(self, bind: str, advertise: str) -> None:
        _notice_broken_lines(self._mailbox)
        self._mailbox.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self._mailbox.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
        if self._key is not None:
            key = self._key
            self._authenticator = zmq.auth.asyncio.AsyncioAuthenticator(self._context)
            self._authenticator.start()
            self._authenticator.configure_curve_callback(credentials_provider=key)
            self._mailbox.curve_server = True
            self._mailbox.curve_secretkey = key.secret
            self._mailbox.curve_publickey = key.public
        port = self._mailbox.bind_to_random_port(f"tcp://{bind}")
        self.address = f"tcp://{advertise}:{port}"

    def follow(self, registry: Registry) -> None:
        """Open a line to each member that joins and close it when the member leaves."""
        self._registry = registry
        registry.on_join.append(self._open_line)
        registry.on_leave.append(self._close_line)

    def _open_line(self, member: Member) -> None:
        assert self._registry is not None
        me = self._registry.me
        line = self._context.socket(zmq.DEALER)
        _notice_broken_lines(line)
        line.setsockopt(zmq.ROUTING_ID, f"{me.id}@{me.epoch}".encode())
        line.setsockopt(zmq.SNDHWM, SEND_HIGH_WATER_MARK)
        if self._key is not None:
            line.curve_serverkey = self._key.public
            line.curve_publickey = self._key.public
            line.curve_secretkey = self._key.secret
        line.connect(member.address)
        self._lines[member.id] = line
        _send_now(line, GREETING)

    def _close_line(self, member: Member) -> None:
        line = self._lines.pop(member.id, None)
        if line is not None:
            line.close(linger=0)

    async def send(self, peer_id: str, message: Message) -> None:
        """Send a message.

        Raises `PeerGone` where the peer is not in the registry or takes nothing for `SEND_TIMEOUT_SECONDS`.
        """
        line = self._lines.get(peer_id)
        if line is None:
            raise PeerGone(f"{peer_id} is not in the mesh")
        sent = asyncio.ensure_future(line.send(encode(message)))
        try:
            if not sent.done():
                async with asyncio.timeout(SEND_TIMEOUT_SECONDS):
                    await sent
            sent.result()
        except (TimeoutError, zmq.ZMQError) as error:
            raise PeerGone(f"{peer_id} takes no messages: {error or 'timed out'}") from error

    def post(self, peer_id: str, message: Message) -> None:
        """Send a message without ever waiting; messages to one peer stay in order.

        Raises `PeerGone` where the peer is not in the registry or has let `SEND_HIGH_WATER_MARK` messages pile up.
        """
        line = self._lines.get(peer_id)
        if line is None:
            raise PeerGone(f"{peer_id} is not in the mesh")
        if error := _send_now(line, encode(message)):
            raise PeerGone(f"{peer_id} takes no messages: {error}") from error

    async def receive_as(self, decode: Decoder[T]) -> tuple[Inbound, T]:
        """The next message that follows the receiver's schema, decoded; what does not is refused."""
        while True:
            inbound = await self.receive()
            try:
                return inbound, decode(inbound.header)
            except WireError as error:
                self.refuse(inbound.sender, str(error))

    async def receive(self) -> Inbound:
        """The next message from a registered peer."""
        while True:
            frames = await self._next_frames()
            if len(frames) != 2:
                self._refuse(f"{len(frames) - 1} frames are no message", frames[0])
                continue
            sender = await self.identify(frames[0])
            if sender is not None and len(frames[1]) > len(GREETING):
                return Inbound(sender, memoryview(frames[1]))

    async def _next_frames(self) -> list[bytes]:
        frames: list[Any]
        if time.monotonic() < self._burst_ends:
            try:
                frames = await self._mailbox.recv_multipart(zmq.NOBLOCK)
                return frames
            except zmq.Again:
                pass
        await asyncio.sleep(0)  # a full mailbox never suspends the next line: let other tasks run
        frames = await self._mailbox.recv_multipart()
        self._burst_ends = time.monotonic() + BURST_SECONDS
        return frames

    async def identify(self, routing_id: bytes) -> Member | None:
        """The member behind an `id@epoch`; None for a stranger, who is counted."""
        member = self._member(routing_id)
        if member is None:
            async with self._looking_up:  # several lines of a newcomer ask at once
                member = self._member(routing_id) or await self._look_up(routing_id)
        if member is None:
            self._refuse("not in the registry", routing_id)
        return member

    async def _look_up(self, routing_id: bytes) -> Member | None:
        """It may have registered since the last look."""
        assert self._registry is not None
        if self._may_look_up(routing_id):
            try:
                async with asyncio.timeout(LOOK_UP_SECONDS):
                    await self._registry.refresh()
            except (RedisError, TimeoutError):
                pass
        return self._member(routing_id)

    def _member(self, routing_id: bytes) -> Member | None:
        assert self._registry is not None
        member_id, _, epoch = routing_id.decode("ascii", "replace").partition("@")
        member = self._registry.members.get(member_id)
        return member if member is not None and str(member.epoch) == epoch else None

    def _may_look_up(self, routing_id: bytes) -> bool:
        """Whether a look into Redis is due: strangers must not be able to keep this mailbox busy with it."""
        now = time.monotonic()
        while self._strangers and next(iter(self._strangers.values())) < now - STRANGER_SECONDS:
            self._strangers.popitem(last=False)
        if routing_id in self._strangers or len(self._strangers) >= MAX_STRANGERS:
            return False
        self._strangers[routing_id] = now
        return True

    def refuse(self, sender: Member, reason: str) -> None:
        """Count a message of a known peer that could not be used; its first one is logged."""
        self._refuse(reason, f"{sender.id}@{sender.epoch}".encode())

    def refuse_from(self, sender_id: str, reason: str) -> None:
        """The same, by the sender's id, from any thread."""
        self._refuse(reason, sender_id.encode())

    def _refuse(self, reason: str, routing_id: bytes) -> None:
        name = routing_id[:80].decode("latin-1").encode("unicode_escape").decode()
        if len(self._refused) >= MAX_STRANGERS and name not in self._refused:
            name = OTHERS
        with self._counting:
            self._refused[name] += 1
            is_first = self._refused[name] == 1
        if is_first:
            log.warning("refusing messages from %s: %s (further ones are counted only)", name, reason)

    @property
    def refused(self) -> int:
        """Messages refused since the start."""
        return self._refused.total()

    def close(self) -> None:
        """Close all sockets at once; what was not sent is dropped."""
        if self._authenticator is not None:
            self._authenticator.stop()
        self._context.destroy(linger=0)


def _notice_broken_lines(socket: zmq.asyncio.Socket) -> None:
    """Find connections whose other end is silent, as TCP would only after minutes; a new one then takes their place.

    libzmq's threads do that, so a busy event loop is not taken for a broken line.
    """
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.HEARTBEAT_IVL, 1000)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, SILENCE_MS)
    socket.setsockopt(zmq.HANDSHAKE_IVL, SILENCE_MS)


def _send_now(line: zmq.asyncio.Socket, frame: bytes) -> BaseException | None:
    """Send without waiting; the error where that is known to have failed."""
    sent = asyncio.ensure_future(line.send(frame, zmq.NOBLOCK))
    if sent.done():
        return sent.exception()
    sent.add_done_callback(lambda future: future.cancelled() or future.exception())
    return None
