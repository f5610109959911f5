"""What a decode worker says of its requests: tokens to their gateways as steps make them, and how each one ended."""

from __future__ import annotations

import itertools
import time
from collections import defaultdict
from collections.abc import Callable, Mapping

from headrace.decode.members import Members
from headrace.decode.scheduler import DecodeScheduler
from headrace.decode.sequence import Key, Sequence
from headrace.engine.sampler import SampledToken
from headrace.engine.step_tokens import StepTokens
from headrace.kvtransfer.messages import Commit
from headrace.messages.stream import FailureCode, FinishReason, RequestFailed, TokenBatch, TokenEvent
from headrace.telemetry.events import Attempt, DecodeEnded, Outcome
from headrace.telemetry.telemetry import Telemetry
from headrace.wire import Message


class Output:
    """Gives tokens to the scheduler's requests, lets go of those that they end, and tells gateways and telemetry."""

    def __init__(self, scheduler: DecodeScheduler, post: Callable[[str, Message], None], telemetry: Telemetry) -> None:
        self._scheduler = scheduler
        self._post = post
        self._telemetry = telemetry
        self._outbox: dict[str, list[TokenEvent]] = defaultdict(list)
        """By gateway."""
        self._taken: tuple[StepTokens[Key], Mapping[int, FinishReason]] | None = None
        """A step without drafts that is to be told in columns, and which rows it has ended."""
        self._members = Members(scheduler)
        self._finished: list[tuple[Sequence, FinishReason]] = []
        """Those of which telemetry has not been told."""

    def publish(self) -> None:
        """Send what has come since the last time, one message a gateway; then there is time for telemetry."""
        for gateway, events in self._outbox.items():
            self._post(gateway, TokenBatch(events=events))
        self._outbox.clear()
        if self._taken is not None:
            for gateway, columns in self._members.columns(*self._taken):
                self._post(gateway, columns)
        self._taken = None
        for sequence, reason in self._finished:
            self._tell(sequence, "finished", reason)
        self._finished = []

    def take_first(self, sequence: Sequence, commit: Commit) -> None:
        """Take the token that came with the pages, where it is drawn."""
        if commit.token_id is not None:
            sequence.newest_logprobs = commit.logprobs
            reason = sequence.take([commit.token_id])
            self._queue(sequence, [SampledToken(commit.token_id, commit.logprobs)], reason)

    def take_step(self, step: StepTokens[Key]) -> None:
        """Take what a step made; of a request that is gone meanwhile it is dropped."""
        self.publish()
        if self._scheduler.collected():
            self._take_drafted(step)
            return
        members = self._members
        members.follow(step.keys)
        reasons = members.take(step.token_ids)
        failed = [row for row in reasons if self._failed_its_grammar(members.sequences[row])]
        if failed:
            members.let_go()
        self._taken = step, reasons
        for row, scores in step.logprobs.items():
            if (sequence := members.sequences[row]) is not None:
                sequence.newest_logprobs = scores
        for row, reason in reasons.items():
            if (sequence := members.sequences[row]) is not None:
                self._finish(sequence, reason)

    def _take_drafted(self, step: StepTokens[Key]) -> None:
        """The same for a step that may have made several tokens of a request; what comes after its end is dropped."""
        self._members.forget()
        for key, of_request in itertools.groupby(step, lambda keyed: keyed[0]):
            sequence = self._scheduler.running(key)
            if sequence is None:
                continue
            made = [token for _, token in of_request]
            sequence.newest_logprobs = made[-1].logprobs
            position = sequence.generated
            reason = sequence.take([token.token_id for token in made])
            if reason is not None and self._failed_its_grammar(sequence):
                continue
            self._queue(sequence, made[: sequence.generated - position], reason)
            if reason is None:
                self._scheduler.roll_back(sequence)

    def _queue(self, sequence: Sequence, tokens: list[SampledToken], reason: FinishReason | None) -> None:
        """Queue a request's newest tokens for its gateway and let go of the request where they end it."""
        request_id, attempt = sequence.key
        event = TokenEvent(
            request_id,
            attempt,
            sequence.generated - len(tokens),
            [token.token_id for token in tokens],
            [token.logprobs for token in tokens if token.logprobs is not None] or None,
            reason,
        )
        self._outbox[sequence.gateway].append(event)
        if reason is not None:
            self._finish(sequence, reason)

    def _failed_its_grammar(self, sequence: Sequence | None) -> bool:
        """Whether it ended since its grammar could not be followed; its client is told."""
        if sequence is None or sequence.matcher is None or sequence.matcher.error is None:
            return False
        message = f"the grammar failed: {sequence.matcher.error}"
        self.fail(sequence, "invalid_request", message, retryable=False)
        return True

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        self._scheduler.remove(sequence.key)
        self._finished.append((sequence, reason))

    def fail(self, sequence: Sequence, code: FailureCode, message: str, retryable: bool = True) -> None:
        """Let go of a request and have its gateway know why, after the tokens that it made."""
        self.publish()
        request_id, attempt = sequence.key
        failed = RequestFailed(request_id=request_id, attempt=attempt, code=code, message=message, retryable=retryable)
        self._post(sequence.gateway, failed)
        self._scheduler.remove(sequence.key)
        self._tell(sequence, "failed", code)

    def cancel(self, sequence: Sequence) -> None:
        """Let go of a request that nobody waits for."""
        self._scheduler.remove(sequence.key)
        self._tell(sequence, "cancelled", "cancelled")

    def _tell(self, sequence: Sequence, outcome: Outcome, code: str) -> None:
        offer = sequence.offer
        of = Attempt(offer.request_id, offer.attempt, offer.traceparent)
        tokens = sequence.generated - offer.generated
        self._telemetry.emit(DecodeEnded(of, outcome, code, sequence.started_at, time.time(), tokens))
