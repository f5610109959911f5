"""The newest requests that are over, for the live page here and, through Redis, for `headrace top` anywhere."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable

from headrace.gateway.answer import Answer
from headrace.messages.finished import MAX_FINISHED, FinishedRequest
from headrace.node import Node
from headrace.redis_client import RedisError

log = logging.getLogger(__name__)

PUBLISH_SECONDS = 1.0
"""Between two writes to Redis."""


class RecentRequests:
    """Remembers `MAX_FINISHED` of them."""

    def __init__(self, node: Node) -> None:
        self.newest: deque[FinishedRequest] = deque(maxlen=MAX_FINISHED)
        """Oldest first."""
        self._node = node
        self._changed = False

    def add(self, answer: Answer, trace_id: str = "") -> FinishedRequest:
        """Remember a request that has just ended."""
        finished = finished_request(answer, trace_id)
        self.newest.append(finished)
        self._changed = True
        return finished

    async def publish(self, stats: Callable[[], dict[str, float]]) -> None:
        """Keep Redis current until cancelled, this gateway's `stats` too. What can't be written is, the next time."""
        while True:
            await asyncio.sleep(PUBLISH_SECONDS)
            self._node.registry.update_stats(stats())
            if not self._changed:
                continue
            self._changed = False
            try:
                await self._node.finished.write(self._node.id, list(self.newest))
            except RedisError as error:
                self._changed = True
                log.debug("recent requests could not be published: %s", error)


def finished_request(answer: Answer, trace_id: str = "") -> FinishedRequest:
    """What is to be told of an answer that is over now."""
    choice, now = answer.choices[0], time.monotonic()
    first, report = choice.first_token_at, choice.report
    queue_ms, prefill_ms, handoff_ms = (report.queue_ms, report.prefill_ms, report.handoff_ms) if report else (0, 0, 0)
    to_first_ms = (first - choice.created) * 1000 if first is not None else 0.0
    return FinishedRequest(
        id=answer.id,
        kind=answer.job.kind,
        outcome=answer.outcome,
        started_at=time.time() - (now - choice.created),
        queue_ms=queue_ms,
        prefill_ms=prefill_ms,
        handoff_ms=handoff_ms,
        first_ms=max(to_first_ms - queue_ms - prefill_ms - handoff_ms, 0.0),
        decode_ms=((choice.last_token_at or first) - first) * 1000 if first is not None else 0.0,
        prefill_worker=choice.prefill_worker,
        decode_worker=choice.decode_worker[0] if choice.decode_worker else None,
        prompt_tokens=sum(len(prompt.token_ids) for prompt in answer.job.prompts),
        cached_tokens=report.cached_tokens if report else 0,
        output_tokens=sum(len(each.token_ids) for each in answer.choices),
        choices=len(answer.choices),
        requeues=sum(each.requeues for each in answer.choices),
        trace_id=trace_id,
    )
