"""Which requests the next decode step runs, and on which pages. Pure bookkeeping: no device, no sockets, no clock."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from headrace.decode.sequence import Key, Sequence
from headrace.engine.page_pool import PagePool


@dataclass
class Plan:
    """What changes in the batch before the next step."""

    leaves: list[Key] = field(default_factory=list)
    joins: list[Sequence] = field(default_factory=list)
    new_pages: dict[Key, list[int]] = field(default_factory=dict)
    preempted: list[Sequence] = field(default_factory=list)
    """Given up for want of pages; each is computed again elsewhere or later. Those that ran are among `leaves`."""


class DecodeScheduler:
    """Continuous batching: requests join and leave at any step, in order of arrival.

    A request gets a page when it needs one. When none is left the youngest request is given up, so the oldest always
    goes on and every request ends.
    """

    def __init__(self, pool: PagePool, max_num_seqs: int) -> None:
        self._pool = pool
        self._max_num_seqs = max_num_seqs
        self._ready: OrderedDict[Key, Sequence] = OrderedDict()
        self._running: OrderedDict[Key, Sequence] = OrderedDict()
        self._leaving: list[Key] = []

    @property
    def num_ready(self) -> int:
        """Requests whose KV is here and that wait for a place in the batch."""
        return len(self._ready)

    @property
    def num_running(self) -> int:
        """Requests in the batch."""
        return len(self._running)

    @property
    def has_work(self) -> bool:
        """Whether `schedule` would have something to do."""
        return bool(self._ready or self._running or self._leaving)

    def add(self, sequence: Sequence) -> None:
        """A request whose prompt is complete here. Its pages are the scheduler's from now on."""
        self._ready[sequence.key] = sequence

    def running(self, key: Key) -> Sequence:
        """A request of the batch."""
        return self._running[key]

    def sequences(self) -> list[Sequence]:
        """All requests held."""
        return [*self._running.values(), *self._ready.values()]

    def remove(self, key: Key) -> None:
        """Free a request that ended. Never to be called while a step runs: the step may still write to its pages."""
        sequence = self._ready.pop(key, None)
        if sequence is None and (sequence := self._running.pop(key, None)) is not None:
            self._leaving.append(key)
        if sequence is not None:
            self._pool.release(sequence.pages)

    def schedule(self) -> Plan:
        """Change the batch for the next step and say how."""
        plan = Plan()
        while self._ready and len(self._running) < self._max_num_seqs:
            key, sequence = self._ready.popitem(last=False)
            self._running[key] = sequence
            plan.joins.append(sequence)
        for sequence in list(self._running.values()):
            if sequence.key in self._running:
                self._grow(sequence, plan)
        joined = {sequence.key for sequence in plan.joins}
        plan.joins = [sequence for sequence in plan.joins if sequence.key in self._running]
        plan.leaves = [key for key in self._leaving if key not in joined]
        plan.new_pages = {
            key: pages for key, pages in plan.new_pages.items() if key in self._running and key not in joined
        }
        self._leaving = []
        return plan

    def _grow(self, sequence: Sequence, plan: Plan) -> None:
        missing = sequence.pages_missing(self._pool.page_size)
        while missing > self._pool.num_free:
            youngest = next(reversed(self._running.values()))
            plan.preempted.append(youngest)
            self.remove(youngest.key)
            if youngest is sequence:
                return
        if missing:
            pages = self._pool.allocate(missing)
            sequence.pages.extend(pages)
            plan.new_pages[sequence.key] = pages
