"""A mesh as tables for a terminal."""

from __future__ import annotations

import time

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from headrace.mesh_view import MemberView, MeshView
from headrace.messages.finished import FinishedRequest

BAR_CELLS = 10
MOST_REQUESTS = 12
WIDE = 118
"""Columns of a terminal that has room for everything."""
TIMES = "queue+prefill+kv+first+decode"


def mesh_tables(view: MeshView, width: int, requests: int = MOST_REQUESTS) -> RenderableType:
    """The whole picture for a terminal of `width` columns, with at most so many requests."""
    queued = "?" if view.queued is None else str(view.queued)
    models = ", ".join(view.models) or "no model"
    head = Text.assemble((models, "bold"), f"  {len(view.members)} processes  {queued} in the queue")
    parts: list[RenderableType] = [head, _members(view, width >= WIDE)]
    if view.requests:
        parts.append(_requests(view.requests[:requests]))
    return Group(*parts)


def _members(view: MeshView, is_wide: bool) -> Table:
    table = Table(box=None, padding=(0, 2 if is_wide else 1, 0, 0), header_style="dim")
    for name in ("process", "state", "up", "pages"):
        table.add_column(name, no_wrap=True)
    for name in ("wait", "run", "tok/s", "req/s", "batch", "hits", "drafts"):
        table.add_column(name, justify="right", no_wrap=True)
    if is_wide:
        table.add_column("metrics", style="dim", no_wrap=True)
    for member in view.members:
        table.add_row(*_member(member, BAR_CELLS if is_wide else 0)[: len(table.columns)])
    return table


def _member(member: MemberView, cells: int) -> list[RenderableType]:
    state = Text(member.state, "yellow" if member.state == "draining" else "green")
    pages: RenderableType = ""
    if member.pages_total:
        filled = round(member.fill * cells)
        style = "red" if member.fill > 0.9 else "cyan"
        pages = Text.assemble(
            ("█" * filled, style),
            ("░" * (cells - filled), "dim"),
            f"{' ' if cells else ''}{member.pages_in_use}/{member.pages_total}",
        )
    return [
        escape(member.id),
        state,
        _duration(member.uptime_seconds),
        pages,
        str(member.waiting),
        str(member.running),
        _number(member.tokens_per_second, 0),
        _number(member.requests_per_second, 1),
        _number(member.batch_size, 1),
        _percent(member.prefix_hit_rate),
        _percent(member.acceptance_rate),
        escape(member.metrics_url.removeprefix("http://").removesuffix("/metrics")),
    ]


def _requests(requests: list[FinishedRequest]) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
    for name in ("ended request", "way"):
        table.add_column(name, no_wrap=True)
    for name in ("prompt", f"{TIMES} ms", "out"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("outcome +requeues", no_wrap=True)
    for request in requests:
        outcome = Text(request.outcome, "green" if request.outcome == "ok" else "red")
        if request.requeues:
            outcome.append(f" +{request.requeues}", "yellow")
        times = (request.queue_ms, request.prefill_ms, request.handoff_ms, request.first_ms, request.decode_ms)
        table.add_row(
            f"{time.strftime('%H:%M:%S', time.localtime(request.started_at))} {escape(_short(request))}",
            escape(f"{_number_of(request.prefill_worker)}→{_number_of(request.decode_worker)}"),
            str(request.prompt_tokens),
            "+".join(f"{milliseconds:.0f}" for milliseconds in times),
            str(request.output_tokens),
            outcome,
        )
    return table


def _short(request: FinishedRequest) -> str:
    """As the gateway's log calls it."""
    return f"{request.kind}-{request.id.partition('-')[2][:6]}"


def _number_of(worker: str | None) -> str:
    """`prefill-0` is p0; the tail of a long name."""
    if worker is None:
        return "?"
    tier, _, rest = worker.partition("-")
    return f"{tier[0]}{rest[-6:]}" if rest else worker[-7:]


def _duration(seconds: float) -> str:
    whole = int(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02}m"


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"
