"""`make fuzz-kv`: bad messages by the million for a receiver that serves real handoffs meanwhile.

Everything is real but the model and the gateway: a Redis, the workers with their mailboxes and data lines. The bad
messages come from a registered prefill worker (which also opens handoffs, to spoil them), from one whose messages are
repeated, from a registered gateway, and from strangers. Each must be counted as refused; every prompt that is handed
over between them must arrive byte for byte.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import socket
import tempfile
import time
from collections import Counter
from contextlib import AsyncExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import zmq

from headrace.data_lines import DataLines, data_listener
from headrace.engine.device_thread import DeviceThread
from headrace.kvtransfer.messages import Abort
from headrace.loadtest.fuzz_rig import HONEST_AT_ONCE, LEASE_SECONDS, Rig
from headrace.loadtest.intruder import Intruder, RawDataLine, Socket, intruder
from headrace.loadtest.keyed_model import PAGE_BYTES, PAGE_SIZE
from headrace.loadtest.kv_mutations import Frame
from headrace.loadtest.report import Figure, conclude
from headrace.node import ModelIdentity, join_mesh
from headrace.prefill import worker as prefill_worker
from headrace.redis_client import Keys
from headrace.redis_server import private_redis
from headrace.registry import Tier
from headrace.settings import Settings
from headrace.tasks import end_task, run_beside
from headrace.tcp_line import PREAMBLE
from headrace.wire import encode

MODEL = ModelIdentity("keyed", "keyed", 65536)
NAMESPACE = "fuzz"
TIERS: tuple[Tier, ...] = ("gateway", "prefill", "decode")
BURST = 50
MAX_OUTSTANDING = 600
"""Bad messages on the way."""
OPEN_HANDOFFS = 8
"""Of the fuzzer's own, granted and waiting to be spoiled."""
SETTLE_SECONDS = 20.0
JUNK_SHARE = 0.005
"""Of the bursts, after which a connection is opened that does not speak ZeroMQ."""
ZMTP_SIGNATURE = b"\xff" + bytes(8) + b"\x7f"
MAY_CANCEL = {"changed field", "others' handoffs"}
"""Kinds of messages with good `Cancel`s among them, which a gateway may send."""


class Attack:
    """Sends bad messages under all kinds of names."""

    def __init__(self, rig: Rig, insider: Intruder, other_tier: Intruder, seed: int) -> None:
        self.sent: Counter[str] = Counter()
        """Bad messages by kind."""
        self.insider = insider
        self._rig = rig
        self._random = random.Random(seed)
        self._mailbox_lines = {
            who: [insider.mailbox_line(rig.address, name) for name in names]
            for who, names in {
                "insider": [insider.name],
                "other tier": [other_tier.name],
                "stranger": ["stranger@1", "insider@1", "\0\1\2"],
            }.items()
        }
        self._data_lines = {
            "insider": RawDataLine(rig.data_address, insider.name),
            "other tier": RawDataLine(rig.data_address, other_tier.name),
        }

    def close(self) -> None:
        """Close the data lines."""
        for line in self._data_lines.values():
            line.close()

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
        deadline = time.process_time() + SETTLE_SECONDS  # others may have the processor for longer
        while (outstanding := self.sent.total() - self._rig.refused) > most:
            if time.process_time() > deadline:
                raise TimeoutError(f"{outstanding} of {self.sent.total()} bad messages are not counted as refused")
            self.insider.read()
            await asyncio.sleep(0)

    async def _send_one(self) -> None:
        kinds, chance = self._rig.mutations.kinds, self._random.random()
        if chance < 0.1 and self.insider.granted:
            await self._spoil()
        elif chance < 0.15 and await self._rig.repeat():
            self.sent["repeated by its own sender"] += 1
        elif chance < 0.155:
            await self._break_data_line()
        elif chance < 0.3:
            kind = self._random.choice(list(kinds))
            await self._send_by_mail("stranger", kinds[kind]())
            self.sent[f"of a stranger: {kind}"] += 1
        elif chance < 0.4:
            kind = self._random.choice([kind for kind in kinds if kind not in MAY_CANCEL])
            await self._send("other tier", kinds[kind]())
            self.sent[f"of a gateway: {kind}"] += 1
        else:
            kind = self._random.choice(list(kinds))
            await self._send("insider", kinds[kind]())
            self.sent[kind] += 1

    async def _send(self, who: str, frame: Frame) -> None:
        """To the mailbox or over a data line, whether it belongs there or not."""
        if self._random.random() < 0.5:
            await self._send_by_mail(who, frame)
        else:
            await self._data_lines[who].send(frame)

    async def _send_by_mail(self, who: str, frame: Frame) -> None:
        header, payload = frame
        has_payload = self._random.random() < 0.05
        await self._put(self._random.choice(self._mailbox_lines[who]), [header, payload] if has_payload else [header])

    async def _put(self, line: Socket, frames: list[bytes]) -> None:
        while True:
            try:
                line.send_multipart(frames, zmq.NOBLOCK)
                return
            except zmq.Again:
                await asyncio.sleep(0.001)

    async def _spoil(self) -> None:
        """Let an own handoff go wrong."""
        handoff = self.insider.granted.popleft()
        if self._random.random() < 0.05:
            await self._cut_off(handoff[0], handoff[1])
            self.sent["data line cut off inside pages"] += 1
            return
        header, payload, is_mail = self._rig.mutations.spoil(*handoff)
        if is_mail:
            await self._put(self._mailbox_lines["insider"][0], [header])
        else:
            await self._data_lines["insider"].send((header, payload))
        self.sent["spoiled handoff"] += 1

    async def _cut_off(self, request_id: str, attempt: int) -> None:
        payload = bytes(PAGE_BYTES)
        header = encode(self._rig.mutations.pages(request_id, attempt, payload))
        line = RawDataLine(self._rig.data_address, self.insider.name)
        await line.send((header, payload), leave_out=self._random.randrange(1, PAGE_BYTES))
        line.close()
        # what was cut off may come once more, so its handoff goes on until somebody ends it
        over = Abort(request_id=request_id, attempt=attempt, cause="cancelled")
        await self._put(self._mailbox_lines["insider"][0], [encode(over)])

    async def _break_data_line(self) -> None:
        """A stranger's, or what is no frame on a member's."""
        if self._random.random() < 0.5:
            line = RawDataLine(self._rig.data_address, "stranger@1")
            await line.send(self._rig.mutations.kinds["replayed"]())
            self.sent["data line of a stranger"] += 1
        else:
            line = RawDataLine(self._rig.data_address, self.insider.name)
            await line.send_raw(self._random.randbytes(PREAMBLE.size))
            self.sent["data line without frames"] += 1
        line.close()

    async def _open_handoffs(self) -> None:
        while len(self.insider.granted) + len(self.insider.waiting) < OPEN_HANDOFFS:
            number = self._random.getrandbits(64)
            offer = self._rig.mutations.offer(f"insider-{number}", 0, self._random.randrange(1, 4 * PAGE_SIZE))
            self.insider.waiting[offer.request_id] = -(-len(offer.token_ids) // PAGE_SIZE)
            await self._put(self._mailbox_lines["insider"][0], [encode(offer)])

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
        listener = await stack.enter_async_context(data_listener("127.0.0.1", None))
        nodes = {}
        for tier in TIERS:
            settings = Settings(redis=url, namespace=NAMESPACE, worker_id=tier, lease_seconds=LEASE_SECONDS)
            address = listener.address if tier == "decode" else ""
            nodes[tier] = await stack.enter_async_context(join_mesh(settings, tier, MODEL, address))
        lines = await stack.enter_async_context(DataLines(nodes["prefill"].registry, None))
        keys = Keys(NAMESPACE)
        insider = await stack.enter_async_context(intruder(url, keys, "insider", "prefill", MODEL, LEASE_SECONDS))
        other_tier = await stack.enter_async_context(intruder(url, keys, "other-tier", "gateway", MODEL, LEASE_SECONDS))
        threads = stack.enter_context(DeviceThread()), stack.enter_context(DeviceThread())
        # a lease that is renewed as its handoff ends would count as refused
        stack.enter_context(patch.object(prefill_worker, "RENEW_SECONDS", 3600.0))
        rig = Rig(nodes, listener, lines, threads, seed)
        attack = stack.enter_context(closing(Attack(rig, insider, other_tier, seed)))
        started = time.monotonic()
        await run_beside(_attack_and_ask(rig, attack, messages), [rig.run()])
        rig.check_integrity()
        return Findings(
            sent=attack.sent,
            seconds=time.monotonic() - started,
            refused=rig.refused,
            answered=rig.answered,
            wrong=rig.gateway.wrong,
            disturbed=rig.gateway.retries.total(),
            accepted=rig.decoded - rig.answered + insider.answers["Ack"] + insider.answers["Credit"],
            pages_in_use=sum(engine.pool.num_in_use for engine in rig.engines),
        )


async def _attack_and_ask(rig: Rig, attack: Attack, messages: int) -> None:
    asking = [asyncio.create_task(rig.keep_asking(first)) for first in range(HONEST_AT_ONCE)]
    try:
        await attack.run(messages)
        rig.stopping = True
        await asyncio.gather(*asking)
        await attack.finish()
    finally:
        for task in asking:
            await end_task(task)


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
    conclude("kv_fuzz", table)


if __name__ == "__main__":
    main()
