"""Answers that have come to a halt: finds out whether a message or a queue entry was lost, and has them go on.

Everything else recovers by itself: tokens that overtake lost ones are a gap, and a worker that leaves loses its
requests. What is left is silence, where the last message of an answer was lost, or its entry, which Redis forgot. An
answer that is silent for `LOOK_SECONDS` is looked at, and again after as long, since a network that loses tokens loses
questions, too: its decode worker is asked to repeat what the gateway lacks. Where none is known, its queue entry is
looked for. That is cheap: few entries are in Redis without being computed, the others wait in the gateway.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass

from headrace.gateway.choice import Choice, Courier
from headrace.mesh import PeerGone
from headrace.messages.control import Repeat
from headrace.node import Node
from headrace.redis_client import RedisError

log = logging.getLogger(__name__)

LOOK_SECONDS = 2.0
TICK_SECONDS = 0.5
SECOND_LOOK_SECONDS = 1.0
"""An entry that is missing may just have been served, its tokens being on their way here: so long they may take."""
MAX_LOOKED_FOR = 1024
"""Entries looked for in one go; the others' turn comes with the next tick."""

Progress = tuple[int, int, str | None]
"""Attempt, tokens, entry: an answer for which they stay is silent."""


@dataclass
class _Watch:
    progress: Progress
    look_at: float
    is_missing: bool = False
    """The entry was not there at the last look."""


class Audit:
    """Looks after all answers of a gateway that have not ended."""

    def __init__(self, node: Node, choices: Mapping[str, Choice], courier: Courier) -> None:
        self._node = node
        self._choices = choices
        self._courier = courier
        self._watches: dict[str, _Watch] = {}
        node.registry.on_outage.append(self._look_soon)
        node.registry.on_buried.append(self._start_all_anew)

    async def run(self) -> None:
        """Look until cancelled."""
        while True:
            await asyncio.sleep(TICK_SECONDS)
            due = self._due(time.monotonic())
            for choice in due:
                if choice.decode_worker is not None:
                    self._ask(choice)
            queued = [c for c in due if c.decode_worker is None and c.entry_id is not None][:MAX_LOOKED_FOR]
            try:
                await self._look_for(queued)
            except RedisError as error:
                log.debug("can't look for entries: %s", error)

    def _due(self, now: float) -> list[Choice]:
        """Choices that have been silent for long enough."""
        self._watches = {name: watch for name, watch in self._watches.items() if name in self._choices}
        due = []
        for name, choice in self._choices.items():
            progress = (choice.attempt, len(choice.token_ids), choice.entry_id)
            watch = self._watches.get(name)
            if watch is None or watch.progress != progress:
                self._watches[name] = _Watch(progress, now + LOOK_SECONDS)
            elif now >= watch.look_at and not choice.ended:
                watch.look_at = now + LOOK_SECONDS
                due.append(choice)
        return due

    def _ask(self, choice: Choice) -> None:
        assert choice.decode_worker is not None
        repeat = Repeat(request_id=choice.request_id, attempt=choice.attempt, position=len(choice.token_ids))
        try:
            self._node.mesh.post(choice.decode_worker[0], repeat)
        except PeerGone as error:
            log.debug("can't ask for tokens: %s", error)

    async def _look_for(self, choices: list[Choice]) -> None:
        ids = [choice.entry_id for choice in choices if choice.entry_id is not None]
        if not ids:
            return
        missing = await self._node.queue.missing(ids)
        for choice in choices:
            watch = self._watches.get(choice.request_id)
            if watch is None or choice.entry_id != watch.progress[2]:
                continue
            if choice.entry_id not in missing:
                watch.is_missing = False
            elif not watch.is_missing:
                watch.is_missing = True
                watch.look_at = time.monotonic() + SECOND_LOOK_SECONDS
            elif choice.decode_worker is None and len(choice.token_ids) == watch.progress[1]:
                choice.start_anew("its queue entry was lost", self._courier)

    def _look_soon(self) -> None:
        """Redis was away: it may have forgotten entries, and their absence is all that tells."""
        for name, watch in self._watches.items():
            if name in self._choices and self._choices[name].decode_worker is None:
                watch.look_at = 0.0

    def _start_all_anew(self) -> None:
        """The workers took this gateway for dead and dropped all that it wanted."""
        for choice in list(self._choices.values()):
            if not choice.ended:
                choice.start_anew("the workers gave this gateway up", self._courier)
