"""What the live page is told: snapshots of the mesh, and the time lines of the newest requests.

One producer looks at the mesh while somebody watches. Each viewer remembers the number of the last change that it was
told of, so nothing is queued for it: a slow one gets fewer events, each up to date.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import OrderedDict, deque
from dataclasses import asdict, dataclass

import msgspec
from aiohttp import web

from headrace import __version__
from headrace.gateway.answer import Answer
from headrace.gateway.errors import Unavailable
from headrace.gateway.respond import KEEP_ALIVE_SECONDS
from headrace.gateway.sse import KEEP_ALIVE, EventStream
from headrace.gateway.timeline import AttemptSpan
from headrace.gateway.warmup import Readiness
from headrace.mesh_view import MemberView, Moment, view_mesh
from headrace.node import Node
from headrace.redis_client import RedisError
from headrace.registry import Member

INTERVAL_SECONDS = 0.25
"""Between two looks: workers' figures and the queue's length change without an event."""
MAX_VIEWERS = 32
MAX_REQUESTS = 100
MAX_DEPARTED = 16
RATE_SECONDS = 2.0
"""What rates are an average of; less at first."""
LEAST_RATE_SECONDS = 1.0
DEPARTED_SECONDS = 60.0
"""How long a worker that is gone is shown."""

encode = msgspec.json.encode


@dataclass(frozen=True)
class Departure:
    """A worker that is gone. It `died` where it had not said that it would leave."""

    id: str
    tier: str
    started: float
    at: float
    """Unix time in seconds."""
    died: bool


@dataclass(frozen=True)
class RequestRow:
    """One HTTP request. The attempts are the first answer's where it asked for several."""

    id: str
    kind: str
    created: int
    outcome: str
    """`running`, `ok`, `cancelled` or an error's code."""
    answers: int
    prompt_tokens: int
    output_tokens: int
    elapsed: float
    """Milliseconds until its newest token or its end."""
    attempts: list[AttemptSpan]


class LiveFeed:
    """Everything that viewers see. `revision` counts changes."""

    def __init__(self, node: Node, readiness: Readiness, model: str) -> None:
        self.viewers = 0
        self._node = node
        self._readiness = readiness
        self._model = model
        self._queued: int | None = None
        self._moments: deque[Moment] = deque(maxlen=64)
        self._running: dict[str, Answer] = {}
        self._revision = 0
        self._told = 0
        """The newest change that viewers were woken for, which is a few times a second at most."""
        self._mesh: tuple[int, bytes] = (0, b"")
        """Revision and event."""
        self._rows: OrderedDict[str, tuple[int, bytes]] = OrderedDict()
        """Revision and JSON of each request."""
        self._departed: deque[Departure] = deque(maxlen=MAX_DEPARTED)
        self._stopping = False
        self._watched = asyncio.Event()
        self._changed = asyncio.Condition()
        node.registry.on_leave.append(self._on_leave)

    def begin(self, answer: Answer) -> None:
        """Follow a request."""
        self._running[answer.id] = answer
        self._put(answer, "running")

    def end(self, answer: Answer) -> None:
        """A request is over."""
        del self._running[answer.id]
        self._put(answer, answer.outcome)

    async def run(self) -> None:
        """Look at the mesh while somebody watches, until cancelled."""
        while True:
            await self._watched.wait()
            await self._look()
            if self._revision > self._told:
                self._told = self._revision
                async with self._changed:
                    self._changed.notify_all()
            await asyncio.sleep(INTERVAL_SECONDS)

    async def stop(self) -> None:
        """Send every viewer away."""
        self._stopping = True
        async with self._changed:
            self._changed.notify_all()

    async def watch(self, request: web.Request) -> web.StreamResponse:
        """GET /live: server-sent events `mesh` (an object) and `requests` (those that changed; at first all, or none).

        Raises `Unavailable` where too many watch already.
        """
        if self.viewers == MAX_VIEWERS:
            raise Unavailable(f"{MAX_VIEWERS} pages watch this server already.", code="too_many_viewers")
        self.viewers += 1
        self._watched.set()
        stream = EventStream(request)
        seen = 0
        try:
            await self._look()  # what the last viewer saw may be long past
            while not self._stopping:
                newest = self._revision
                await stream.write(self._events_since(seen) or KEEP_ALIVE)
                seen = newest
                await self._until_told_after(seen)
            return stream.response
        finally:
            self.viewers -= 1
            if self.viewers == 0:
                self._watched.clear()

    async def _until_told_after(self, seen: int) -> None:
        try:
            async with asyncio.timeout(KEEP_ALIVE_SECONDS), self._changed:
                await self._changed.wait_for(lambda: self._told > seen or self._stopping)
        except TimeoutError:
            pass

    def _events_since(self, seen: int) -> bytes:
        revision, mesh = self._mesh
        rows = [row for changed, row in self._rows.values() if changed > seen]
        events = b"event: mesh\ndata: " + mesh + b"\n\n" if revision > seen else b""
        return events + (b"event: requests\ndata: [" + b",".join(rows) + b"]\n\n" if rows or seen == 0 else b"")

    async def _look(self) -> None:
        try:
            self._queued = await self._node.queue.depth()
        except RedisError:
            self._queued = None
        mesh = encode(self._snapshot())
        if mesh != self._mesh[1]:
            self._revision += 1
            self._mesh = self._revision, mesh
        for answer in list(itertools.islice(reversed(self._running.values()), MAX_REQUESTS)):
            self._put(answer, "running")

    def _snapshot(self) -> dict[str, object]:
        moment = Moment.now(self._node.registry.members.values())
        while self._moments and moment.at - self._moments[0].at > RATE_SECONDS + INTERVAL_SECONDS:
            self._moments.popleft()
        self._moments.append(moment)
        earliest = self._moments[0] if moment.at - self._moments[0].at >= LEAST_RATE_SECONDS else None
        view = view_mesh(moment, earliest)
        return {
            "model": self._model,
            "version": __version__,
            "not_ready": self._readiness.reason,
            "open": len(self._running),
            "queued": self._queued,
            "workers": [_worker(member) for member in view.members if member.tier != "gateway"],
            "departed": [asdict(gone) for gone in self._departed if moment.at - gone.at < DEPARTED_SECONDS],
        }

    def _put(self, answer: Answer, outcome: str) -> None:
        """Remember a request as it is now, if that is news."""
        timeline = answer.choices[0].timeline
        latest = timeline.attempts[-1].last_token or 0.0
        row = RequestRow(
            id=answer.id,
            kind=answer.job.kind,
            created=answer.created,
            outcome=outcome,
            answers=len(answer.choices),
            prompt_tokens=sum(len(prompt.token_ids) for prompt in answer.job.prompts),
            output_tokens=sum(len(choice.token_ids) for choice in answer.choices),
            elapsed=timeline.now if outcome not in ("running", "ok") else latest,
            attempts=timeline.attempts,
        )
        encoded = encode(row)
        if answer.id in self._rows and self._rows[answer.id][1] == encoded:
            return
        self._revision += 1
        self._rows[answer.id] = self._revision, encoded
        if len(self._rows) > MAX_REQUESTS:
            self._rows.popitem(last=False)

    def _on_leave(self, member: Member) -> None:
        if member.tier != "gateway":
            self._departed.append(
                Departure(member.id, member.tier, member.epoch / 1e9, time.time(), not member.draining)
            )


def _worker(member: MemberView) -> dict[str, object]:
    """What the page shows: nothing that changes by itself, such as an age."""
    return {
        "id": member.id,
        "tier": member.tier,
        "started": member.epoch / 1e9,
        "draining": member.state == "draining",
        "pages_in_use": member.pages_in_use,
        "pages_total": member.pages_total,
        "running": member.running,
        "waiting": member.waiting,
        "tokens_per_second": None if member.tokens_per_second is None else round(member.tokens_per_second, 1),
    }
