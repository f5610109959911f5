"""Moves memory between two processes with another system, for `headrace.loadtest.kv_bench` to compare with.

Runs under the Python of a virtual environment that holds `mooncake-transfer-engine-non-cuda` or `nixl`, and imports
nothing of Headrace:

    PYTHON kv_peers.py mooncake-tcp | nixl-tcp | nixl-shm  MAX_BYTES

Each line of standard input is a number of bytes; the answer is a line of JSON with the seconds that it took to bring
so many bytes, in one call or one transfer of 1 MiB pieces, from one process into the other.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

PIECE = 2**20
TRANSPORTS = {"mooncake-tcp": "", "nixl-tcp": "tcp", "nixl-shm": "tcp,sysv,posix,cma"}


def main() -> None:
    """See above."""
    name, max_bytes = sys.argv[1], int(sys.argv[2])
    os.environ["MC_LOG_LEVEL"] = "3"
    if TRANSPORTS[name]:
        os.environ["UCX_TLS"] = TRANSPORTS[name]
        os.environ["UCX_NET_DEVICES"] = "lo"
    here, there = multiprocessing.Pipe()
    context = multiprocessing.get_context("spawn")
    target = {"mooncake": mooncake_target, "nixl": nixl_target}[name.partition("-")[0]]
    process = context.Process(target=target, args=(there, max_bytes), daemon=True)
    process.start()
    move, arrived = {"mooncake": mooncake_source, "nixl": nixl_source}[name.partition("-")[0]](here, max_bytes)
    print(json.dumps({"ready": name}), flush=True)
    for number, line in enumerate(sys.stdin, start=1):
        size = int(line)
        arrived(size, number % 200)
        started = time.perf_counter()
        move(size)
        seconds = time.perf_counter() - started
        here.send(("check", size, number % 200))
        print(json.dumps({"seconds": seconds, "right": here.recv()}), flush=True)
    here.send(("stop", 0, 0))
    process.join()


def answer_checks(pipe: Connection, memory: np.ndarray[Any, Any]) -> None:
    """Say whether the first and last byte of what came are what was sent."""
    while (request := pipe.recv())[0] == "check":
        _, size, value = request
        pipe.send(bool(memory[0] == value and memory[size - 1] == value))


def fill(memory: np.ndarray[Any, Any]) -> Callable[[int, int], None]:
    """Marks what is sent next."""

    def mark(size: int, value: int) -> None:
        memory[0] = memory[size - 1] = value

    return mark


def mooncake_engine(memory: np.ndarray[Any, Any]) -> Any:
    """An engine on loopback, by its peer-to-peer handshake, without metadata server or RDMA."""
    from mooncake.engine import TransferEngine  # type: ignore[import-not-found]

    engine = TransferEngine()
    if engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", ""):
        raise RuntimeError("mooncake did not start")
    if engine.register_memory(memory.ctypes.data, memory.nbytes):
        raise RuntimeError("mooncake did not take the memory")
    return engine


def mooncake_target(pipe: Connection, max_bytes: int) -> None:
    """The process that is written to."""
    memory = np.ones(max_bytes, dtype=np.uint8)
    engine = mooncake_engine(memory)
    pipe.send((f"127.0.0.1:{engine.get_rpc_port()}", memory.ctypes.data))
    answer_checks(pipe, memory)


def mooncake_source(pipe: Connection, max_bytes: int) -> tuple[Callable[[int], None], Callable[[int, int], None]]:
    """Writes to the other process."""
    memory = np.ones(max_bytes, dtype=np.uint8)
    engine = mooncake_engine(memory)
    peer, address = pipe.recv()

    def move(size: int) -> None:
        offsets = range(0, size, PIECE)
        lengths = [min(PIECE, size - offset) for offset in offsets]
        mine = [memory.ctypes.data + offset for offset in offsets]
        theirs = [address + offset for offset in offsets]
        if engine.batch_transfer_sync_write(peer, mine, theirs, lengths):
            raise RuntimeError("mooncake did not write")

    return move, fill(memory)


def nixl_target(pipe: Connection, max_bytes: int) -> None:
    """The process that is written to."""
    from nixl._api import nixl_agent, nixl_agent_config

    memory = np.ones(max_bytes, dtype=np.uint8)
    agent = nixl_agent("target", nixl_agent_config(backends=["UCX"]))
    agent.register_memory([(memory.ctypes.data, memory.nbytes, 0, "")], "DRAM")
    pipe.send((agent.get_agent_metadata(), memory.ctypes.data))
    answer_checks(pipe, memory)


def nixl_source(pipe: Connection, max_bytes: int) -> tuple[Callable[[int], None], Callable[[int, int], None]]:
    """Writes to the other process."""
    from nixl._api import nixl_agent, nixl_agent_config

    memory = np.ones(max_bytes, dtype=np.uint8)
    agent = nixl_agent("source", nixl_agent_config(backends=["UCX"]))
    agent.register_memory([(memory.ctypes.data, memory.nbytes, 0, "")], "DRAM")
    metadata, address = pipe.recv()
    peer = agent.add_remote_agent(metadata)

    def move(size: int) -> None:
        pieces = [(offset, min(PIECE, size - offset)) for offset in range(0, size, PIECE)]
        mine = agent.get_xfer_descs([(memory.ctypes.data + o, n, 0) for o, n in pieces], "DRAM")
        theirs = agent.get_xfer_descs([(address + o, n, 0) for o, n in pieces], "DRAM")
        handle = agent.initialize_xfer("WRITE", mine, theirs, peer)
        state = agent.transfer(handle)
        while state == "PROC":
            state = agent.check_xfer_state(handle)
        if state != "DONE":
            raise RuntimeError(f"nixl ended in state {state}")
        agent.release_xfer_handle(handle)

    return move, fill(memory)


if __name__ == "__main__":
    main()
