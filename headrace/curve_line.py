"""Data lines between machines: ZeroMQ sockets under CURVE, with the mesh's key (RFC 26, CurveZMQ).

The I/O threads of ZeroMQ encrypt and decrypt, one for each connection of a line, which is what bounds their speed.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import zmq
import zmq.auth.thread

from headrace.data_line import MAX_HEADER_BYTES, STRIPES, TIMEOUT_SECONDS, Make, OnFrame
from headrace.keys import MeshKey

log = logging.getLogger(__name__)

PIECE_BYTES = 2**20
"""Payloads are cut into ZeroMQ frames of this size."""
HIGH_WATER_MARK = 64
_numbers = itertools.count()
"""Of this process's connections: one that is opened again must not take the name of the last one, which may still have
frames on the way."""
MAX_KNOWN = 4096
"""Connections whose member is remembered."""


class CurveConnection:
    """A DEALER of its own for each thread of a line."""

    def __init__(self, context: zmq.Context[Any], address: str, name: str, key: MeshKey) -> None:
        self._linger = int(TIMEOUT_SECONDS * 1000)
        self._socket = context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.ROUTING_ID, f"{name}#{next(_numbers)}".encode())
        self._socket.setsockopt(zmq.SNDHWM, HIGH_WATER_MARK)
        self._socket.setsockopt(zmq.SNDTIMEO, int(TIMEOUT_SECONDS * 1000))
        self._socket.curve_serverkey = key.public
        self._socket.curve_publickey = key.public
        self._socket.curve_secretkey = key.secret
        self._socket.connect(f"tcp://{address}")

    def send(self, header: bytes, payload: Sequence[memoryview]) -> None:
        """See `Connection`."""
        pieces = [view[start : start + PIECE_BYTES] for view in payload for start in range(0, len(view), PIECE_BYTES)]
        try:
            self._socket.send(header, zmq.SNDMORE if pieces else 0)
            for piece in pieces[:-1]:
                self._socket.send(piece, zmq.SNDMORE, copy=False)
            if pieces:
                self._socket.send(pieces[-1], copy=False)
        except zmq.ZMQError as error:
            raise ConnectionError(str(error)) from error

    def send_now(self, make: Make) -> bool:
        """See `Connection`. ZeroMQ's sockets belong to one thread."""
        return False

    def interrupt(self) -> None:
        """See `Connection`. A `send` that waits ends by its time-out, for the same reason."""
        self._linger = 0

    def close(self) -> None:
        """See `Connection`. What ZeroMQ has taken may still arrive, unless the connection was interrupted."""
        self._socket.close(self._linger)


class CurveListener:
    """One ROUTER for the lines of all other members."""

    def __init__(self, bind: str, key: MeshKey) -> None:
        self._context: zmq.Context[Any] = zmq.Context(io_threads=STRIPES)
        self._authenticator = zmq.auth.thread.ThreadAuthenticator(self._context)
        self._authenticator.start()
        self._authenticator.configure_curve_callback(credentials_provider=key)
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self._socket.setsockopt(zmq.MAXMSGSIZE, max(PIECE_BYTES, MAX_HEADER_BYTES))
        self._socket.setsockopt(zmq.RCVHWM, HIGH_WATER_MARK)
        self._socket.curve_server = True
        self._socket.curve_secretkey = key.secret
        self._socket.curve_publickey = key.public
        port = self._socket.bind_to_random_port(f"tcp://{bind}")
        self.address = f"{bind}:{port}"
        self._known: dict[bytes, str] = {}
        """Member ids by routing id."""
        self._thread: threading.Thread | None = None

    def start(
        self, on_frame: OnFrame, identify: Callable[[str], str | None], refuse: Callable[[str, str], None]
    ) -> None:
        """See `TcpListener.start`."""
        self._on_frame, self._identify, self._refuse = on_frame, identify, refuse
        self._thread = threading.Thread(target=self._run, name="data lines", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while True:
            try:
                frames = self._socket.recv_multipart(copy=False)
            except zmq.ContextTerminated:
                self._socket.close(linger=0)
                return
            try:
                self._take(frames)
            except Exception:
                log.exception("a frame broke")

    def _take(self, frames: list[zmq.Frame]) -> None:
        routing_id = bytes(frames[0].buffer)
        if routing_id not in self._known:
            member_id = self._identify(routing_id.decode("ascii", "replace").partition("#")[0])
            if member_id is None:
                return
            if len(self._known) >= MAX_KNOWN:
                self._known.clear()
            self._known[routing_id] = member_id
        if len(frames) < 2:
            self._refuse(routing_id.decode("ascii", "replace"), "no header")
            return
        self._on_frame(
            self._known[routing_id], frames[1].buffer, _FramesPayload([frame.buffer for frame in frames[2:]])
        )

    def drop(self, member_id: str) -> None:
        """The member has left: whoever comes with its name is looked up again."""
        self._known = {routing_id: known for routing_id, known in self._known.items() if known != member_id}

    def close(self) -> None:
        """Close all and end the thread."""
        self._authenticator.stop()
        if self._thread is None:
            self._socket.close(linger=0)
        self._context.term()
        if self._thread is not None:
            self._thread.join()


class _FramesPayload:
    """See `Payload`."""

    def __init__(self, pieces: Sequence[memoryview]) -> None:
        self.size = sum(len(piece) for piece in pieces)
        self._pieces = pieces

    def read_into(self, views: Sequence[memoryview]) -> None:
        pieces = iter(self._pieces)
        piece = next(pieces, memoryview(b""))
        for view in views:
            filled = 0
            while filled < len(view):
                while len(piece) == 0:
                    piece = next(pieces)
                count = min(len(piece), len(view) - filled)
                np.copyto(  # without the interpreter's lock, unlike slices of memoryviews
                    np.frombuffer(view, np.uint8)[filled : filled + count], np.frombuffer(piece, np.uint8)[:count]
                )
                piece, filled = piece[count:], filled + count
