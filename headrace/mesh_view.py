"""The mesh at one moment, as `headrace status`, `headrace top` and the live page show it. No I/O: see `mesh_watch.py`.

Rates come from counters that members publish, at two moments; a second or more should lie between them, since members
publish a few times a second.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from headrace.messages.finished import FinishedRequest
from headrace.registry import Member, Tier

TIERS: tuple[Tier, ...] = ("gateway", "prefill", "decode")
TOKENS = {
    "gateway": "output_tokens_total",
    "prefill": "prompt_tokens_total",
    "decode": "generation_tokens_total",
}
"""The counter behind a tier's tokens a second."""


@dataclass(frozen=True)
class Moment:
    """Who was registered at `at` (Unix time in seconds), with their figures of then."""

    at: float
    members: Sequence[Member]

    @classmethod
    def now(cls, members: Iterable[Member]) -> Moment:
        """As of this call."""
        return cls(time.time(), list(members))


@dataclass(frozen=True)
class MemberView:
    """One process. A figure that it does not publish (yet) is None, or 0 where it is a count."""

    id: str
    epoch: int
    """Start time in nanoseconds: a restarted process is another member."""
    tier: Tier
    state: str
    """`serving` or `draining`."""
    model: str
    version: str
    uptime_seconds: float
    metrics_url: str
    """Where the process shows its own figures; empty where nowhere."""
    pages_in_use: int
    pages_total: int
    fill: float
    """Share of its KV pages in use, 0 to 1."""
    waiting: int
    """Requests. Of a decode worker those whose prompt is on its way here."""
    running: int
    tokens_per_second: float | None
    """Prefill: prompt tokens computed. Decode: tokens made. Gateway: tokens received for clients."""
    requests_per_second: float | None
    """That ended here."""
    handoff_bytes_per_second: float | None
    """Prefill: KV that left."""
    batch_size: float | None
    """Decode: requests of a step, on average."""
    prefix_hit_rate: float | None
    """Prefill: share of prompt tokens that were found computed, 0 to 1."""
    acceptance_rate: float | None
    """Decode: share of the drafted tokens that stood, 0 to 1."""
    aborts: int
    """Handoffs given up, since the start."""
    recomputed: int
    """Prompts computed again after a failure, since the start."""
    stats: dict[str, float] = field(default_factory=dict)
    """All figures as published, by metric name without the prefix `headrace_`."""


@dataclass(frozen=True)
class MeshView:
    """All members, gateways first, each tier in order of id."""

    at: float
    models: list[str]
    members: list[MemberView]
    queued: int | None
    """Requests in the queue, those in a prefill worker's hands among them; None where Redis was not asked."""
    requests: list[FinishedRequest]
    """The newest that are over, newest first."""

    def tier(self, tier: Tier) -> list[MemberView]:
        """The members of one tier."""
        return [member for member in self.members if member.tier == tier]

    def as_json(self) -> dict[str, Any]:
        """Made of dicts, lists, strings, numbers and None."""
        view: dict[str, Any] = msgspec.to_builtins(self)
        return view


def view_mesh(
    now: Moment, before: Moment | None = None, *, queued: int | None = None, requests: Iterable[FinishedRequest] = ()
) -> MeshView:
    """Make the picture; without `before`, and for members that are new since, rates over time are None."""
    earlier = {(member.id, member.epoch): member.stats for member in before.members} if before else {}
    seconds = now.at - before.at if before else 0.0
    members = sorted(now.members, key=lambda member: (TIERS.index(member.tier), member.id))
    return MeshView(
        at=now.at,
        models=sorted({member.model for member in members}),
        members=[_view(member, now.at, earlier.get((member.id, member.epoch)), seconds) for member in members],
        queued=queued,
        requests=sorted(requests, key=lambda request: request.started_at, reverse=True),
    )


def _view(member: Member, at: float, before: dict[str, float] | None, seconds: float) -> MemberView:
    stats = member.stats

    def rate(name: str) -> float | None:
        """Of a counter, a second."""
        if before is None or name not in stats or seconds <= 0:
            return None
        return max(stats[name] - before.get(name, 0.0), 0.0) / seconds

    def share(part: str, whole: str) -> float | None:
        """Of two counters: lately, where the whole grew, and since the start otherwise."""
        if not stats.get(whole):
            return None
        since = before if before is not None and stats[whole] > before.get(whole, 0.0) else {}
        return (stats.get(part, 0.0) - since.get(part, 0.0)) / (stats[whole] - since.get(whole, 0.0))

    in_use, total = int(stats.get("kv_pages_in_use", 0)), int(stats.get("kv_pages_total", 0))
    return MemberView(
        id=member.id,
        epoch=member.epoch,
        tier=member.tier,
        state="draining" if member.draining else "serving",
        model=member.model,
        version=member.version,
        uptime_seconds=max(at - member.epoch / 1e9, 0.0),
        metrics_url=f"http://{member.metrics_address}/metrics" if member.metrics_address else "",
        pages_in_use=in_use,
        pages_total=total,
        fill=in_use / total if total else 0.0,
        waiting=int(stats.get("requests_waiting", 0)),
        running=int(stats.get("requests_running", 0)),
        tokens_per_second=rate(TOKENS[member.tier]),
        requests_per_second=rate("requests_finished_total"),
        handoff_bytes_per_second=rate("handoff_bytes_total"),
        batch_size=share("decode_step_requests_total", "decode_steps_total"),
        prefix_hit_rate=share("prefix_cache_hits_total", "prefix_cache_queries_total"),
        acceptance_rate=share(*(_drafter(stats, kind) for kind in ("accepted", "drafted"))),
        aborts=int(sum(value for name, value in stats.items() if name.startswith("handoff_aborts_"))),
        recomputed=int(stats.get("handoff_recomputed_total", 0)),
        stats=stats,
    )


def _drafter(stats: dict[str, float], kind: str) -> str:
    """The name of a drafter's counter: a worker has one drafter."""
    return next((name for name in stats if name.startswith("speculation_") and name.endswith(f"_{kind}_total")), "")
