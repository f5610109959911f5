"""The answer to one HTTP request: all its choices, from the queue to the last token."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from headrace.gateway.choice import Choice
from headrace.gateway.dispatcher import Dispatcher
from headrace.gateway.errors import DeadlineExceeded, WorkerFailed
from headrace.gateway.job import Job
from headrace.gateway.news import News
from headrace.gateway.terms import Terms
from headrace.gateway.text import AnswerText
from headrace.gateway.vocabulary import Vocabulary

REPORT_GRACE_SECONDS = 0.5
"""The report of a short answer's prefill may come after its last token; without it `cached_tokens` would be missing."""
LOGPROBS_GRACE_SECONDS = 10.0
"""The same where the report carries log probabilities that the answer needs."""


class Answer:
    """One HTTP request's choices, numbered prompt by prompt."""

    def __init__(self, job: Job, terms: Terms, vocabulary: Vocabulary, context_length: int) -> None:
        prefix = "chatcmpl" if job.kind == "chat" else "cmpl"
        self.number = secrets.token_hex(12)
        self.id = f"{prefix}-{self.number}"
        self.job = job
        self.terms = terms
        self.vocabulary = vocabulary
        self.outcome = "cancelled"
        """`ok` or an error's code once the answer has ended; as it stands, its client has gone."""
        self.created = int(time.time())
        self.deadline = time.time() + terms.timeout
        self.news = News()
        """Set whenever a choice has something to tell."""
        self.choices = [
            Choice(
                f"{self.id}.{index}",
                prompt := job.prompts[index // job.n],
                job.sampling_of(prompt, index % job.n, context_length),
                AnswerText(vocabulary, job.stop, job.sampling.min_tokens),
                self.deadline,
                self.news,
            )
            for index in range(job.choices)
        ]

    @property
    def ended(self) -> bool:
        """Whether every choice has its last token."""
        return all(choice.ended for choice in self.choices)

    def check(self) -> None:
        """Raise the first failed choice's error."""
        for choice in self.choices:
            if choice.error is not None:
                raise choice.error

    async def wait_for_news(self, seconds: float) -> bool:
        """Wait until a choice has news; False where none came in time.

        Raises the first failed choice's error, and `DeadlineExceeded`.
        """
        left = max(self.deadline - time.time(), 0)
        if not await self.news.wait(min(seconds, left)):
            if left <= seconds:
                raise DeadlineExceeded("The answer was not complete in time.")
            return False
        self.check()
        return True

    async def wait_for_reports(self) -> None:
        """Once all tokens are there, give a late prefill report a moment.

        Raises `WorkerFailed` where log probabilities of the prompt never came.
        """
        needed = self.job.sampling.prompt_logprobs is not None
        ends = time.monotonic() + (LOGPROBS_GRACE_SECONDS if needed else REPORT_GRACE_SECONDS)
        while any(choice.needs_worker and choice.report is None for choice in self.choices):
            if not await self.news.wait(ends - time.monotonic()):
                if needed:
                    raise WorkerFailed("The log probabilities of the prompt were lost.")
                return

    async def complete(self) -> None:
        """Wait for all tokens of all choices, and the reports."""
        self.check()
        while not self.ended:
            await self.wait_for_news(seconds=self.deadline - time.time())
        await self.wait_for_reports()

    def usage(self) -> dict[str, Any]:
        """OpenAI's token counts: each prompt once, all answers. What failures cost and drafts gave only if any."""
        prompts = sum(len(prompt.token_ids) for prompt in self.job.prompts)
        output = sum(len(choice.token_ids) for choice in self.choices)
        details = {"cached_tokens": sum(self._cached(first) for first in range(0, len(self.choices), self.job.n))}
        if recomputed := sum(len(choice.prompt.token_ids) for choice in self.choices if choice.attempt > 0):
            details["recomputed_tokens"] = recomputed
        usage: dict[str, Any] = {
            "prompt_tokens": prompts,
            "completion_tokens": output,
            "total_tokens": prompts + output,
            "prompt_tokens_details": details,
        }
        if accepted := sum(choice.timeline.accepted for choice in self.choices):
            usage["completion_tokens_details"] = {"accepted_prediction_tokens": accepted}
        return usage

    def _cached(self, first: int) -> int:
        """Prompt tokens that the first answer to a prompt found computed."""
        choice = self.choices[first]
        return 0 if choice.report is None else min(choice.report.cached_tokens, len(choice.prompt.token_ids))


@asynccontextmanager
async def running(answer: Answer, dispatcher: Dispatcher) -> AsyncIterator[None]:
    """Have the choices run inside the block; what has not finished by its end is cancelled in every tier."""
    try:
        choices = [choice for choice in answer.choices if choice.needs_worker]
        await dispatcher.submit(choices, answer.terms.caller, answer.terms.priority)
        yield
    finally:
        answer.news.close()
        for choice in answer.choices:
            dispatcher.release(choice)
