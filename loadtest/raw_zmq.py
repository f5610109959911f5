"""Raw pyzmq between two processes: what `tcp` is measured against. The receiver looks at no byte."""

from __future__ import annotations

import multiprocessing
import time
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import zmq

from headrace.engine.host_memory import keep_freed_memory

HIGH_WATER_MARK = 8


class RawZmq:
    """Sends a buffer again and again in frames of `frame_bytes`, over `sockets` sockets and as many I/O threads."""

    def __init__(self, sockets: int, frame_bytes: int, buffer: memoryview) -> None:
        self._frame_bytes = frame_bytes
        self._buffer = buffer
        self._pipe, there = multiprocessing.Pipe()
        spawn = multiprocessing.get_context("spawn")
        self._process = spawn.Process(target=_receive, args=(there, sockets), daemon=True)
        self._process.start()
        self._context: zmq.Context[Any] = zmq.Context(io_threads=sockets)
        port = self._pipe.recv()
        self._sockets = [self._context.socket(zmq.DEALER) for _ in range(sockets)]
        for one in self._sockets:
            one.setsockopt(zmq.SNDHWM, HIGH_WATER_MARK)
            one.connect(f"tcp://127.0.0.1:{port}")

    def transfer(self, size: int) -> float:
        """Seconds until `size` bytes were received."""
        self._pipe.send(size)
        started = time.perf_counter()
        for number, start in enumerate(range(0, size, self._frame_bytes)):
            offset = start % len(self._buffer)
            frame = self._buffer[offset : offset + min(self._frame_bytes, size - start)]
            self._sockets[number % len(self._sockets)].send(frame, copy=False)
        self._pipe.recv()
        return time.perf_counter() - started

    def close(self) -> None:
        """End both processes' sockets."""
        self._pipe.send(0)
        self._process.join()
        self._context.destroy(linger=0)


def _receive(pipe: Connection, sockets: int) -> None:
    keep_freed_memory()  # without it, each frame's memory is faulted in anew, and half the speed is lost
    context: zmq.Context[Any] = zmq.Context(io_threads=sockets)
    mailbox = context.socket(zmq.ROUTER)
    mailbox.setsockopt(zmq.RCVHWM, HIGH_WATER_MARK)
    pipe.send(mailbox.bind_to_random_port("tcp://127.0.0.1"))
    while size := pipe.recv():
        while size > 0:
            size -= len(mailbox.recv_multipart(copy=False)[-1].buffer)
        pipe.send(True)
    context.destroy(linger=0)


def touched(size: int) -> memoryview:
    """Memory that is there."""
    return np.ones(size, dtype=np.uint8).data
