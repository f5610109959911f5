"""A prefill worker and decode workers without a model: real members of the mesh that answer from a script."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from headrace.gateway.tokenizer import Tokenizer
from headrace.messages.control import Cancel, Flushed, Repeat
from headrace.messages.stream import (
    FailureCode,
    FinishReason,
    Flush,
    PrefillReport,
    RequestFailed,
    TokenBatch,
    TokenEvent,
    TokenLogprobs,
)
from headrace.node import ModelIdentity, Node, join_mesh
from headrace.queue import Delivery
from headrace.redis_client import RedisError
from headrace.settings import Settings
from headrace.tasks import end_task
from headrace.wire import Decoder

TEXT = "The quick brown fox jumps over the lazy dog."
PATIENCE = 10.0

Script = Callable[["Workers", Delivery], Awaitable[None]]


class Workers:
    """The members, and what the gateway asked of them."""

    def __init__(self, settings: Settings, identity: ModelIdentity, tokenizer: Tokenizer) -> None:
        self.script: Script = answer
        """What is done with an entry; tests put their own here."""
        self.text = TEXT
        self.deliveries: list[Delivery] = []
        self.cancels: list[Any] = []
        self._flushed: list[str] = []
        """Workers to whom the gateway has said that it has taken all they sent."""
        self.prefill: Node
        self.decode: list[Node] = []
        self.tokenizer = tokenizer
        self._settings = settings
        self._identity = identity
        self._changed = asyncio.Condition()
        self._members: dict[str, AsyncExitStack] = {}

    @asynccontextmanager
    async def running(self, prefill: bool, decode: int) -> AsyncIterator[Workers]:
        """Be members of the mesh inside the block."""
        async with asyncio.TaskGroup() as group:
            self._group = group
            tasks = []
            if prefill:
                self.prefill = await self._join("prefill", "p0")
                tasks = [group.create_task(self._take()), group.create_task(self._listen(self.prefill))]
            for index in range(decode):
                self.decode.append(await self._join("decode", f"d{index}"))
                tasks.append(group.create_task(self._listen(self.decode[-1])))
            try:
                yield self
            finally:
                for task in tasks:
                    await end_task(task)
                for name in list(self._members):
                    await self.leave(name)

    async def until_seen_by(self, node: Node, count: int) -> None:
        """Wait until a gateway and the workers know one another."""
        async with asyncio.timeout(PATIENCE):
            while len(node.registry.members) < count or any(node.id not in n.registry.members for n in self._nodes()):
                await asyncio.sleep(0.01)
                await node.registry.refresh()

    async def leave(self, name: str) -> None:
        """Take one worker out of the mesh."""
        await self._members.pop(name).aclose()

    async def until_taken(self, delivery: Delivery, decode: int = 0) -> None:
        """Wait until the gateway has all that the prefill worker and a decode worker sent: a leave may overtake it."""
        nodes = [self.prefill, self.decode[decode]]
        self._flushed.clear()
        for node in nodes:
            await node.mesh.send(delivery.entry.gateway, Flush())
        await self.until(lambda: {node.id for node in nodes} <= set(self._flushed))

    async def report(self, delivery: Delivery, decode: int | None = 0, **fields: object) -> None:
        """Say that the prompt is computed and handed over, and acknowledge the entry."""
        values = {"queue_ms": 1.0, "prefill_ms": 2.0, "handoff_ms": 3.0, "cached_tokens": 0, **fields}
        worker = None if decode is None else f"d{decode}"
        entry = delivery.entry
        report = PrefillReport(
            request_id=entry.request_id,
            attempt=delivery.attempt,
            decode_worker=worker,
            **values,  # type: ignore[arg-type]
        )
        await self.prefill.mesh.send(entry.gateway, report)
        await self.prefill.queue.remove(delivery.entry_id)

    async def tokens(
        self,
        delivery: Delivery,
        position: int,
        ids: Sequence[int],
        finish: FinishReason | None = None,
        decode: int = 0,
        attempt: int | None = None,
    ) -> None:
        """Send tokens from a decode worker; each with log probabilities where they were asked for."""
        entry = delivery.entry
        top = entry.sampling.logprobs
        event = TokenEvent(
            request_id=entry.request_id,
            attempt=delivery.attempt if attempt is None else attempt,
            position=position,
            token_ids=list(ids),
            logprobs=None if top is None else [scores(token_id, top) for token_id in ids],
            finish_reason=finish,
        )
        await self.decode[decode].mesh.send(entry.gateway, TokenBatch(events=[event]))

    async def fail(self, delivery: Delivery, code: FailureCode, retryable: bool) -> None:
        """Give the request up, from the prefill worker."""
        entry = delivery.entry
        failure = RequestFailed(
            request_id=entry.request_id,
            attempt=delivery.attempt,
            code=code,
            message=f"test: {code}",
            retryable=retryable,
        )
        await self.prefill.queue.remove(delivery.entry_id)
        await self.prefill.mesh.send(entry.gateway, failure)

    def ids(self, text: str | None = None) -> list[int]:
        """The tokens of the answer."""
        return self.tokenizer.encode(self.text if text is None else text, add_special_tokens=False)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until what the workers have seen fulfils `condition`."""
        async with asyncio.timeout(PATIENCE), self._changed:
            await self._changed.wait_for(condition)

    def client_deliveries(self) -> list[Delivery]:
        """Deliveries but for the gateway's own warm-up request."""
        return [delivery for delivery in self.deliveries if not is_warm_up(delivery)]

    async def _join(self, tier: str, name: str) -> Node:
        stack = AsyncExitStack()
        settings = self._settings.model_copy(update={"worker_id": name})
        self._members[name] = stack
        return await stack.enter_async_context(join_mesh(settings, tier, self._identity))  # type: ignore[arg-type]

    def _nodes(self) -> list[Node]:
        return [*([self.prefill] if hasattr(self, "prefill") else []), *self.decode]

    async def _take(self) -> None:
        while True:
            try:
                deliveries = await self.prefill.queue.take("p0", count=8, block_ms=200)
            except RedisError:
                await asyncio.sleep(0.05)
                continue
            for delivery in deliveries:
                async with self._changed:
                    self.deliveries.append(delivery)
                    self._changed.notify_all()
                script = answer if is_warm_up(delivery) else self.script
                self._group.create_task(script(self, delivery))  # type: ignore[arg-type]

    async def _listen(self, node: Node) -> None:
        decode: Decoder[Cancel | Flushed | Repeat] = Decoder(Cancel | Flushed | Repeat)
        while True:
            inbound = await node.mesh.receive()
            message = decode(inbound.header)
            async with self._changed:
                if isinstance(message, Flushed):
                    self._flushed.append(node.id)
                else:
                    self.cancels.append(message)
                self._changed.notify_all()


async def answer(workers: Workers, delivery: Delivery) -> None:
    """Do as good workers do: report, then the text's tokens one by one, then the end-of-sequence token."""
    entry = delivery.entry
    limit = entry.sampling.max_tokens
    if limit == 0:
        top = entry.sampling.prompt_logprobs or 0
        await workers.report(
            delivery, None, prompt_logprobs=[scores(token_id, top) for token_id in entry.token_ids[1:]]
        )
        return
    prompt_top = entry.sampling.prompt_logprobs
    prompt = None if prompt_top is None else [scores(token_id, prompt_top) for token_id in entry.token_ids[1:]]
    await workers.report(delivery, prompt_logprobs=prompt)
    ids = [*workers.ids(), *workers.tokenizer.eos_token_ids[:1]]
    for position in range(entry.generated, min(len(ids), limit)):
        finish: FinishReason | None = (
            "stop" if position == len(ids) - 1 else "length" if position == limit - 1 else None
        )
        await workers.tokens(delivery, position, [ids[position]], finish)


async def keep_silent(workers: Workers, delivery: Delivery) -> None:
    """Take the entry and never answer."""


def is_warm_up(delivery: Delivery) -> bool:
    """Whether the entry is the gateway's own: two tokens, greedy, never more nor fewer."""
    sampling = delivery.entry.sampling
    return sampling.max_tokens == 2 and sampling.min_tokens == 2


def scores(token_id: int, top: int) -> TokenLogprobs:
    """Made-up log probabilities."""
    return TokenLogprobs(token_id=token_id, logprob=-0.5, top=[(token_id + rank, -0.5 - rank) for rank in range(top)])
