"""A prefill worker and a gateway for a decode worker that is timed: prompts without content, tokens only counted."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from dataclasses import dataclass

import torch

from headrace.data_lines import DataLines
from headrace.engine.kv_cache import CacheLayout, KVCache
from headrace.kvtransfer.departures import LineDepartures
from headrace.kvtransfer.handoff import Handoff
from headrace.kvtransfer.layout import layout_of
from headrace.kvtransfer.messages import Offer, ToSender
from headrace.kvtransfer.segments import Segment
from headrace.kvtransfer.sender import RENEW_SECONDS, Sender
from headrace.kvtransfer.transports import exports_of
from headrace.loadtest.engine_bench import INPUT
from headrace.messages.control import Cancel
from headrace.messages.request import SamplingParams
from headrace.messages.stream import PrefillReport, RequestFailed, ToGateway, TokenBatch, TokenColumns
from headrace.node import Node
from headrace.wire import Decoder

SETTLED_TOKENS = 8
"""Of each request, before the window begins."""
FINGERPRINT = "random"
DECODE = "decode"
"""The worker's id."""
HANDOFFS_AT_ONCE = 16
TIMEOUT_SECONDS = 240.0


@dataclass(frozen=True)
class Extent:
    """How much is measured."""

    rounds: int
    steps: int
    most_behind: int
    """Tokens that the last request may be behind the first one when the window begins."""

    @property
    def max_tokens(self) -> int:
        """Of a request that is there for the whole window."""
        return SETTLED_TOKENS + self.most_behind + self.steps


class Prompts:
    """The stand-in prefill worker: hands over prompts whose pages hold nothing."""

    def __init__(self, node: Node, lines: DataLines, layout: CacheLayout, vocab_size: int, gateway: str) -> None:
        self._node = node
        self._gateway = gateway
        self._layout = layout_of(FINGERPRINT, layout, vocab_size)
        self._vocab_size = vocab_size
        self._cache = KVCache(layout, -(-INPUT // layout.page_size), torch.device("cpu"))
        self._exports = exports_of(self._cache)
        loop = asyncio.get_running_loop()
        departures = LineDepartures([self._cache], layout.dtype, lines, loop.call_soon_threadsafe)
        self._sender = Sender(node.mesh.send, departures)
        self._at_once = asyncio.Semaphore(HANDOFFS_AT_ONCE)
        self._decode: Decoder[ToSender | Cancel] = Decoder(ToSender | Cancel)

    async def hear(self) -> None:
        """What the decode worker says, until cancelled."""
        while True:
            inbound, message = await self._node.mesh.receive_as(self._decode)
            if not isinstance(message, Cancel):
                self._sender.handle(inbound.sender.id, message)

    async def renew(self) -> None:
        """See `Sender.renew`."""
        while True:
            await asyncio.sleep(RENEW_SECONDS)
            await self._sender.renew()

    async def hand_over(self, request_id: str, number: int, max_tokens: int) -> None:
        """Prompt `number`; returns when it is acknowledged. What the receiver still holds of it does not travel."""
        async with self._at_once:
            pages = list(range(self._cache.num_pages))
            offer = Offer(
                request_id=request_id,
                attempt=0,
                gateway=self._gateway,
                layout=self._layout,
                token_ids=[number % self._vocab_size, *[1] * (INPUT - 1)],
                generated=0,
                sampling=SamplingParams(max_tokens=max_tokens, temperature=0),
                deadline=time.time() + TIMEOUT_SECONDS,
                host=self._exports.host,
                shm=self._exports.shm,
            )
            handoff = Handoff(offer, pages, self._cache)
            for layer in range(self._cache.layout.num_layers):
                handoff.layer_ready(Segment(layer, 0, len(pages)))
            handoff.finish(1, None)
            await self._sender.deliver(handoff, _to_the_only_one)


async def _to_the_only_one(handoff: Handoff) -> str:
    assert not handoff.refused, handoff.refused
    return DECODE


class Tokens:
    """The stand-in gateway: counts what arrives."""

    def __init__(self, node: Node) -> None:
        self.id = node.id
        self.counts: Counter[str] = Counter()
        """Tokens by request."""
        self._node = node
        self._arrived = asyncio.Event()
        self._decode: Decoder[ToGateway] = Decoder(ToGateway)
        self.last_at = 0.0

    async def hear(self) -> None:
        """Count until cancelled."""
        while True:
            _, message = await self._node.mesh.receive_as(self._decode)
            match message:
                case TokenBatch() | TokenColumns():
                    self.last_at = time.perf_counter()
                    for event in message.events:
                        self.counts[event.request_id] += len(event.token_ids)
                    self._arrived.set()
                case RequestFailed():
                    raise RuntimeError(message.message)
                case PrefillReport():
                    pass

    async def until(self, requests: list[str], tokens: int) -> float:
        """When each of these has so many tokens. Raises `TimeoutError`."""
        async with asyncio.timeout(TIMEOUT_SECONDS):
            while min(self.counts[request] for request in requests) < tokens:
                self._arrived.clear()
                await self._arrived.wait()
        return self.last_at

    async def window(self, requests: list[str], extent: Extent) -> tuple[float, list[int]]:
        """Seconds a step while all of these run, and their contexts when that began."""
        began = await self.until(requests, SETTLED_TOKENS)
        before = [self.counts[request] for request in requests]
        ended = await self.until(requests, min(before) + extent.steps)
        if max(self.counts[request] for request in requests) >= extent.max_tokens:
            raise RuntimeError("some requests ended within the window: their hand-over took too long")
        made = sum(self.counts[request] for request in requests) - sum(before)
        return (ended - began) * len(requests) / made, [INPUT + count for count in before]
