"""How a worker leaves: when every gateway has taken all that it sent, so that none mistakes its leaving for a loss."""

from __future__ import annotations

import asyncio

from headrace.mesh import PeerGone
from headrace.messages.stream import Flush
from headrace.node import Node

FLUSH_SECONDS = 2.0
"""A gateway that has not answered by then learns the rest from the registry, and queues anew what it misses."""


class Farewell:
    """Messages to one gateway stay in order: its answer to the last one means that it has taken all others."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._silent: set[str] = set()
        self._answered = asyncio.Event()

    async def say(self) -> None:
        """Ask all gateways, and wait for their answers. The worker must still read its mailbox."""
        for gateway in self._node.registry.tier("gateway"):
            try:
                self._node.mesh.post(gateway.id, Flush())
                self._silent.add(gateway.id)
            except PeerGone:
                pass
        try:
            async with asyncio.timeout(FLUSH_SECONDS):
                while self._silent:
                    self._answered.clear()
                    await self._answered.wait()
        except TimeoutError:
            pass

    def answered(self, gateway: str) -> None:
        """Its `Flushed` has come, or it left."""
        self._silent.discard(gateway)
        self._answered.set()
