"""One step of the running batch, as the scheduler planned it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from headrace.decode.scheduler import DecodeScheduler, Plan
from headrace.decode.sequence import Key
from headrace.decode.speculator import Speculator
from headrace.engine.decode_batch import RunningBatch
from headrace.engine.step_tokens import StepTokens


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


def plan_step(scheduler: DecodeScheduler, speculator: Speculator | None) -> Plan | None:
    """What the next step is, which counts as started; None where the one in flight is to be collected first."""
    runs_ahead = scheduler.in_flight > 0
    if speculator is not None and runs_ahead and speculator.waits(scheduler.batch()):
        return None
    plan = scheduler.schedule()
    if plan is None:
        return None
    if speculator is not None:
        requests = scheduler.batch()
        drafts = speculator.propose_ahead(requests) if runs_ahead else speculator.propose(requests)
        scheduler.reserve(plan, _allowed(scheduler, drafts), speculator.ahead, speculator.depth_on_device)
    if scheduler.num_running:
        scheduler.started(plan.drafts)
    return plan


def _allowed(scheduler: DecodeScheduler, drafts: dict[Key, list[int]]) -> dict[Key, list[int]]:
    """Cut them where a grammar would. Those that only the device knows can't be, so requests with one get none.

    Drafts that the host knows are of steps with none in flight before them, so the matchers know all tokens.
    """
    for key, draft in list(drafts.items()):
        sequence = scheduler.running(key)
        if sequence is not None and sequence.matcher is not None:
            standing = sequence.matcher.standing(draft) if draft[0] >= 0 else 0
            if standing:
                drafts[key] = draft[:standing]
            else:
                del drafts[key]
    return drafts


def run_step(
    batch: RunningBatch[Key],
    plan: Plan | None,
    alongside: Alongside | None = None,
    started: Callable[[], object] = lambda: None,
) -> StepTokens[Key] | None:
    """Start the planned step, then collect the oldest one, if it is due; without a plan, collect it in any case.

    `started` is called when the device is at work, or about to be where that takes this thread: now there is time.

    A step with drafts that the host knows is due at once. One that is started together with something else takes no
    drafts: the plan's are dropped.
    """
    if not batch.lookahead:
        started()
    if plan is not None:
        _start(batch, plan, alongside)
    if batch.lookahead:
        started()
    due = plan is None or batch.in_flight > (batch.lookahead if len(batch) and not plan.follows_tokens else 0)
    tokens = batch.collect() if due else None
    if alongside is not None:
        alongside.stepped(len(batch), tokens is not None)
    return tokens


def _start(batch: RunningBatch[Key], plan: Plan, alongside: Alongside | None) -> None:
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
            batch.start(plan.drafts, plan.depth)
