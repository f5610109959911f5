"""One step of the running batch, as the scheduler planned it."""

from __future__ import annotations

from typing import Protocol

from headrace.decode.scheduler import Plan
from headrace.decode.sequence import Key
from headrace.engine.decode_batch import RunningBatch
from headrace.engine.sampler import SampledToken


class Alongside(Protocol):
    """What else is computed on the decode worker's device. `start_step` and `stepped` are called on its thread."""

    async def before_step(self, requests: int) -> None:
        """Wait until the next step, of so many requests, is to be scheduled."""

    def start_step(self, batch: RunningBatch[Key]) -> bool:
        """Start the batch's next step together with something else; False: the batch is to start it as usual."""

    def stepped(self, running: int, ended: bool) -> None:
        """The batch has `running` requests; the oldest step has just `ended`, or not."""

    def abandoned(self) -> None:
        """The batch is gone with all its steps, after a failure."""


def run_step(
    batch: RunningBatch[Key], plan: Plan | None, alongside: Alongside | None = None
) -> list[tuple[Key, SampledToken]] | None:
    """Start the planned step, then collect the oldest one, if it is due; without a plan, collect it in any case.

    A step with drafts is due at once. One that is started together with something else takes no drafts: the plan's are
    dropped.
    """
    tokens = _start_and_collect(batch, plan, alongside)
    if alongside is not None:
        alongside.stepped(len(batch), tokens is not None)
    return tokens


def _start_and_collect(
    batch: RunningBatch[Key], plan: Plan | None, alongside: Alongside | None
) -> list[tuple[Key, SampledToken]] | None:
    if plan is None:
        return batch.collect()
    for key in plan.leaves:
        batch.leave(key)
    for key, count in plan.kept_pages.items():
        batch.keep_pages(key, count)
    for key, pages in plan.new_pages.items():
        batch.add_pages(key, pages)
    for sequence in plan.joins:
        sampling = sequence.offer.sampling
        assert (sequence.matcher is None) == (sampling.grammar is None), "who makes a sequence makes its matcher"
        batch.join(
            sequence.key, sequence.token_ids, sequence.generated, sequence.pages, sampling, matcher=sequence.matcher
        )
    if len(batch):
        plan.is_shared = alongside is not None and alongside.start_step(batch)
        if plan.is_shared:
            plan.drafts = {}
        else:
            batch.start(plan.drafts)
    due = batch.in_flight > (batch.lookahead if len(batch) and not plan.drafts else 0)
    return batch.collect() if due else None
