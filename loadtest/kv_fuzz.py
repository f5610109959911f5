"""`make fuzz-kv`: bad messages by the million for a receiver that serves real handoffs meanwhile.

Everything is real but the model: a Redis, the registry, ZeroMQ mailboxes, the decoder, the receiver and its pages. The
bad messages come from a registered prefill worker (which also opens handoffs, to spoil them), from one whose messages
are repeated, from a registered gateway, and from strangers. Each must be counted as refused; every prompt that is
handed over between them must arrive byte for byte.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import socket
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import zmq

from headrace import __version__
from headrace.kvtransfer.messages import Commit, Grant, Offer, Pages, ToSender
from headrace.loadtest.bare_gateway import BareGateway
from headrace.loadtest.bare_workers import BareDecode, BarePrefill
from headrace.loadtest.keyed_kv import PAGE_SIZE, undisturbed
from headrace.loadtest.kv_mutations import Frames, Mutations
from headrace.loadtest.report import Figure, publish
from headrace.node import ModelIdentity, Node, join_mesh
from headrace.redis_client import Keys, connect
from headrace.redis_server import private_redis
from headrace.registry import Member as Registered
from headrace.registry import Registry, Tier
from headrace.settings import Settings
from headrace.tasks import end_task
from headrace.wire import Decoder, Message, WireError, encode

MODEL = ModelIdentity("keyed", "keyed", 65536)
NAMESPACE = "fuzz"
LEASE_SECONDS = 10.0
PREFILL_PAGES = 128
DECODE_PAGES = 256
BURST = 50
MAX_OUTSTANDING = 600
"""Bad messages on the way."""
OPEN_HANDOFFS = 8
"""Of the fuzzer's own, granted and waiting to be spoiled."""
HONEST_AT_ONCE = 4
SETTLE_SECONDS = 20.0
JUNK_SHARE = 0.005
"""Of the bursts, after which a connection is opened that does not speak ZeroMQ."""
ZMTP_SIGNATURE = b"\xff" + bytes(8) + b"\x7f"
MAY_CANCEL = {"changed field", "others' handoffs"}
"""Kinds of messages with good `Cancel`s among them, which a gateway may send."""

Socket = zmq.Socket[bytes]


class Member:
    """One more member of the mesh, made of plain sockets: it can send what a `Mesh` would not."""

    def __init__(self, me: Registered, mailbox: Socket, context: zmq.Context[Socket]) -> None:
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

    def line(self, address: str, routing_id: str) -> Socket:
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


@asynccontextmanager
async def member(url: str, name: str, tier: Tier) -> AsyncIterator[Member]:
    """A registered one inside the block."""
    client = connect(url)
    try:
        with zmq.Context() as context, context.socket(zmq.ROUTER) as mailbox:
            mailbox.setsockopt(zmq.LINGER, 0)
            port = mailbox.bind_to_random_port("tcp://127.0.0.1")
            me = Registered(
                id=name,
                epoch=time.time_ns(),
                tier=tier,
                address=f"tcp://127.0.0.1:{port}",
                version=__version__,
                model=MODEL.name,
                model_fingerprint=MODEL.fingerprint,
                max_model_len=MODEL.max_model_len,
            )
            registry = Registry(client, Keys(NAMESPACE), me, LEASE_SECONDS)
            await registry.join()
            heartbeat = asyncio.create_task(registry.run())
            try:
                yield Member(me, mailbox, context)
            finally:
                await end_task(heartbeat)
                context.destroy(linger=0)
    finally:
        await client.aclose()


class Rig:
    """The mesh under fuzz, and the honest requests that it serves."""

    def __init__(self, gateway: Node, prefill: Node, decode: Node, seed: int) -> None:
        self.gateway = BareGateway(gateway)
        self.prefill = BarePrefill(prefill, PREFILL_PAGES, LEASE_SECONDS, renew_seconds=3600.0)
        self.decode = BareDecode(decode, DECODE_PAGES)
        self.mutations = Mutations(seed)
        self.answered = 0
        self.stopping = False
        self._decode_node = decode
        self._prefill_node = prefill
        self._random = random.Random(seed)
        self._offers: dict[str, Offer] = {}
        self.prefill.send = self._send_and_remember

    @property
    def address(self) -> str:
        """Of the mailbox under fuzz."""
        return self._decode_node.mesh.address

    @property
    def refused(self) -> int:
        """Messages that the receiving side has counted as refused. Two causes are counted in two places."""
        receiver, mesh = self.decode.receiver, self._decode_node.mesh
        by_offer = receiver.refusals.total() - receiver.refusals["invalid"] - receiver.refusals["duplicate"]
        return mesh.refused + receiver.late + by_offer

    async def _send_and_remember(self, peer: str, message: Message, payload: tuple[memoryview, ...] = ()) -> None:
        await self._prefill_node.mesh.send(peer, message, payload)
        if isinstance(message, Offer):
            self._offers[message.request_id] = message
        elif isinstance(message, Pages | Commit):
            self.mutations.saw(message, [bytes(frame) for frame in payload])

    async def keep_asking(self, number: int) -> None:
        """One honest request after another. Some share a prefix, so that held pages are used."""
        while not self.stopping:
            shared = [self._random.randrange(3)] * PAGE_SIZE * self._random.randrange(4)
            prompt = [*shared, *(self._random.randrange(1000) for _ in range(self._random.randrange(1, 24)))]
            request_id = f"honest-{number}"
            tokens = await self.gateway.ask(request_id, prompt)
            self.answered += tokens == undisturbed(prompt)
            self.mutations.is_over(self._offers.pop(request_id))
            number += HONEST_AT_ONCE

    async def repeat(self) -> bool:
        """The honest prefill worker's line delivers something twice. Returns whether there was anything."""
        item = self.mutations.replay()
        if item is not None:
            await self._prefill_node.mesh.send(self._decode_node.id, item[0], item[1])
        return item is not None


class Attack:
    """Sends bad messages under all kinds of names."""

    def __init__(self, rig: Rig, insider: Member, other_tier: Member, seed: int) -> None:
        self.sent: Counter[str] = Counter()
        """Bad messages by kind."""
        self.insider = insider
        self._rig = rig
        self._random = random.Random(seed)
        self._lines = {
            who: [insider.line(rig.address, name) for name in names]
            for who, names in {
                "insider": [insider.name],
                "other tier": [other_tier.name],
                "stranger": ["stranger@1", "insider@1", "\0\1\2"],
            }.items()
        }

    async def run(self, messages: int) -> None:
        """Send so many, in bursts."""
        while (left := messages - self.sent.total()) > 0:
            for _ in range(min(BURST, left)):
                await self._send_one()
            self.insider.read()
            await self._open_handoffs()
            if self._random.random() < JUNK_SHARE:
                self._junk()
            await self._until_outstanding(MAX_OUTSTANDING)  # leave the honest ones some room

    async def finish(self) -> None:
        """Spoil what is still open and wait until everything is counted."""
        async with asyncio.timeout(SETTLE_SECONDS):
            while self.insider.waiting or self.insider.granted:
                self.insider.read()
                if self.insider.granted:
                    await self._spoil()
                await asyncio.sleep(0)
        await self._until_outstanding(0)

    async def _until_outstanding(self, most: int) -> None:
        """Wait until all but so many bad messages are counted as refused. Raises `TimeoutError` with what is not."""
        deadline = time.monotonic() + SETTLE_SECONDS
        while (outstanding := self.sent.total() - self._rig.refused) > most:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{outstanding} of {self.sent.total()} bad messages are not counted as refused")
            self.insider.read()
            await asyncio.sleep(0)

    async def _send_one(self) -> None:
        mutations, chance = self._rig.mutations, self._random.random()
        if chance < 0.1 and self.insider.granted:
            await self._spoil()
        elif chance < 0.15 and await self._rig.repeat():
            self.sent["repeated by its own sender"] += 1
        elif chance < 0.3:
            kind = self._random.choice(list(mutations.kinds))
            await self._send("stranger", f"of a stranger: {kind}", mutations.kinds[kind]())
        elif chance < 0.4:
            kind = self._random.choice([kind for kind in mutations.kinds if kind not in MAY_CANCEL])
            await self._send("other tier", f"of a gateway: {kind}", mutations.kinds[kind]())
        else:
            kind = self._random.choice(list(mutations.kinds))
            await self._send("insider", kind, mutations.kinds[kind]())

    async def _spoil(self) -> None:
        await self._send("insider", "spoiled handoff", self._rig.mutations.spoil(*self.insider.granted.popleft()))

    async def _send(self, who: str, kind: str, frames: Frames) -> None:
        await self._put(self._random.choice(self._lines[who]), frames)
        self.sent[kind] += 1

    async def _put(self, line: Socket, frames: Frames) -> None:
        while True:
            try:
                line.send_multipart(frames, zmq.NOBLOCK)
                return
            except zmq.Again:
                await asyncio.sleep(0.001)

    async def _open_handoffs(self) -> None:
        while len(self.insider.granted) + len(self.insider.waiting) < OPEN_HANDOFFS:
            number = self._random.getrandbits(64)
            offer = self._rig.mutations.offer(f"insider-{number}", 0, self._random.randrange(1, 4 * PAGE_SIZE))
            self.insider.waiting[offer.request_id] = -(-len(offer.token_ids) // PAGE_SIZE)
            await self._put(self._lines["insider"][0], [encode(offer)])

    def _junk(self) -> None:
        """What is not even ZeroMQ, but for its first bytes (without them it might be ZMTP 1.0, and a message)."""
        host, _, port = self._rig.address.removeprefix("tcp://").partition(":")
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(ZMTP_SIGNATURE + self._random.randbytes(self._random.randrange(1, 1000)))


@dataclass
class Findings:
    """What a run did and found."""

    sent: Counter[str]
    """Bad messages by kind."""
    seconds: float
    refused: int
    """Bad messages that the receiving side has counted as such."""
    answered: int
    """Honest prompts that gave the undisturbed tokens."""
    wrong: int
    """Honest prompts that gave others, at any time."""
    disturbed: int
    """Honest prompts that had to be computed again."""
    accepted: int
    """Prompts that reached the decoder and were not honest, and spoiled messages that were acknowledged or credited."""
    pages_in_use: int
    """On both sides, afterwards."""


async def fuzz(messages: int, seed: int, folder: Path) -> Findings:
    """Send so many bad messages. What breaks a worker ends this with its exception."""
    async with AsyncExitStack() as stack:
        url = await stack.enter_async_context(private_redis(folder))

        async def node(tier: Tier) -> Node:
            settings = Settings(redis=url, namespace=NAMESPACE, worker_id=tier, lease_seconds=LEASE_SECONDS)
            return await stack.enter_async_context(join_mesh(settings, tier, MODEL))

        rig = Rig(await node("gateway"), await node("prefill"), await node("decode"), seed)
        insider = await stack.enter_async_context(member(url, "insider", "prefill"))
        other_tier = await stack.enter_async_context(member(url, "other-tier", "gateway"))
        attack = Attack(rig, insider, other_tier, seed)
        started = time.monotonic()
        async with asyncio.TaskGroup() as group:
            running = [group.create_task(part.run()) for part in (rig.gateway, rig.prefill, rig.decode)]
            asking = [group.create_task(rig.keep_asking(first)) for first in range(HONEST_AT_ONCE)]
            await attack.run(messages)
            rig.stopping = True
            await asyncio.gather(*asking)
            await attack.finish()
            await asyncio.gather(*[end_task(task) for task in running])
        rig.decode.check_integrity()
        return Findings(
            sent=attack.sent,
            seconds=time.monotonic() - started,
            refused=rig.refused,
            answered=rig.answered,
            wrong=rig.gateway.wrong,
            disturbed=rig.gateway.retries.total(),
            accepted=rig.decode.received - rig.answered + insider.answers["Ack"] + insider.answers["Credit"],
            pages_in_use=rig.decode.pool.num_in_use + rig.prefill.pool.num_in_use,
        )


def figures(findings: Findings, messages: int) -> list[Figure]:
    """The table."""
    kinds = [Figure(f"sent: {kind}", count, "messages") for kind, count in sorted(findings.sent.items())]
    return [
        Figure("bad messages sent", findings.sent.total(), "messages", f">= {messages}"),
        Figure("bad messages not refused", findings.sent.total() - findings.refused, "messages", "= 0"),
        Figure("bad messages accepted", findings.accepted, "messages", "= 0"),
        Figure("honest handoffs meanwhile, every byte right", findings.answered, "handoffs", ">= 1"),
        Figure("honest handoffs with a wrong byte", findings.wrong, "handoffs", "= 0"),
        Figure("honest handoffs that had to be repeated", findings.disturbed, "handoffs", "= 0"),
        Figure("pages in use afterwards", findings.pages_in_use, "pages", "= 0"),
        Figure("rate", findings.sent.total() / findings.seconds, "messages/s"),
        *kinds,
    ]


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="100,000 messages instead of 1,000,000")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    messages = 100_000 if arguments.quick else 1_000_000
    with tempfile.TemporaryDirectory() as folder:
        findings = asyncio.run(fuzz(messages, arguments.seed, Path(folder)))
    table = figures(findings, messages)
    publish("kv_fuzz", table)
    sys.exit(any(figure.met is False for figure in table))


if __name__ == "__main__":
    main()
