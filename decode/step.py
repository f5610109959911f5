"""One step of the running batch, as the scheduler planned it."""

from __future__ import annotations

from headrace.decode.scheduler import Plan
from headrace.decode.sequence import Key
from headrace.engine.decode_batch import RunningBatch
from headrace.engine.sampler import SampledToken


def run_step(batch: RunningBatch[Key], plan: Plan | None) -> list[tuple[Key, SampledToken]] | None:
    """Start the planned step, then collect the oldest one, if it is due; without a plan, collect it in any case.

    A step with drafts is due at once.
    """
    if plan is None:
        return batch.collect()
    for key in plan.leaves:
        batch.leave(key)
    for key, count in plan.kept_pages.items():
        batch.keep_pages(key, count)
    for key, pages in plan.new_pages.items():
        batch.add_pages(key, pages)
    for sequence in plan.joins:
        batch.join(sequence.key, sequence.token_ids, sequence.generated, sequence.pages, sequence.offer.sampling)
    if len(batch):
        batch.start(plan.drafts)
    due = batch.in_flight > (batch.lookahead if len(batch) and not plan.drafts else 0)
    return batch.collect() if due else None
