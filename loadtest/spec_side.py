"""One side of a comparison of decoding with drafts and without: what a decode worker does in a step, without a mesh."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from headrace.decode.draft_counters import Counters
from headrace.decode.scheduler import DecodeScheduler
from headrace.decode.sequence import Key, Sequence
from headrace.decode.speculator import Speculator
from headrace.decode.step import plan_step, run_step
from headrace.engine.decode_batch import new_batch
from headrace.engine.engine import Engine
from headrace.kvtransfer.messages import Layout, Offer
from headrace.messages.request import SamplingParams

DISTURBED = 4.0
"""Steps that take so many times their side's median are left out, on both sides: a step with the longest drafts takes
two to three times one without."""


def new_request(
    name: str, layout: Layout, token_ids: list[int], pages: list[int], sampling: SamplingParams, max_model_len: int
) -> Sequence:
    """As the receiver hands it over: a prompt, and the first token of its answer."""
    offer = Offer(
        request_id=name,
        attempt=0,
        gateway="bench",
        layout=layout,
        token_ids=token_ids[:-1],
        generated=0,
        sampling=sampling,
        deadline=0,
    )
    return Sequence(offer, token_ids, pages, max_model_len)


@dataclass(frozen=True)
class Step:
    """What a step took and gave."""

    seconds: float
    tokens: int
    drafting_seconds: float
    controlling_seconds: float


@dataclass
class Side:
    """A batch that is kept full, with drafts or without."""

    engine: Engine
    requests: Iterator[Sequence]
    size: int
    speculator: Speculator | None
    steps: list[Step] = field(default_factory=list)
    ended: list[Sequence] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._scheduler = DecodeScheduler(self.engine.pool, self.size)
        self._batch = new_batch(self.engine)

    def step(self) -> bool:
        """One turn of a decode worker's loop; False where no request is left."""
        missing = self.size - len(self._scheduler.sequences())
        for request in itertools.islice(self.requests, missing):
            self._scheduler.add(request)
        if not self._scheduler.has_work:
            return False
        counters = self.speculator.counters if self.speculator is not None else Counters()
        drafting, controlling = counters.drafting_seconds, counters.controlling_seconds
        started = time.perf_counter()
        plan = plan_step(self._scheduler, self.speculator)
        assert plan is None or not plan.preempted, "the cache is too small for this"
        found = run_step(self._batch, plan)
        if found is not None and self.speculator is not None:
            self.speculator.look(self._batch)
        tokens = 0
        if found is not None:
            self._scheduler.collected()
            for key, of_request in itertools.groupby(found, lambda keyed: keyed[0]):
                tokens += self._take(key, [token.token_id for _, token in of_request])
        seconds = time.perf_counter() - started
        if self.speculator is not None and plan is not None:
            if found is not None:
                self.speculator.ran(plan.drafts, seconds)
            else:
                self.speculator.refilled(seconds)
        drafting, controlling = counters.drafting_seconds - drafting, counters.controlling_seconds - controlling
        self.steps.append(Step(seconds, tokens, drafting, controlling))
        return True

    @property
    def seconds(self) -> float:
        """Of all steps."""
        return sum(step.seconds for step in self.steps)

    def undisturbed(self) -> list[Step]:
        """Without the steps during which something else had the cores."""
        limit = DISTURBED * statistics.median(step.seconds for step in self.steps)
        return [step for step in self.steps if step.seconds <= limit]

    def _take(self, key: Key, token_ids: list[int]) -> int:
        sequence = self._scheduler.running(key)
        if sequence is None:
            return 0
        before = sequence.generated
        if sequence.take(token_ids) is not None:
            self._scheduler.remove(key)
            self.ended.append(sequence)
        else:
            self._scheduler.roll_back(sequence)
        return sequence.generated - before

    def close(self) -> None:
        """Free what the requests that run hold."""
        while self._scheduler.in_flight:
            self._batch.collect()
            self._scheduler.collected()
        for sequence in self._scheduler.sequences():
            self._scheduler.remove(sequence.key)
