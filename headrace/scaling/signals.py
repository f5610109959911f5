"""From what the processes of a mesh publish to the policy's signals. Nobody needs to be a member to read it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import redis.asyncio
from redis.exceptions import ResponseError

from headrace.mesh_watch import read_members
from headrace.queue import RequestQueue
from headrace.redis_client import Keys
from headrace.registry import Member, Tier
from headrace.scaling.policy import Signals

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Look:
    """A mesh at one moment; `at` is seconds of any one clock."""

    at: float
    members: Sequence[Member]
    queued: int
    """Entries in the request queue, those in prefill workers' hands among them."""

    def tier(self, tier: Tier) -> list[Member]:
        """Those that take new requests."""
        return [member for member in self.members if member.tier == tier and not member.draining]


class MeshReader:
    """Reads the registry and the queue's length. Raises `RedisError` where Redis is away."""

    def __init__(self, client: redis.asyncio.Redis, keys: Keys, clock: Callable[[], float]) -> None:
        self._client = client
        self._keys = keys
        self._clock = clock
        self._queue = RequestQueue(client, keys)

    async def look(self) -> Look:
        """The mesh now."""
        members, unreadable = await read_members(self._client, self._keys)
        for name, error in unreadable.items():
            log.warning("%s registered in a form that this version can't read: %s", name, error)
        try:
            queued = await self._queue.depth()
        except ResponseError as error:
            log.warning("the queue's length can't be read: %s", error)
            queued = 0
        return Look(self._clock(), members, queued)


def signals_between(before: Look, now: Look) -> Signals:
    """What the policy goes by; the looks should lie some seconds apart."""
    prefill, decode = now.tier("prefill"), now.tier("decode")
    earlier = {(member.id, member.epoch): member.stats for member in before.members}
    seconds = max(now.at - before.at, 1e-3)
    tokens = busy = 0.0
    for worker in prefill:
        past = earlier.get((worker.id, worker.epoch), {})
        tokens += _grown(worker.stats, past, "prompt_tokens_total")
        busy += min(_grown(worker.stats, past, "prefill_busy_seconds_total"), seconds)
    total = sum(worker.stats.get("prefill_busy_seconds_total", 0.0) for worker in prefill)
    all_tokens = sum(worker.stats.get("prompt_tokens_total", 0.0) for worker in prefill)
    # Over one look a worker may be hardly busy; then what it has done so far tells its speed.
    rate = tokens / busy if busy > seconds / 10 else all_tokens / total if total else 0.0
    running = [worker for worker in decode if worker.stats.get("inter_token_seconds")]
    alone = [s for worker in decode if (s := worker.stats.get("inter_token_alone_seconds", 0.0))]
    pages = sum(worker.stats.get("kv_pages_total", 0.0) for worker in decode)
    return Signals(
        prefill_workers=len(prefill),
        decode_workers=len(decode),
        backlog_tokens=_backlog(now, prefill, all_tokens),
        prefill_rate=rate,
        prefill_busy=busy / seconds / max(len(prefill), 1),
        pages_in_use=min(sum(w.stats.get("kv_pages_in_use", 0.0) for w in decode) / pages, 1.0) if pages else 0.0,
        inter_token=sum(w.stats["inter_token_seconds"] for w in running) / max(len(running), 1),
        inter_token_alone=min(alone, default=0.0),
    )


def _grown(stats: dict[str, float], past: dict[str, float], counter: str) -> float:
    return max(stats.get(counter, 0.0) - past.get(counter, 0.0), 0.0)


def _backlog(now: Look, prefill: Sequence[Member], all_tokens: float) -> float:
    """Prompt tokens that gateways hold back, that lie in the queue, and that workers have not begun to compute."""
    prompts = sum(worker.stats.get("prompts_total", 0.0) for worker in prefill)
    held = sum(w.stats.get("requests_running", 0.0) + w.stats.get("requests_waiting", 0.0) for w in prefill)
    in_queue = max(now.queued - held, 0.0) * (all_tokens / prompts if prompts else 0.0)
    gateways = [member for member in now.members if member.tier == "gateway"]
    return (
        sum(gateway.stats.get("prompt_tokens_queued", 0.0) for gateway in gateways)
        + in_queue
        + sum(worker.stats.get("prompt_tokens_waiting", 0.0) for worker in prefill)
    )
