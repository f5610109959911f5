"""Tells telemetry how an attempt went here, however it ended."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from headrace.kvtransfer.handoff import Handoff
from headrace.prefill.job import Job, RequestRejected
from headrace.queue import Delivery
from headrace.telemetry.events import Attempt, HandoffTimes, Outcome, PrefillEnded
from headrace.telemetry.telemetry import Telemetry


@dataclass
class Watch:
    """One attempt; `job` once there is one."""

    job: Job | None = None


@contextmanager
def watching(telemetry: Telemetry, delivery: Delivery) -> Iterator[Watch]:
    """Watch all that is done for `delivery` inside the block."""
    watch, taken_at = Watch(), time.time()
    try:
        yield watch
    except asyncio.CancelledError:
        telemetry.emit(_ended(delivery, watch.job, taken_at, "cancelled", "cancelled"))
        raise
    except TimeoutError:
        telemetry.emit(_ended(delivery, watch.job, taken_at, "failed", "deadline"))
        raise
    except RequestRejected as error:
        telemetry.emit(_ended(delivery, watch.job, taken_at, "failed", error.code))
        raise
    telemetry.emit(_ended(delivery, watch.job, taken_at, "finished", ""))


def _ended(delivery: Delivery, job: Job | None, taken_at: float, outcome: Outcome, code: str) -> PrefillEnded:
    entry = delivery.entry
    handoff = job.handoff if job is not None else None
    return PrefillEnded(
        of=Attempt(entry.request_id, delivery.attempt, entry.traceparent),
        outcome=outcome,
        code=code,
        enqueued_at=min(entry.enqueued_at, taken_at),
        taken_at=taken_at,
        first_token_at=job.first_token_at if job is not None else None,
        ended_at=time.time(),
        prompt_tokens=len(entry.token_ids),
        cached_tokens=job.cached_tokens if job is not None else 0,
        handoff=_times(handoff) if handoff is not None and handoff.timings.offered else None,
    )


def _times(handoff: Handoff) -> HandoffTimes:
    timings, to_unix = handoff.timings, time.time() - time.monotonic()

    def unix(moment: float) -> float | None:
        return moment + to_unix if moment else None

    return HandoffTimes(
        receiver=handoff.receiver,
        transport=handoff.transport,
        pages=handoff.sent_pages,
        bytes=handoff.sent_bytes,
        offered_at=timings.offered + to_unix,
        granted_at=unix(timings.granted),
        acknowledged_at=unix(timings.acknowledged),
    )
