"""Which requests the next decode step runs, and on which pages. Pure bookkeeping: no device, no sockets, no clock."""

from __future__ import annotations

import itertools
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sized
from dataclasses import dataclass, field
from types import MappingProxyType

from headrace.decode.sequence import Key, Sequence, Steps
from headrace.engine.decode_batch import NO_DRAFTS
from headrace.engine.page_pool import PagePool

NOTHING_AHEAD: Mapping[Key, int] = MappingProxyType({})


@dataclass
class Plan:
    """What changes in the batch before the next step."""

    leaves: list[Key] = field(default_factory=list)
    joins: list[Sequence] = field(default_factory=list)
    kept_pages: dict[Key, int] = field(default_factory=dict)
    """To how many pages block tables shrink, before `new_pages` are added: refused drafts left the others."""
    new_pages: dict[Key, list[int]] = field(default_factory=dict)
    drafts: dict[Key, list[int]] = field(default_factory=dict)
    """What the step verifies."""
    depth: int = 0
    """Tokens that a head on the device guesses at the end of the step."""
    is_shared: bool = False
    """Whether the step was started together with something else, see `Alongside`."""
    preempted: list[Sequence] = field(default_factory=list)
    """Given up for want of pages; each is computed again elsewhere or later. Those that ran are among `leaves`."""

    @property
    def follows_tokens(self) -> bool:
        """Whether it verifies drafts that the host knows: the next step then needs to be told what stood."""
        return any(draft[0] >= 0 for draft in self.drafts.values())


class DecodeScheduler:
    """Continuous batching: requests join and leave at any step, in order of arrival.

    A request gets a page when it needs one. When none is left the youngest request is given up, so the oldest always
    goes on and every request ends.

    A step may be scheduled while the one before it still runs. The pages of a request that leaves meanwhile come free
    when the steps that may write to them have ended.
    """

    def __init__(self, pool: PagePool, max_num_seqs: int) -> None:
        self._pool = pool
        self._max_num_seqs = max_num_seqs
        self._ready: OrderedDict[Key, Sequence] = OrderedDict()
        self._running: dict[Key, Sequence] = {}
        self.running: Callable[[Key], Sequence | None] = self._running.get
        """A request of the batch, if it still is one."""
        self._leaving: list[Key] = []
        self._kept_pages: dict[Key, int] = {}
        self.steps = Steps()
        """Since the beginning."""
        self.on_leave: list[Callable[[Key], None]] = []
        """Called with each request that leaves the batch."""
        self._drafts: deque[Mapping[Key, Sized]] = deque()
        """Of the steps in flight."""
        self._retired: deque[tuple[int, list[int]]] = deque()
        """(steps started when they were given up, pages)."""

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
        """Whether there is something to schedule or to collect."""
        return bool(self._ready or self._running or self._leaving or self._retired or self.in_flight)

    @property
    def in_flight(self) -> int:
        """Steps that run, or have run and are to be collected."""
        return self.steps.started - self.steps.collected

    def add(self, sequence: Sequence) -> None:
        """A request whose prompt is complete here. Its pages are the scheduler's from now on."""
        self._ready[sequence.key] = sequence

    def batch(self) -> list[Sequence]:
        """The requests of the batch."""
        return list(self._running.values())

    def sequences(self) -> list[Sequence]:
        """All requests held."""
        return [*self._running.values(), *self._ready.values()]

    def holds(self, sequence: Sequence) -> bool:
        """Whether it still is one of them."""
        return sequence is self._running.get(sequence.key) or sequence is self._ready.get(sequence.key)

    def take_out(self, key: Key) -> None:
        """Let go of a request whose pages the caller takes over.

        Steps that were started before may write to them behind its tokens, until they have been collected.
        """
        if self._ready.pop(key, None) is None:
            sequence = self._running.pop(key)
            sequence.steps, sequence.drafts_in_flight = None, 0
            self._leaving.append(key)
            for left in self.on_leave:
                left(key)

    def remove(self, key: Key) -> None:
        """Let go of a request that ended."""
        sequence = self._ready.get(key) or self._running.get(key)
        if sequence is None:
            return
        was_running = key in self._running
        self.take_out(key)
        if was_running and self.in_flight:
            self._retired.append((self.steps.started, sequence.pages))
        else:
            self._pool.release(sequence.pages)

    def roll_back(self, sequence: Sequence) -> None:
        """To be called when a running request has its tokens of a step with drafts: take back the pages that a refused
        draft has left, once no step may write to them.
        """
        surplus = -sequence.pages_missing(self._pool.page_size)
        if surplus > 0 and not sequence.in_flight:
            self._pool.release(sequence.pages[-surplus:])
            del sequence.pages[-surplus:]
            self._kept_pages[sequence.key] = len(sequence.pages)
        self._look_ahead(sequence)

    def _look_ahead(self, sequence: Sequence) -> None:
        room = len(sequence.pages) * self._pool.page_size - sequence.longest
        sequence.pages_last_until = self.steps.started + room

    def started(self, drafts: Mapping[Key, Sized] = NO_DRAFTS) -> None:
        """The step that was scheduled runs, with all running requests and these drafts."""
        self.steps.started += 1
        for key, draft in drafts.items():
            self._running[key].drafts_in_flight += len(draft)
            self._look_ahead(self._running[key])
        self._drafts.append(drafts)

    def collected(self) -> bool:
        """The oldest step that ran has ended; returns whether it verified drafts."""
        self.steps.collected += 1
        drafts = self._drafts.popleft()
        for key, draft in drafts.items():
            if (sequence := self._running.get(key)) is not None:
                sequence.drafts_in_flight -= len(draft)
        while self._retired and self._retired[0][0] <= self.steps.collected:
            self._pool.release(self._retired.popleft()[1])
        return bool(drafts)

    def abandon_steps(self) -> None:
        """No step runs any more, and none will be collected."""
        while self.in_flight:
            self.collected()

    def schedule(self) -> Plan | None:
        """Change the batch for the next step and say how.

        None where pages have run out while a step is in flight: collect it first, then schedule.
        """
        places = self._max_num_seqs - len(self._running)
        joining = list(itertools.islice(self._ready.values(), max(places, 0)))
        page_size, step = self._pool.page_size, self.steps.started
        for sequence in joining:
            self._look_ahead(sequence)
        short = [s for s in itertools.chain(self._running.values(), joining) if s.pages_last_until < step]
        wanted = [-(-(step - sequence.pages_last_until) // page_size) for sequence in short]
        missing = sum(wanted)
        if missing > self._pool.num_free:
            if self.in_flight:
                return None
            for sequence in self._running.values():  # nobody is given up for what a drafter may read into
                self.roll_back(sequence)
        plan = Plan(leaves=self._leaving)
        self._leaving = []
        for sequence in joining:
            self._running[sequence.key] = self._ready.pop(sequence.key)
            sequence.steps, sequence.joined_at = self.steps, step
            plan.joins.append(sequence)
        if missing <= self._pool.num_free:
            pages = iter(self._pool.allocate(missing))
            for sequence, count in zip(short, wanted, strict=True):
                plan.new_pages[sequence.key] = own = list(itertools.islice(pages, count))
                sequence.pages += own
                sequence.pages_last_until += count * page_size
        else:
            for sequence in short:
                if sequence.key in self._running:
                    self._grow(sequence, plan)
        joined = {sequence.key for sequence in plan.joins}
        plan.joins = [sequence for sequence in plan.joins if sequence.key in self._running]
        plan.leaves += [key for key in self._leaving if key not in joined]
        if joined or plan.preempted:
            plan.new_pages = {
                key: pages for key, pages in plan.new_pages.items() if key in self._running and key not in joined
            }
        if self._kept_pages:
            plan.kept_pages = {key: count for key, count in self._kept_pages.items() if key in self._running}
            self._kept_pages = {}
        self._leaving = []
        return plan

    def reserve(
        self,
        plan: Plan,
        drafts: Mapping[Key, list[int]],
        ahead: Mapping[Key, int] = NOTHING_AHEAD,
        depth: int = 0,
    ) -> None:
        """Have the planned step verify these drafts of running requests, cut to what spare pages hold, and a head on
        the device guess `depth` tokens.

        `ahead`: tokens behind the newest one that a drafter may read after the step. Nobody is given up for a draft.
        """
        plan.depth = depth
        page_size = self._pool.page_size
        joined = {sequence.key for sequence in plan.joins}
        for key in {**drafts, **ahead}:
            sequence, draft = self._running[key], drafts.get(key, [])
            if sequence.is_moving:
                continue
            wanted = max(len(draft) + depth, ahead.get(key, 0))
            missing = max(min(sequence.pages_missing(page_size, wanted), self._pool.num_spare), 0)
            room = (len(sequence.pages) + missing) * page_size - sequence.longest
            if room > 0 and draft:
                plan.drafts[key] = draft[:room]
            pages = self._pool.allocate(missing)
            sequence.pages.extend(pages)
            self._look_ahead(sequence)
            if pages and key not in joined:
                plan.new_pages[key] = [*plan.new_pages.get(key, ()), *pages]

    def _grow(self, sequence: Sequence, plan: Plan) -> None:
        missing = sequence.pages_missing(self._pool.page_size)
        while missing > self._pool.num_free:
            youngest = next(reversed(self._running.values()))
            plan.preempted.append(youngest)
            self.remove(youngest.key)
            if youngest is sequence:
                return
        if missing > 0:
            pages = self._pool.allocate(missing)
            sequence.pages.extend(pages)
            self._look_ahead(sequence)
            plan.new_pages[sequence.key] = pages
