"""Replays a trace against step costs: one event at a time, no clock but the events' own.

What is simulated is what the workers do (`prefill/worker.py`, `decode/worker.py`, `colocate/`): prefill workers take
prompts in turns while they have room and compute them in order, a step of at most so many tokens at a time; each prompt
has a decode worker from the start, the one with the smallest share of its pages spoken for; decode workers run one step
after the other. A colocated worker lets one chunk of prompts follow each decode step, as large as the ITL target
allows. Simpler than there: a request holds pages for its prompt and half its output from grant to end, so nothing is
preempted; prefill workers' pages suffice; no worker fails; and one that is taken away finishes what it holds.
"""

from __future__ import annotations

import heapq
import itertools
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from headrace.scaling.policy import TIERS, Bounds, Fleet, ScaledTier, Signals, Targets, TierState, decide
from headrace.scaling.replay import Replay, Served
from headrace.scaling.step_costs import StepCosts
from headrace.scaling.trace import HASHED_TOKENS, TraceRequest

LOOK_SECONDS = 5.0
FEWEST_COLOCATED = 32
"""Tokens of a chunk beside decode steps, at least."""


@dataclass(eq=False, slots=True)
class _Job:
    """A prompt between the queue and its decode worker."""

    served: Served
    worker: _Worker
    host: _Worker
    computed: int
    """Tokens: those found in the cache at first."""
    granted: bool = False
    is_computed: bool = False


@dataclass(eq=False)
class _Worker:
    """One process of either tier, or of both."""

    serves_at: float
    started: float
    draining: bool = False
    busy: bool = False
    """A step runs."""
    busy_seconds: float = 0.0
    """In prefill steps, since the last look."""
    held: int = 0
    """Prompts taken and not handed over."""
    computing: deque[_Job] = field(default_factory=deque)
    cache: OrderedDict[int, None] = field(default_factory=OrderedDict)
    """Hash ids of prompts computed here, the newest last."""
    wanting: deque[_Job] = field(default_factory=deque)
    """Those that wait for pages here."""
    promised: int = 0
    """Pages that they wait for."""
    ready: deque[Served] = field(default_factory=deque)
    """Handed over, to join at the next step."""
    rows: list[tuple[int, int, Served]] = field(default_factory=list)
    """Heap of (step that makes its last token, order of joining, request)."""
    step: int = 0
    pages: int = 0
    """Granted."""
    kv_tokens: int = 0
    """Of the rows."""
    gap: float = 0.0
    """Of the last step that followed another."""
    chunk_is_next: bool = False


class Simulation:
    """One replay. `bounds` None: the number of workers stays as it is."""

    def __init__(
        self,
        trace: Sequence[TraceRequest],
        costs: StepCosts,
        targets: Targets,
        prefill: int,
        decode: int,
        bounds: dict[ScaledTier, Bounds] | None = None,
        colocated: bool = False,
    ) -> None:
        """`colocated`: `prefill` workers that are both tiers; `decode` does not count."""
        assert bounds is None or not colocated, "colocated workers are not scaled by tier"
        self._costs, self._targets, self._bounds, self._colocated = costs, targets, bounds, colocated
        self._limits = costs.limits
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._now = 0.0
        self._queue: deque[Served] = deque()
        self._served = [Served(request) for request in trace]
        self._open = len(self._served)
        self._refused = 0
        self._turn = 0
        first = [_Worker(0.0, 0.0) for _ in range(prefill)]
        self._tiers: dict[ScaledTier, list[_Worker]] = {
            "prefill": first,
            "decode": first if colocated else [_Worker(0.0, 0.0) for _ in range(decode)],
        }
        self._fleet: Fleet = {tier: TierState(len(self._tiers[tier])) for tier in TIERS}
        self._history: list[tuple[float, dict[ScaledTier, int]]] = []
        self._gone_seconds = 0.0

    def run(self) -> Replay:
        """Until every request has ended."""
        for served in self._served:
            self._at(served.request.at, lambda served=served: self._arrive(served))  # type: ignore[misc]
        self._note_workers()
        if self._bounds is not None:
            self._at(LOOK_SECONDS, self._look)
        while self._open:
            self._now, _, act = heapq.heappop(self._events)
            act()
        alive = {id(worker): worker for tier in TIERS for worker in self._tiers[tier]}.values()
        seconds = self._gone_seconds + sum(self._now - worker.started for worker in alive)
        return Replay(self._served, self._now, self._history, seconds, self._refused)

    def _at(self, when: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when, next(self._order), act))

    def _serving(self, tier: ScaledTier) -> list[_Worker]:
        return [w for w in self._tiers[tier] if not w.draining and w.serves_at <= self._now]

    def _pages(self, request: TraceRequest) -> int:
        """That it holds on average while it is decoded."""
        return -(-(request.prompt_tokens + request.output_tokens // 2) // self._limits.page_size)

    def _arrive(self, served: Served) -> None:
        request = served.request
        if request.prompt_tokens + request.output_tokens > self._limits.pages * self._limits.page_size:
            self._refused += 1
            self._open -= 1
            return
        self._queue.append(served)
        self._take()

    def _take(self) -> None:
        """Workers with room take what waits, in turns."""
        while self._queue:
            takers = [w for w in self._serving("prefill") if w.held < self._limits.max_num_prefills]
            hosts = self._serving("decode")
            if not takers or not hosts:
                return
            self._turn += 1
            worker, served = takers[self._turn % len(takers)], self._queue.popleft()
            host = worker if self._colocated else min(hosts, key=lambda w: w.pages + w.promised)
            job = _Job(served, worker, host, self._find_cached(worker, served))
            worker.held += 1
            worker.computing.append(job)
            host.wanting.append(job)
            host.promised += self._pages(served.request)
            self._grant(host)
            self._run(worker)

    def _find_cached(self, worker: _Worker, served: Served) -> int:
        """Tokens of the longest known prefix, whose hash ids become the newest; the others are known from now on."""
        ids = served.request.hash_ids
        known = len(list(itertools.takewhile(worker.cache.__contains__, ids)))
        for hash_id in ids:
            worker.cache[hash_id] = None
            worker.cache.move_to_end(hash_id)
        while len(worker.cache) * HASHED_TOKENS > self._limits.pages * self._limits.page_size:
            worker.cache.popitem(last=False)
        page = self._limits.page_size
        return min(known * HASHED_TOKENS, (served.request.prompt_tokens - 1) // page * page)

    def _run(self, worker: _Worker) -> None:
        """Start the next step of a worker that has none: a decode step, but for each second turn of a colocated one."""
        if worker.busy:
            return
        may_decode = bool(worker.rows or worker.ready)
        if worker.computing and (worker.chunk_is_next or not may_decode):
            self._compute_chunk(worker, beside_rows=may_decode)
        elif may_decode:
            self._step(worker)

    def _compute_chunk(self, worker: _Worker, beside_rows: bool) -> None:
        page = self._limits.page_size
        budget = self._colocated_budget(worker) if beside_rows else self._limits.max_num_batched_tokens
        budget = max(budget, page)
        size, pairs = 0, 0.0
        done: list[_Job] = []
        for job in worker.computing:
            left = job.served.request.prompt_tokens - job.computed
            length = left if left <= budget - size else (budget - size) // page * page
            if length <= 0:
                break
            pairs += length * (job.computed + length / 2)
            job.computed += length
            size += length
            if length < left:
                break
            done.append(job)
        seconds = self._costs.prefill.seconds(size, pairs)
        worker.busy, worker.chunk_is_next = True, False
        worker.busy_seconds += seconds
        self._at(self._now + seconds, lambda: self._computed(worker, done))

    def _colocated_budget(self, worker: _Worker) -> int:
        """The largest chunk that lets the gap between two decode steps stay within the target."""
        step = self._costs.decode.seconds(len(worker.rows), worker.kv_tokens)
        low, high = FEWEST_COLOCATED, self._limits.max_num_batched_tokens
        while low < high:
            middle = (low + high + 1) // 2
            fits = step + self._costs.prefill.seconds(middle, middle * middle / 2) <= self._targets.itl
            low, high = (middle, high) if fits else (low, middle - 1)
        return low

    def _computed(self, worker: _Worker, done: list[_Job]) -> None:
        worker.busy = False
        for job in done:
            worker.computing.popleft()
            job.is_computed = True
            if job.granted:
                self._hand_over(job)
        self._run(worker)

    def _grant(self, host: _Worker) -> None:
        """Give pages to those that wait, in order."""
        while host.wanting:
            job = host.wanting[0]
            pages = self._pages(job.served.request)
            if host.pages + pages > self._limits.pages and host.pages:
                return
            host.wanting.popleft()
            host.pages += pages
            host.promised -= pages
            job.granted = True
            if job.is_computed:
                self._hand_over(job)

    def _hand_over(self, job: _Job) -> None:
        tokens = job.served.request.prompt_tokens
        seconds = 0.0 if self._colocated else self._costs.handoff_seconds(tokens)
        self._at(self._now + seconds, lambda: self._handed_over(job))

    def _handed_over(self, job: _Job) -> None:
        served, host = job.served, job.host
        job.worker.held -= 1
        served.first_at = self._now + self._costs.overhead_seconds
        if served.request.output_tokens == 1:
            self._end(served, host)
        else:
            host.ready.append(served)
            self._run(host)
        self._retire(job.worker)
        self._take()

    def _step(self, worker: _Worker) -> None:
        while worker.ready and len(worker.rows) < self._limits.max_num_seqs:
            served = worker.ready.popleft()
            last = worker.step + served.request.output_tokens - 1  # the first came with the prompt
            heapq.heappush(worker.rows, (last, next(self._order), served))
            worker.kv_tokens += served.request.prompt_tokens + 1
        seconds = self._costs.decode.seconds(len(worker.rows), worker.kv_tokens)
        worker.busy = worker.chunk_is_next = True
        self._at(self._now + seconds, lambda: self._stepped(worker, seconds))

    def _stepped(self, worker: _Worker, seconds: float) -> None:
        worker.busy = False
        worker.step += 1
        worker.gap = seconds
        worker.kv_tokens += len(worker.rows)
        while worker.rows and worker.rows[0][0] <= worker.step:
            served = heapq.heappop(worker.rows)[2]
            worker.kv_tokens -= served.request.prompt_tokens + served.request.output_tokens
            self._end(served, worker)
        self._run(worker)

    def _end(self, served: Served, host: _Worker) -> None:
        served.ended_at = self._now + self._costs.overhead_seconds
        self._open -= 1
        host.pages -= self._pages(served.request)
        self._grant(host)
        self._retire(host)

    def _look(self) -> None:
        """The autoscaler's look at the mesh."""
        assert self._bounds is not None
        self._fleet = decide(self._now, self._fleet, self._signals(), self._targets, self._bounds)
        for tier in TIERS:
            workers = [worker for worker in self._tiers[tier] if not worker.draining]
            for _ in range(self._fleet[tier].workers - len(workers)):
                added = _Worker(self._now + self._costs.start_seconds, self._now)
                self._tiers[tier].append(added)
                self._at(added.serves_at, self._take)
            for worker in workers[self._fleet[tier].workers :]:
                worker.draining = True
                self._retire(worker)
        self._note_workers()
        self._at(self._now + LOOK_SECONDS, self._look)

    def _signals(self) -> Signals:
        prefill, decode = self._serving("prefill"), self._serving("decode")
        waiting = sum(served.request.prompt_tokens for served in self._queue)
        waiting += sum(j.served.request.prompt_tokens - j.computed for w in prefill for j in w.computing)
        busy = sum(min(worker.busy_seconds / LOOK_SECONDS, 1.0) for worker in prefill)
        for worker in self._tiers["prefill"]:
            worker.busy_seconds = 0.0
        running = [worker.gap for worker in decode if worker.rows]
        return Signals(
            prefill_workers=len(prefill),
            decode_workers=len(decode),
            backlog_tokens=waiting,
            prefill_rate=self._costs.prefill_rate,
            prefill_busy=busy / max(len(prefill), 1),
            pages_in_use=sum(w.pages for w in decode) / (self._limits.pages * max(len(decode), 1)),
            inter_token=sum(running) / max(len(running), 1),
            inter_token_alone=self._costs.decode.seconds(1, 0),
        )

    def _retire(self, worker: _Worker) -> None:
        """Let go of a worker that was taken away and holds nothing more."""
        if worker.draining and not (worker.held or worker.ready or worker.rows or worker.pages or worker.wanting):
            for tier in TIERS:
                if worker in self._tiers[tier]:
                    self._tiers[tier].remove(worker)
            self._gone_seconds += self._now - worker.started

    def _note_workers(self) -> None:
        workers = {tier: self._fleet[tier].workers for tier in TIERS}
        if not self._history or self._history[-1][1] != workers:
            self._history.append((self._now, workers))
