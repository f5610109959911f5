"""Data lines on one machine: TCP sockets on loopback, in the clear."""

from __future__ import annotations

import logging
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence

from headrace.data_line import MAX_HEADER_BYTES, STRIPES, TIMEOUT_SECONDS, Make, OnFrame
from headrace.keys import is_loopback
from headrace.wire import Decoder, Message, WireError, encode

log = logging.getLogger(__name__)

PREAMBLE = struct.Struct("<4sIQ")
"""Magic, bytes of the header, bytes of the payload."""
MAGIC = b"HRD1"
MAX_PAYLOAD_BYTES = 2**30
MAX_PARTS = 1024
"""Pieces of memory in one system call (IOV_MAX)."""
MAX_CONNECTIONS = 1024
ACCEPT_AGAIN_SECONDS = 0.1
FRAME_SECONDS = 2.0
"""How long a frame that has begun may make no progress before the receiver gives its connection up."""


class Hello(Message, frozen=True, kw_only=True):
    """The first frame of a connection: who sends, as the registry knows it (`id@epoch`)."""

    name: str


class TcpConnection:
    """A TCP socket on loopback."""

    def __init__(self, address: str, name: str) -> None:
        host, _, port = address.rpartition(":")
        self._socket = socket.create_connection((host, int(port)), timeout=TIMEOUT_SECONDS)
        self._socket.settimeout(None)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _as_timeval(TIMEOUT_SECONDS))
        if is_loopback(host):
            _use_plain_congestion_control(self._socket)
        self.send(encode(Hello(name=name)), ())

    def send(self, header: bytes, payload: Sequence[memoryview]) -> None:
        """See `Connection`."""
        preamble = PREAMBLE.pack(MAGIC, len(header), sum(view.nbytes for view in payload))
        left = [memoryview(preamble + header), *payload]
        while left:
            left = _after(left, self._socket.sendmsg(left[:MAX_PARTS]))

    def send_now(self, make: Make) -> bool:
        """See `Connection`. What the socket took in part breaks the connection, and comes whole over another."""
        header, _ = make()
        data = PREAMBLE.pack(MAGIC, len(header), 0) + header
        try:
            sent = self._socket.send(data, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        if sent < len(data):
            _shut_down(self._socket)
            return False
        return True

    def interrupt(self) -> None:
        """See `Connection`."""
        _shut_down(self._socket)

    def close(self) -> None:
        """See `Connection`."""
        self._socket.close()


def _use_plain_congestion_control(connection: socket.socket) -> None:
    """On loopback there is no congestion, and pacing (by bbr, where it is a machine's default) halves the speed."""
    try:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")
    except (OSError, AttributeError):
        log.debug("reno is not available")


def _as_timeval(seconds: float) -> bytes:
    """For SO_SNDTIMEO and SO_RCVTIMEO."""
    return struct.pack("@ll", int(seconds), int(seconds % 1 * 1_000_000))


def _shut_down(connection: socket.socket) -> None:
    """Wake whoever waits in it."""
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass


class TcpListener:
    """Takes the lines of other members, a thread for each connection."""

    def __init__(self, bind: str) -> None:
        self._listening = socket.create_server((bind, 0), family=socket.AF_INET6 if ":" in bind else socket.AF_INET)
        self.address = f"{bind}:{self._listening.getsockname()[1]}"
        self._decode: Decoder[Hello] = Decoder(Hello)
        self._connections: dict[threading.Thread, tuple[socket.socket, str]] = {}
        """By thread: the socket and the id of the member at its other end, once known."""
        self._lock = threading.Lock()
        self._closed = False
        self._accepting: threading.Thread | None = None

    def start(
        self, on_frame: OnFrame, identify: Callable[[str], str | None], refuse: Callable[[str, str], None]
    ) -> None:
        """Serve. `identify` gives the member id of an `id@epoch`, None for a stranger; it may wait for the registry."""
        self._on_frame, self._identify, self._refuse = on_frame, identify, refuse
        self._accepting = threading.Thread(target=self._accept, name="data lines", daemon=True)
        self._accepting.start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError as error:
                if self._closed:
                    return
                log.warning("a data line could not be accepted: %s", error)
                time.sleep(ACCEPT_AGAIN_SECONDS)  # what is used up, file descriptors say, may be given back
                continue
            with self._lock:
                if self._closed or len(self._connections) >= MAX_CONNECTIONS:
                    connection.close()
                    continue
                thread = threading.Thread(target=self._serve, args=(connection,), name="data line", daemon=True)
                self._connections[thread] = (connection, "")
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        name = "a stranger"
        try:
            connection.settimeout(TIMEOUT_SECONDS)
            header, payload = _receive(connection)
            name = self._decode(header).name
            member_id = self._identify(name) if payload.size == 0 else None
            if member_id is None:
                return
            connection.settimeout(None)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _as_timeval(FRAME_SECONDS))
            with self._lock:
                others = sum(peer == member_id for _, peer in self._connections.values())
                self._connections[threading.current_thread()] = (connection, member_id)
            _keep_apart(others % STRIPES)
            while True:
                header, payload = _receive(connection)
                self._on_frame(member_id, header, payload)
                payload.skip()
        except WireError as error:
            self._refuse(name, str(error))
        except OSError as error:
            log.debug("the line from %s ended: %s", name, error)
        except Exception:
            log.exception("the line from %s broke", name)
        finally:
            with self._lock:
                self._connections.pop(threading.current_thread(), None)
            connection.close()

    def drop(self, member_id: str) -> None:
        """The member has left: close its connections."""
        with self._lock:
            for connection, peer in self._connections.values():
                if peer == member_id:
                    _shut_down(connection)

    def close(self) -> None:
        """Close all and end all threads."""
        with self._lock:
            self._closed = True
            threads = list(self._connections)
            for connection, _ in self._connections.values():
                _shut_down(connection)
        _shut_down(self._listening)
        for thread in [*threads, *([self._accepting] if self._accepting else [])]:
            thread.join()
        self._listening.close()


def _keep_apart(stripe: int) -> None:
    """Let this thread share no core with those of a line's other stripes. Two that are woken at once often get the same
    core, and take turns there while another is idle.
    """
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))[stripe::STRIPES]
        if cores:
            os.sched_setaffinity(0, cores)


def _receive(connection: socket.socket) -> tuple[memoryview, _TcpPayload]:
    """The next header, and the payload that follows it. Raises `WireError` for what is none, `OSError` at the end."""
    preamble = memoryview(bytearray(PREAMBLE.size))
    begun = 0
    while not begun:
        try:
            begun = connection.recv_into(preamble, 0, socket.MSG_WAITALL)
        except BlockingIOError:  # `FRAME_SECONDS` of silence, which there may be between frames
            continue
        if begun == 0:
            raise ConnectionError("closed by the other end")
    _fill(connection, preamble[begun:])
    magic, header_bytes, payload_bytes = PREAMBLE.unpack(preamble)
    if magic != MAGIC or header_bytes > MAX_HEADER_BYTES or payload_bytes > MAX_PAYLOAD_BYTES:
        raise WireError(f"no frame begins with {bytes(preamble)!r}")
    header = memoryview(bytearray(header_bytes))
    _fill(connection, header)
    return header, _TcpPayload(connection, payload_bytes)


def _fill(connection: socket.socket, *views: memoryview) -> None:
    left = _after(views, 0)
    while left:
        try:
            count = connection.recvmsg_into(left[:MAX_PARTS], 0, socket.MSG_WAITALL)[0]
        except BlockingIOError as error:
            raise ConnectionError(f"silent for {FRAME_SECONDS} s within a frame") from error
        if count == 0:
            raise ConnectionError("closed by the other end")
        left = _after(left, count)


def _after(views: Sequence[memoryview], count: int) -> list[memoryview]:
    """What is left of these bytes when the first `count` are gone; no view in it is empty."""
    for index, view in enumerate(views):
        if count < len(view):
            return [view[count:], *(view for view in views[index + 1 :] if len(view))]
        count -= len(view)
    return []


class _TcpPayload:
    """See `Payload`."""

    def __init__(self, connection: socket.socket, size: int) -> None:
        self.size = size
        self._connection = connection
        self._left = size

    def read_into(self, views: Sequence[memoryview]) -> None:
        assert sum(view.nbytes for view in views) == self.size
        self._left = 0
        _fill(self._connection, *views)

    def skip(self) -> None:
        """Read what nobody wanted."""
        scratch = memoryview(bytearray(min(self._left, 2**16)))
        while self._left:
            part = scratch[: self._left]
            _fill(self._connection, part)
            self._left -= len(part)
