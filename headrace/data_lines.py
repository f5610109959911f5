"""A process's own ends of its data lines: one to each member that it sends to, and a listener for those of others."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Callable
from concurrent.futures import CancelledError
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import zmq

from headrace.curve_line import CurveConnection, CurveListener
from headrace.data_line import STRIPES, TIMEOUT_SECONDS, Connection, DataLine, Listener, Make
from headrace.keys import MeshKey, is_loopback
from headrace.mesh import Mesh
from headrace.registry import Member, Registry
from headrace.settings import SettingsError
from headrace.tcp_line import TcpConnection, TcpListener


class DataLines:
    """Lines to other members, made when they are first used and ended when the member leaves."""

    def __init__(self, registry: Registry, key_file: Path | None) -> None:
        self._registry = registry
        self._key = MeshKey.read(key_file) if key_file else None
        self._context: zmq.Context[Any] | None = zmq.Context(io_threads=STRIPES) if key_file else None
        self._lines: dict[str, DataLine] = {}
        self._ended: list[DataLine] = []
        registry.on_leave.append(self._leave)

    def submit(self, peer_id: str, make: Make, failed: Callable[[str], None], now: bool = False) -> None:
        """See `DataLine.submit`; an unknown peer fails at once."""
        member = self._registry.members.get(peer_id)
        if member is None or not member.data_address:
            failed(f"{peer_id} is not in the mesh")
            return
        if peer_id not in self._lines:
            self._lines[peer_id] = DataLine(functools.partial(self._connect, member.data_address), peer_id)
        self._lines[peer_id].submit(make, failed, now)

    def reconnect(self, peer_id: str) -> None:
        """See `DataLine.reconnect`."""
        if peer_id in self._lines:
            self._lines[peer_id].reconnect()

    def _connect(self, address: str) -> Connection:
        name = f"{self._registry.me.id}@{self._registry.me.epoch}"
        if self._key is None or self._context is None:
            return TcpConnection(address, name)
        return CurveConnection(self._context, address, name, self._key)

    def _leave(self, member: Member) -> None:
        line = self._lines.pop(member.id, None)
        if line is not None:
            line.end()
            self._ended = [ended for ended in self._ended if ended.is_alive] + [line]

    async def __aenter__(self) -> DataLines:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """End all lines and wait for their threads."""
        lines = [*self._lines.values(), *self._ended]
        for line in lines:
            line.end()
        await asyncio.to_thread(self._join, lines)

    def _join(self, lines: list[DataLine]) -> None:
        for line in lines:
            line.join()
        if self._context is not None:
            self._context.term()


@asynccontextmanager
async def data_listener(bind: str, key_file: Path | None, advertise: str | None = None) -> AsyncIterator[Listener]:
    """Have a port for other members' lines inside the block. Raises `SettingsError`."""
    listener: Listener
    if key_file is not None:
        listener = CurveListener(bind, MeshKey.read(key_file))
    elif is_loopback(bind):
        listener = TcpListener(bind)
    else:
        raise SettingsError(f"--bind {bind} needs --mesh-key: make one with `headrace keys mesh.key`")
    if advertise is not None:
        listener.address = f"{advertise}:{listener.address.rpartition(':')[2]}"
    try:
        yield listener
    finally:
        await asyncio.to_thread(listener.close)


def identify_by(mesh: Mesh) -> Callable[[str], str | None]:
    """Turns `id@epoch` into a member's id, for other threads; to be called on the event loop's."""
    loop = asyncio.get_running_loop()

    def identify(name: str) -> str | None:
        try:
            found = asyncio.run_coroutine_threadsafe(mesh.identify(name.encode()), loop)
            member = found.result(TIMEOUT_SECONDS)
        except (TimeoutError, CancelledError, RuntimeError):  # the process is about to end
            return None
        return member.id if member is not None else None

    return identify
