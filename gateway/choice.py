"""One answer on its way: follows its tokens from worker to worker until it is finished, failed or cancelled.

    queued -> decoding -> finished | failed | cancelled

The gateway calls an answer `queued` until its first token, for prefill and handoff are told of only once they are over
(`PrefillReport`). A choice does no I/O itself: its `Courier` queues it anew and tells workers to stop.

Tokens are followed by (attempt, position). A lower attempt than the newest heard of is stale and dropped; a higher one
takes over and the older is cancelled. Positions held already are duplicates; a position too far ahead is a gap, after
which the choice is queued anew with all tokens so far.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Literal, Protocol

import msgspec

from headrace.gateway.errors import ApiError, WorkerFailed, worker_error
from headrace.gateway.job import Prompt
from headrace.gateway.news import News
from headrace.gateway.text import AnswerText, Delta
from headrace.gateway.timeline import Timeline
from headrace.messages.request import QueueEntry, SamplingParams
from headrace.messages.stream import FinishReason, Moved, PrefillReport, RequestFailed, TokenEvent
from headrace.queue import DELIVERIES_PER_ATTEMPT
from headrace.registry import Member
from headrace.wire import TraceParent

if TYPE_CHECKING:
    from headrace.gateway.tracing import ChoiceTrace

MAX_REQUEUES = 5

State = Literal["queued", "decoding", "finished", "failed", "cancelled"]


class Courier(Protocol):
    """What a choice needs done. Each call returns at once; the work goes on by itself."""

    def requeue(self, choice: Choice) -> None:
        """Put `choice.entry(...)` into the queue."""

    def cancel(self, choice: Choice, attempt: int) -> None:
        """Have every worker free what it holds for attempts up to `attempt`."""

    def drop(self, choice: Choice) -> None:
        """Take the choice's entry out of the queue and cancel all its attempts."""


class Choice:
    """One answer to one prompt."""

    def __init__(
        self,
        request_id: str,
        prompt: Prompt,
        sampling: SamplingParams,
        text: AnswerText,
        deadline: float,
        news: News,
    ) -> None:
        self.request_id = request_id
        """Id in the mesh; the HTTP request's id and the choice's index."""
        self.prompt = prompt
        self.sampling = sampling
        self.deadline = deadline
        """Unix time in seconds."""
        self.state: State = "queued"
        self.finish_reason: FinishReason | None = None
        self.error: ApiError | None = None
        self.token_ids: list[int] = []
        self.entry_attempt = 0
        """Attempt number of the newest queue entry; its redeliveries count on from there."""
        self.attempt = 0
        """The newest attempt heard of."""
        self.requeues = 0
        self.decode_worker: tuple[str, int] | None = None
        """Id and epoch of the worker that makes the tokens, once known."""
        self.report: PrefillReport | None = None
        """The first report: later ones count the tokens of earlier attempts as prompt."""
        self.prefill_worker: str | None = None
        self.created = time.monotonic()
        self.timeline = Timeline()
        self.first_token_at: float | None = None
        self.last_token_at: float | None = None
        self.trace: ChoiceTrace | None = None
        """None where the request is not traced."""
        self.entry_id: str | None = None
        """The queue entry's id in Redis; kept by the courier."""
        self._text = text
        self._news = news
        if not self.needs_worker:
            self._finish("length")

    @property
    def needs_worker(self) -> bool:
        """False where neither tokens nor log probabilities of the prompt are wanted."""
        return self.sampling.max_tokens > 0 or self.sampling.prompt_logprobs is not None

    @property
    def stop_string(self) -> str | None:
        """The stop string that ended the text, if one did."""
        return self._text.stop_string

    @property
    def waits_for_report(self) -> bool:
        """Whether nothing may be told before the prefill report: it carries log probabilities of the prompt."""
        return self.sampling.prompt_logprobs is not None and self.report is None

    @property
    def ended(self) -> bool:
        """Whether no more tokens will come."""
        return self.state in ("finished", "failed", "cancelled")

    @property
    def traceparent(self) -> TraceParent | None:
        """The newest attempt's span; None where the request is not traced."""
        return None if self.trace is None else self.trace.traceparent

    @property
    def last_attempt(self) -> int:
        """The highest attempt number that a delivery of the newest queue entry can have."""
        return self.entry_attempt + DELIVERIES_PER_ATTEMPT - 1

    def entry(self, gateway: str) -> QueueEntry:
        """The queue entry that makes workers go on from the tokens so far."""
        sampling = self.sampling
        if self.report is not None and sampling.prompt_logprobs is not None:
            sampling = msgspec.structs.replace(sampling, prompt_logprobs=None)
        return QueueEntry(
            request_id=self.request_id,
            attempt=self.entry_attempt,
            gateway=gateway,
            token_ids=self.prompt.token_ids + self.token_ids,
            generated=len(self.token_ids),
            sampling=sampling,
            enqueued_at=time.time(),
            deadline=self.deadline,
            traceparent=None if self.trace is None else self.trace.begin_attempt(self),
        )

    def on_tokens(self, event: TokenEvent, sender: Member, courier: Courier) -> int:
        """Take a worker's tokens; return how many of them were new."""
        if not self._follow(event.attempt, courier):
            return 0
        if sender.tier == "decode":
            self.decode_worker = (sender.id, sender.epoch)
        held = len(self.token_ids) - event.position
        if held < 0:
            self._retry(f"tokens {len(self.token_ids)} to {event.position - 1} were lost", courier)
            return 0
        fresh = event.token_ids[held:]
        if event.finish_reason is not None and not fresh:
            self._retry("two attempts went different ways", courier)
            return 0
        if fresh:
            self._append(event, held, courier)
        return len(fresh)

    def on_report(self, report: PrefillReport, sender: Member, decode_worker: Member | None, courier: Courier) -> None:
        """Take the news that the prompt is computed; `decode_worker` is the live member that the report names."""
        if not self._follow(report.attempt, courier, even_if_finished=True):
            return
        self.timeline.prefilled(report, sender.id)
        if self.report is None:
            expected = len(self.prompt.token_ids) - 1
            if self.sampling.prompt_logprobs is not None and len(report.prompt_logprobs or ()) < expected:
                self.fail(WorkerFailed(f"{sender.id} sent no log probabilities of the prompt"))
                courier.drop(self)
                return
            self.report = report
            self.prefill_worker = sender.id
            self._news.set()
        if self.ended:
            return
        if self.sampling.max_tokens == 0:
            self._finish("length")
        elif self.decode_worker is not None:
            pass  # its tokens, or the news that it has moved, came first: they are the newer
        elif decode_worker is not None:
            self.decode_worker = (decode_worker.id, decode_worker.epoch)
        elif report.decode_worker is not None:
            self._retry(f"{report.decode_worker} left the mesh", courier)

    def on_failure(self, failure: RequestFailed, courier: Courier) -> None:
        """Take the news that a worker gave the request up."""
        if not self._follow(failure.attempt, courier):
            return
        if failure.retryable:
            self._retry(failure.message, courier)
        else:
            self.fail(worker_error(failure))
            courier.drop(self)

    def on_moved(self, moved: Moved, decode_worker: Member | None, courier: Courier) -> None:
        """A worker that is to stop has handed this over to another; `decode_worker` is the live member of that name."""
        if not self._follow(moved.attempt, courier):
            return
        if decode_worker is None:
            self._retry(f"{moved.decode_worker} left the mesh", courier)
        else:
            self.decode_worker = (decode_worker.id, decode_worker.epoch)

    def start_anew(self, reason: str, courier: Courier) -> None:
        """Go on elsewhere, through no fault of the request's: only its deadline bounds how often."""
        if not self.ended:
            self.requeues = min(self.requeues, MAX_REQUEUES - 1)
            self._retry(reason, courier)

    def on_leave(self, member: Member, courier: Courier) -> None:
        """A worker left the mesh; go on elsewhere if it was ours."""
        if not self.ended and self.decode_worker == (member.id, member.epoch):
            self._retry(f"{member.id} left the mesh", courier)

    def fail(self, error: ApiError) -> None:
        """End with an error."""
        if not self.ended:
            self.state = "failed"
            self.error = error
            self._news.set()

    def abandon(self) -> None:
        """End because nobody waits for the answer any more."""
        if not self.ended:
            self.state = "cancelled"
            self._news.set()

    def take(self) -> Delta:
        """What is new since the last call; nothing while log probabilities of the prompt have to come first."""
        if self.waits_for_report:
            return Delta()
        return self._text.take()

    def _follow(self, attempt: int, courier: Courier, even_if_finished: bool = False) -> bool:
        """Whether a message of this attempt counts; a newer attempt takes over."""
        if self.ended and not (even_if_finished and self.state == "finished"):
            return False
        if not self.attempt <= attempt <= self.last_attempt:
            return False
        if attempt > self.attempt:
            courier.cancel(self, attempt - 1)
            self.timeline.follow(attempt)
            self.attempt = attempt
            self.decode_worker = None
        return True

    def _append(self, event: TokenEvent, held: int, courier: Courier) -> None:
        self.state = "decoding"
        self.last_token_at = time.monotonic()
        self.first_token_at = self.first_token_at or self.last_token_at
        self.timeline.tokens(len(event.token_ids) - held, self.decode_worker and self.decode_worker[0])
        scores = event.logprobs if self.sampling.logprobs is not None else None
        for index in range(held, len(event.token_ids)):
            token_id = event.token_ids[index]
            self.token_ids.append(token_id)
            is_stop_token = event.finish_reason == "stop" and index == len(event.token_ids) - 1
            if not is_stop_token:
                self._text.push(token_id, None if scores is None else scores[index])
            if self._text.stopped:
                self._finish("stop")
                courier.drop(self)
                return
        if event.finish_reason is not None:
            self._finish(event.finish_reason)
        self._news.set()

    def _finish(self, reason: FinishReason) -> None:
        self.state = "finished"
        self._text.finish()
        self.finish_reason = "stop" if self._text.stopped else reason
        self._news.set()

    def _retry(self, reason: str, courier: Courier) -> None:
        """Queue the rest of the answer under the next attempt number, which makes all earlier ones stale."""
        courier.drop(self)
        if self.trace is not None:
            self.trace.attempt_failed(reason)
        if self.requeues == MAX_REQUEUES:
            self.fail(
                WorkerFailed(f"Workers failed this request {self.requeues + 1} times, the last time because: {reason}.")
            )
            return
        self.timeline.retry(reason)
        self.requeues += 1
        self.entry_attempt += DELIVERIES_PER_ATTEMPT
        self.attempt = self.entry_attempt
        self.decode_worker = None
        courier.requeue(self)
